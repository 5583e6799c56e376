"""The export and evaluate commands hand their options on and explain what they print."""

from __future__ import annotations

import argparse
import json
import math
import sys
import types
from pathlib import Path

import pytest

from poet_megatron.cli import evaluate, export
from poet_megatron.errors import UserError


def parse(module: types.ModuleType, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_parser(parser.add_subparsers())
    return parser.parse_args(words)


def test_export_command_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    fake = types.SimpleNamespace(export_run=lambda *args, tokenizer: calls.append((*args, tokenizer)) or Path("runs/demo/export"))
    monkeypatch.setitem(sys.modules, "poet_megatron.train.export_run", fake)
    assert export.run(parse(export, "export", "--run", "runs/demo")) == 0
    assert export.run(parse(export, "export", "--run", "r", "--output", "o", "--step", "7", "--dtype", "bf16", "--no-tokenizer")) == 0
    assert calls == [(Path("runs/demo"), None, None, "fp32", True), (Path("r"), Path("o"), 7, "bf16", False)]
    assert "runs/demo/export" in capsys.readouterr().out


def test_numbers_stand_apart_from_their_names() -> None:
    lines = evaluate.describe({"loss": 3.0, "tokens_reference_protocol": 7138.0}).splitlines()
    assert lines[0].split() == ["loss", "3.0000"] and lines[-1].split() == ["tokens_reference_protocol", "7138"]
    assert lines[0].index("3") == lines[-1].index("7138")


def test_evaluate_command_prints_numbers_and_meanings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    results = {"loss": 3.0, "ppl": math.exp(3.0), "ppl_reference_protocol": 19.5, "tokens": 1000.0}
    fake = types.SimpleNamespace(evaluate_run=lambda *args: calls.append(args) or results)
    monkeypatch.setitem(sys.modules, "poet_megatron.train.evaluate_run", fake)
    assert evaluate.run(parse(evaluate, "evaluate", "--run", "r", "--tokens", "1000")) == 0
    text = capsys.readouterr().out
    assert "20.0855" in text and "19.5000" in text and all(meaning in text for meaning in evaluate.MEANINGS.values())
    assert evaluate.run(parse(evaluate, "evaluate", "--run", "r", "--json", "--data", "d", "--step", "3")) == 0
    assert json.loads(capsys.readouterr().out) == results
    assert calls == [(Path("r"), None, None, 1000), (Path("r"), 3, Path("d"), evaluate.DEFAULT_TOKENS)]
    with pytest.raises(UserError, match="--tokens is 0"):
        evaluate.run(parse(evaluate, "evaluate", "--run", "r", "--tokens", "0"))
