"""launch/torchrun/pretrain.sh with the real torchrun and two ranks over gloo: stopping, going on, and a crash, one after the other."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import TINY, train_losses

from poet_megatron.checkpoint.store import CheckpointStore

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "torchrun" / "pretrain.sh"
STEPS = 100
TIMEOUT = 300.0


def start(run_dir: Path, data: Path, log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """Start the script as a user does: two ranks, the recipe and a few settings."""
    recipe = run_dir.parent / "recipe.yaml"
    recipe.write_text("poet: {block_size: 24}\n")
    settings = {
        **TINY,
        "train.steps": STEPS,
        "train.eval_tokens": 64,
        "checkpoint.interval": 25,
        "data.path": data,
        "train.run_dir": run_dir,
    }
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "CUDA_VISIBLE_DEVICES")}
    world = {**keep, "PYTHON": sys.executable, "RANKS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [str(SCRIPT), str(recipe), *(f"--{key}={value}" for key, value in settings.items())]
    with log.open("wb") as output:
        return subprocess.Popen(command, env={**world, **environment}, stdout=output, stderr=subprocess.STDOUT)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that train: Python, without the torchrun that started them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.cmdline()[:4] == [sys.executable, "-m", "poet_megatron", "pretrain"] and "--print-config" not in child.cmdline():
                found.append(child)
    return found


@pytest.mark.slow
def test_stopped_twice_crashed_once_and_completed(tiny_data: Path, tmp_path: Path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    store = CheckpointStore(run_dir / "checkpoints", 99)

    def steps() -> int:
        return max(train_losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0

    # SIGTERM in the middle: saved at a step that no interval asks for.
    process = start(run_dir, tiny_data, log)
    wait_for(lambda: steps() >= 10, process, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 75, log.read_text()[-3000:]
    first = max(store.steps())
    assert 10 <= first < STEPS and "saved; the same command continues" in log.read_text()

    # SIGUSR1 while the ranks are still starting: heard when they train.
    process = start(run_dir, tiny_data, log)
    wait_for(lambda: len(ranks_of(process)) == 2, process, log)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(TIMEOUT) == 75, log.read_text()[-3000:]
    second = max(store.steps())
    assert first < second < STEPS

    # A rank that is killed: started again, once, and completed.
    process = start(run_dir, tiny_data, log, RESTARTS="1")
    wait_for(lambda: steps() > second + 5, process, log)
    ranks_of(process)[1].kill()
    assert process.wait(TIMEOUT) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "status 137: a rank failed" in text and "start 2, 2 ranks" in text
    assert sorted(train_losses(run_dir)) == list(range(1, STEPS + 1))
    assert [entry["command"][1] for entry in json.loads((run_dir / "run.json").read_text())] == ["pretrain"] * 4
