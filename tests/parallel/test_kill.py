"""Runs that are killed: nothing is lost but the steps since the last checkpoint, and nothing hangs.

A run of 4 ranks, tensor x data parallel 2 x 2, started by torchrun as a user starts it, loses one of its ranks to SIGKILL in the middle of
a save or a merge, three times one after the other; then the same command finishes it. (kill_target.py is the user's command, with marks.)
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import TINY, train_losses
from kill_target import SECONDS_PER_MATRIX, mark_of

from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.dump import to_yaml
from poet_megatron.config.load import load_config
from poet_megatron.errors import EXIT_SAVED
from poet_megatron.train.run import pretrain

ROOT = Path(__file__).parents[2]
RANKS, STEPS, MERGE_INTERVAL = 4, 16, 4
TIMEOUT_MINUTES = 0.5
SETTINGS = {
    **TINY,
    "model.num_query_groups": 4,
    "poet.block_size": 10,
    "poet.merge_interval": MERGE_INTERVAL,
    "poet.shard_groups": 2,
    "optim.eps": 1e-5,  # updates that do not depend on the sign of a rounding error (see cases_checkpoints.py)
    "train.steps": STEPS,
    "train.eval_tokens": 64,
    "checkpoint.interval": 3,
    "parallel.timeout_minutes": TIMEOUT_MINUTES,
}
SAVE_SECONDS = 0.4  # about as long as a save of this model takes
MERGE_SECONDS = 4 * SECONDS_PER_MATRIX  # a merge takes 7
STARTUP_SECONDS = 300.0  # a loaded machine imports torch four times
EXIT_SECONDS = 60 * TIMEOUT_MINUTES + 45  # the time limit of collectives; torchrun then gives survivors 30 s to leave
CHAINS = [pytest.param(0, id="0"), *(pytest.param(chain, id=str(chain), marks=pytest.mark.slow) for chain in range(1, 8))]  # 3 + 21 kills


def make_run(tiny_data: Path, folder: Path, **changes: object):
    """A run below `folder`."""
    settings = {**SETTINGS, "data.path": tiny_data, "train.run_dir": folder / "run", **changes}
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


@pytest.fixture(scope="module")
def expected(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the uninterrupted run, on one rank; layouts differ by the order of fp32 sums."""
    run = make_run(tiny_data, tmp_path_factory.mktemp("uninterrupted"))
    assert pretrain(run) == 0
    return train_losses(run.train.run_dir)


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a process group of its own, which is gone at the end whatever happens."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True) as process,
    ):
        try:
            yield process
        finally:
            if process.poll() is None:  # else its number may be another process's by now
                for child in children(process):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
                process.kill()


def children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes below one that has not been waited for."""
    return psutil.Process(process.pid).children(recursive=True)


def survivors(config: Path) -> list[int]:
    """Processes anywhere with the run's config on their command line."""
    return [found.pid for found in psutil.process_iter(["cmdline"]) if str(config) in (found.info["cmdline"] or ())]


def torchrun(config: Path, marks: Path) -> list[str]:
    """Start the run, with a folder for the marks of its merges."""
    program = [str(Path(__file__).with_name("kill_target.py")), str(marks), "pretrain", "--config", str(config)]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), *program]


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll until something has happened; fails if the process ends before."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while not happened():
        assert process.poll() is None, f"ended with {process.returncode} before it could be killed:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"nothing happened in {STARTUP_SECONDS} s:\n{log.read_text()[-3000:]}"
        time.sleep(0.002)


def next_save(run_dir: Path) -> Callable[[], bool]:
    """Whether a save has begun since now."""
    now = time.time()

    def saving() -> bool:
        with contextlib.suppress(FileNotFoundError):  # complete, and renamed
            return any(path.stat().st_mtime > now for path in (run_dir / "checkpoints").glob("step-*.partial"))
        return False

    return saving


