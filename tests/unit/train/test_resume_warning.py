"""A run that continues with other settings says so once."""

from __future__ import annotations

import logging

import pytest

from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.train import run as module


@pytest.mark.parametrize("is_main", [True, False])
def test_changed_settings_are_named_by_one_rank(tiny_run, tmp_path, monkeypatch, caplog, is_main: bool):
    monkeypatch.setattr(module, "read_common", lambda path: {})
    monkeypatch.setattr(module, "load_config", lambda path: tiny_run("run", {"optim.lr": "1e-3"}))
    with caplog.at_level(logging.WARNING):
        module._checked_common(CheckpointStore(tmp_path), 5, tiny_run(), is_main)
    assert ("resuming with changed settings: optim.lr" in caplog.text) == is_main
