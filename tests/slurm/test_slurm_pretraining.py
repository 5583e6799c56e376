"""Pretraining as a Slurm job of several nodes: the same numbers as by torchrun."""

from __future__ import annotations

import pytest
from conftest import train_losses
from desk import Desk, torchrun

pytest_plugins = ("slurm_fixtures",)
pytestmark = pytest.mark.slurm


def test_two_nodes_with_two_ranks_train_as_torchrun_does(desk: Desk):
    layout = {"parallel.tensor_parallel": "2", "train.steps": "12"}
    job = desk.launch(*desk.settings("job", **layout), nodes="2", gpus=2)["pretrain"]
    desk.wait_for_end("job", job, "COMPLETED")
    assert "4 rank(s) on cpu" in desk.log("job", job)
    torchrun(4, desk.settings("torchrun", **layout))
    expected = train_losses(desk.folder / "torchrun")
    assert len(expected) == 12 and train_losses(desk.folder / "job") == expected
