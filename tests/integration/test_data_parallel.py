"""The same run on two data-parallel ranks over gloo, started as a user would start it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from poet_megatron.config.dump import to_yaml
from poet_megatron.train.run import pretrain


def torchrun(ranks: int, config: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [*launcher, "-m", "poet_megatron", "pretrain"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, "--config", str(config), *settings], capture_output=True, text=True, env=environment, timeout=300)


def test_two_ranks_give_the_losses_of_one(tiny_run, losses, tmp_path):
    """12 steps with a merge at 10 and 2 micro-batches per rank; the sum over ranks is in another order, so 1e-4 relative (DESIGN 8)."""
    settings = {"train.steps": "12", "train.global_batch_size": "8", "checkpoint.interval": "6"}
    one = tiny_run("one", settings)
    pretrain(one)
    config = tmp_path / "two.yaml"
    config.write_text(to_yaml(tiny_run("two", settings)))
    for stop in ("7", "12"):  # resumed on two ranks, after a checkpoint at 6 and 7
        done = torchrun(2, config, "--train.stop_at_step", stop, "--parallel.overlap_grad_reduce", "true")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(one.train.run_dir), rel=1e-4)
    again = torchrun(2, config, "--train.stop_at_step", "12", "--parallel.overlap_grad_reduce", "true")
    assert "the run is complete" in again.stdout


def test_a_batch_that_does_not_divide_is_refused_by_name(tiny_run, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(tiny_run("run", {"train.global_batch_size": "2"})))
    done = torchrun(2, config)
    assert done.returncode != 0
    assert "train.global_batch_size is 2" in done.stderr + done.stdout
    assert "2 x 2" in done.stderr + done.stdout