def kill_a_rank(seed: int, run_dir: Path, marks: Path, process: subprocess.Popen[bytes], log: Path) -> tuple[str, bool, float]:
    """Kill a rank of a run some time into its next save or merge.

    Returns:
        What was meant, whether it was hit (the rank was in a merge; a save was not complete), and how long the other ranks lived on.
    """
    dice = random.Random(seed)
    kind, rank = dice.choice(("save", "merge")), dice.randrange(RANKS)
    mark = mark_of(marks, rank)
    mark.unlink(missing_ok=True)  # of a rank that was killed before
    wait_for(next_save(run_dir) if kind == "save" else mark.exists, process, log)
    (victim,) = [child for child in children(process) if child.environ().get("RANK") == str(rank)]
    time.sleep(dice.uniform(0, SAVE_SECONDS if kind == "save" else MERGE_SECONDS))
    victim.kill()
    killed = time.monotonic()
    process.wait(timeout=EXIT_SECONDS)
    hit = mark.exists() if kind == "merge" else bool(list((run_dir / "checkpoints").glob("*.partial")))
    return kind, hit, time.monotonic() - killed


@pytest.mark.parametrize("chain", CHAINS)
def test_a_rank_killed_in_a_save_or_a_merge_costs_only_the_steps_since_the_last_checkpoint(chain, expected, tiny_data, tmp_path):
    """Each start continues from the newest checkpoint, all of which are intact; the losses are those of the uninterrupted run."""
    run = make_run(tiny_data, tmp_path, **{"parallel.tensor_parallel": 2})
    config, run_dir, store = tmp_path / "run.yaml", tmp_path / "run", CheckpointStore(tmp_path / "run" / "checkpoints")
    config.write_text(to_yaml(run))
    (marks := tmp_path / "marks").mkdir()
    hits = []
    for seed in (*range(3 * chain, 3 * chain + 3), None):
        newest, log = max(store.steps(), default=0), tmp_path / f"{seed}.log"
        with started(torchrun(config, marks), log) as process:
            if seed is None:
                assert process.wait(timeout=STARTUP_SECONDS) == 0, log.read_text()[-3000:]
            else:
                kind, hit, seconds = kill_a_rank(seed, run_dir, marks, process, log)
                hits.append((kind, hit))
                print(f"seed {seed}: killed {'in' if hit else 'after'} a {kind}; all gone after {seconds:.1f} s")
                assert process.returncode != 0
        assert survivors(config) == []
        assert (f"continuing from step {newest} of" in log.read_text()) == (newest > 0)
        assert [step for step in store.steps() if store.damage(step)] == []
    assert ("merge", True) in hits or "merge" not in dict(hits), f"no kill landed in a merge: {hits}"
    assert store.steps()[-1] == STEPS
    assert train_losses(run_dir) == pytest.approx(expected, rel=2e-6)


def test_sigterm_to_the_process_group_in_a_save_ends_the_run_after_it(expected, tiny_data, tmp_path):
    """A batch system signals every process of a job: no part of a save may depend on one that dies of it."""
    run = make_run(tiny_data, tmp_path, **{"checkpoint.interval": 1})
    config, log, store = tmp_path / "run.yaml", tmp_path / "log", CheckpointStore(tmp_path / "run" / "checkpoints")
    config.write_text(to_yaml(run))
    with started([sys.executable, "-m", "poet_megatron", "pretrain", "--config", str(config)], log) as process:
        wait_for(lambda: store.path(2).exists(), process, log)
        wait_for(next_save(tmp_path / "run"), process, log)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=EXIT_SECONDS) == EXIT_SAVED, log.read_text()[-3000:]
    assert f"stopped by SIGTERM at step {store.newest_intact()};" in log.read_text()
    assert 3 <= store.newest_intact() < STEPS
    assert sorted(path.name for path in store.root.iterdir()) == [store.path(step).name for step in store.steps()]
    assert pretrain(run) == 0
    assert train_losses(tmp_path / "run") == pytest.approx(expected, rel=1e-12)
