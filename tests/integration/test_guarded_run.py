"""Runs that skip, roll back, run out of time, out of disk or out of restarts: one rank, against what is put together by hand."""

from __future__ import annotations

import errno
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import TINY
from torch.distributed.checkpoint import FileSystemReader

from poet_megatron.checkpoint import room
from poet_megatron.checkpoint.io import load_checkpoint, read_common
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.data.prepared import PreparedData
from poet_megatron.data.train_data import TrainBatches, build_train_dataset
from poet_megatron.engine.build import build_engine
from poet_megatron.engine.megatron import MegatronEngine
from poet_megatron.errors import EXIT_SAVED, EXIT_USER_ERROR, UserError
from poet_megatron.guard.config import GuardConfig
from poet_megatron.guard.losses import SKIP, LossGuard
from poet_megatron.monitor.run_dir import BatchJob, RunDirectory
from poet_megatron.optim.merge import clip_threshold, merge_model
from poet_megatron.parallel.context import parallel_context
from poet_megatron.train.run import pretrain
from poet_megatron.train.step import train_step

ROOT = Path(__file__).parents[2]


def batches_of(run, context) -> TrainBatches:
    prepared = PreparedData.open(run.data.path, run.model.vocab_size, run.model.seq_length)
    samples = run.train.steps * run.train.global_batch_size
    dataset = build_train_dataset(prepared, seq_length=run.model.seq_length, samples=samples, seed=run.train.seed)
    return TrainBatches(dataset, micro_batch_size=run.train.micro_batch_size, dp_rank=0, dp_size=1, global_batch_size=4)


def spoilt(*steps: int):
    """The loss of these steps is not a number, in every attempt."""
    accumulate = MegatronEngine.accumulate
    calls = iter(range(1, 1000))

    def spoil(engine, batches):
        losses = accumulate(engine, batches)
        return [entry * torch.tensor([math.nan, 1.0]) for entry in losses] if next(calls) in steps else losses

    return mock.patch.object(MegatronEngine, "accumulate", spoil)


def test_a_skipped_step_changes_nothing_but_the_schedule(tiny_run):
    run = tiny_run()
    guard = LossGuard(GuardConfig(on_nonfinite=SKIP))
    with parallel_context(run.parallel, run.train.seed) as context, spoilt(3):
        engine, data = build_engine(run, context), batches_of(run, context)
        for step in range(2):
            train_step(engine, data.micro_batches(step), 1.0, guard)
        before = [parameter.detach().clone() for parameter in engine.chunks[0].parameters()]
        moments = {name: state.slots["exp_avg"].clone() for name, state in engine.states().items()}
        result = train_step(engine, data.micro_batches(2), 1.0, guard)
        assert not result.updated and math.isnan(result.loss) and math.isnan(result.grad_norm)
        assert all(torch.equal(old, new) for old, new in zip(before, engine.chunks[0].parameters(), strict=True))
        assert all(torch.equal(state.slots["exp_avg"], moments[name]) and state.step == 2 for name, state in engine.states().items())
        assert engine.scheduler.num_steps == 3


def test_every_micro_batch_is_progress(tiny_run):
    """Two of them, when loaded and when begun: a step may last longer than the watchdog waits."""
    run, beats = tiny_run(), []
    with parallel_context(run.parallel, run.train.seed) as context:
        engine, data = build_engine(run, context), batches_of(run, context)
        train_step(engine, data.micro_batches(), 1.0, beat=lambda: beats.append(len(beats)))
    assert data.num_microbatches == 2 and len(beats) == 4


def test_a_rollback_across_a_merge_is_a_resumed_run_on_later_data(tiny_run, losses):
    """Checkpoints of steps 6 and 12, merges after 5, 10, ...; step 11 goes wrong. By hand: the weights of step 6, merged once, go on
    with the data and the schedule of step 12, and are merged with step 15. Every bit of the losses is the same."""
    settings = {"poet.merge_interval": "5", "checkpoint.interval": "6", "checkpoint.keep_last": "9", "train.steps": "18"}
    run = tiny_run("run", {**settings, "guard.on_nonfinite": "rollback", "train.stop_at_step": "16"})
    with spoilt(11):
        assert pretrain(run) == 0
    found = losses(run.train.run_dir)
    store = CheckpointStore(Path(run.train.run_dir) / "checkpoints")
    assert {step: read_common(store.path(step))["state"]["merge_index"] for step in store.steps()} == {6: 1, 12: 1, 16: 2}
    expected = []
    with parallel_context(run.parallel, run.train.seed) as context:
        engine, data = build_engine(run, context), batches_of(run, context)
        state = load_checkpoint(store.path(6), engine, read_common(store.path(6)))
        engine.scheduler.num_steps = 11
        engine.scheduler.step(0)
        for step in range(12, 17):
            clip = clip_threshold(step, state.last_merge, run.optim.clip_grad, run.poet)
            expected.append(train_step(engine, data.micro_batches(step - 1), clip).loss)
            if step == 15:
                merge_model(engine.chunks, engine.states(), run.poet, torch.distributed.group.WORLD)
                state.last_merge = 15
    assert [found[step] for step in range(12, 17)] == expected


def test_a_run_that_skipped_resumes_as_if_it_had_not_stopped(tiny_run, losses, capsys):
    """The count of interventions and the losses to compare with are in the checkpoint."""
    settings = {"guard.on_nonfinite": "skip", "guard.max_interventions": "2", "train.steps": "12", "checkpoint.interval": "0"}
    with spoilt(2, 4):
        pretrain(tiny_run("straight", settings))
        straight = losses(tiny_run("straight").train.run_dir)
    with spoilt(2, 4):
        pretrain(tiny_run("stopped", {**settings, "train.stop_at_step": "6"}))
    pretrain(tiny_run("stopped", settings))
    assert losses(tiny_run("stopped").train.run_dir) == straight
    with spoilt(2, 4):
        pretrain(tiny_run("third", {**settings, "train.stop_at_step": "6"}))
    with spoilt(1), pytest.raises(UserError, match="after 2 skips and rollbacks"):
        pretrain(tiny_run("third", settings))


def test_rollback_before_the_first_checkpoint_skips(tiny_run, losses, capsys):
    settings = {"checkpoint.interval": "0", "train.steps": "4"}
    for name, policy in (("a", "rollback"), ("b", "skip")):
        with spoilt(2):
            pretrain(tiny_run(name, {**settings, "guard.on_nonfinite": policy}))
    assert "the batch is skipped, as there is no checkpoint to go back to yet" in capsys.readouterr().out
    assert losses(tiny_run("a").train.run_dir) == losses(tiny_run("b").train.run_dir)


def test_a_time_limit_saves_and_leaves(tiny_run, losses, capsys):
    """After the first step that ends late; the same command goes on from there."""
    run = tiny_run("limited", {"train.exit_minutes": "1e-6", "train.steps": "3", "checkpoint.interval": "0"})
    assert [pretrain(run) for _ in range(4)] == [EXIT_SAVED, EXIT_SAVED, EXIT_SAVED, 0]
    assert "stopped by train.exit_minutes at step 1; the same command continues" in capsys.readouterr().out
    pretrain(tiny_run("free", {"train.steps": "3"}))
    assert losses(run.train.run_dir) == losses(tiny_run("free").train.run_dir)


def test_a_job_that_makes_no_progress_is_not_started_for_ever(tiny_run, capsys):
    """The disk is gone in step 3 of every start; a checkpoint would have come after step 5."""
    run = tiny_run("run", {"train.steps": "8", "checkpoint.interval": "5", "guard.max_idle_restarts": "2"})
    broken = mock.patch.object(TrainBatches, "micro_batches", side_effect=OSError("the disk is gone"))
    with broken:
        for restarts in range(3):
            with pytest.raises(OSError, match="the disk is gone"):
                pretrain(run, BatchJob("slurm 7", restarts))
        with pytest.raises(UserError, match=r"job slurm 7 made no progress in 2 restarts .*: each began at step 0 ") as stopped:
            pretrain(run, BatchJob("slurm 7", 3))
    assert stopped.value.exit_status == EXIT_USER_ERROR
    assert pretrain(run, BatchJob("slurm 8", 0)) == 0  # submitted anew, and the disk is there again


@pytest.mark.parametrize(
    ("starts", "job", "step", "refused"),
    [
        ([("a", n, 0) for n in range(4)], ("a", 4), 0, True),
        ([("a", n, 0) for n in range(3)], ("a", 3), 0, False),  # the third restart
        ([("a", n, 0) for n in range(4)], ("a", 0), 0, False),  # not a restart: numbers of jobs come again
        ([("a", n, 0) for n in range(4)], ("a", 4), 5, False),  # a checkpoint has been written
        ([("a", 0, 0), ("a", 1, 5), ("a", 2, 0)], ("a", 5), 0, False),  # it fell back to an older one
        ([("a", 0, 0), ("a", 1, 5), ("a", 2, 0)], ("a", 6), 0, True),
        ([("a", 0, 0), ("b", 0, 0), ("a", 1, 0)], ("a", 4), 0, True),  # two starts ended before they could be written down
        ([(None, 0, 0)] * 4, ("a", 4), 0, False),
    ],
)
def test_which_restart_is_one_too_many(tmp_path, starts, job, step, refused):
    directory = RunDirectory(tmp_path)
    for name, restarts, resumed_from in starts:
        directory.write_run_info(["x"], resumed_from, BatchJob(name, restarts) if name else None)
    check = lambda most: directory.check_progress(BatchJob(*job), step, most)  # noqa: E731
    if refused:
        with pytest.raises(UserError, match="made no progress in 3 restarts"):
            check(3)
    else:
        check(3)
    check(0)


# -- disks --


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 9 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9000k", "tmpfs", str(folder)]).returncode == 0
    if not mounted:
        pytest.skip("no file system can be mounted here: this needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny_run, small_disk: Path, tiny_data, capsys):
    """One checkpoint fits, a second one beside it does not; when there is room again, the next one is written."""
    run = tiny_run(
        "run", {"train.run_dir": str(small_disk / "run"), "checkpoint.interval": "2", "train.steps": "8", "train.stop_at_step": "7"}
    )
    filler = small_disk / "filler"
    save, calls = CheckpointStore.begin, iter(range(1, 9))

    def begin(store: CheckpointStore, step: int) -> Path:
        number = next(calls)
        if number == 2:
            filler.write_bytes(bytes(small_disk_free(small_disk) - 1_500_000))
        if number == 3:
            filler.unlink()
        return save(store, step)

    with mock.patch.object(CheckpointStore, "begin", begin):
        assert pretrain(run) == 0
    output = capsys.readouterr().out
    assert "warning: the checkpoint of step 4 could not be written (rank 0: no room for a checkpoint of " in output
    assert "MB are missing); the last one is of step 2. Training goes on; failure 1 of checkpoint.max_failures 3" in output
    store = CheckpointStore(small_disk / "run" / "checkpoints")
    assert sorted(path.name for path in store.root.iterdir()) == ["step-00000006", "step-00000007"]
    filler.write_bytes(bytes(small_disk_free(small_disk) - 1_500_000))
    with pytest.raises(UserError, match="the checkpoint of step 8 could not be written .* are missing.*; the last one is of step 7"):
        pretrain(tiny_run("run", {"train.run_dir": str(small_disk / "run"), "checkpoint.interval": "2", "train.steps": "8"}))
    assert store.newest_intact() == 7
    assert sorted(path.name for path in store.root.iterdir()) == ["step-00000006", "step-00000007"]


def test_a_signal_during_a_save_that_fails_saves_in_the_next_step(tiny_run, capsys):
    """It asked for a checkpoint: the run must not leave with status 75 and without one."""
    run = tiny_run("run", {"train.steps": "9", "checkpoint.interval": "2"})
    begin, calls = CheckpointStore.begin, iter(range(1, 9))

    def fails_once(store: CheckpointStore, step: int) -> Path:
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return begin(store, step)

    with mock.patch.object(CheckpointStore, "begin", fails_once):
        assert pretrain(run) == EXIT_SAVED
    assert "failure 1 of checkpoint.max_failures 3" in capsys.readouterr().out
    assert CheckpointStore(Path(run.train.run_dir) / "checkpoints").steps() == [3]


def test_no_room_is_said_in_numbers(tmp_path):
    usage = shutil.disk_usage(tmp_path)._replace(free=3_000_000)
    with mock.patch.object(shutil, "disk_usage", return_value=usage):
        room.check_room(tmp_path / "x", 1_900_000)
        with pytest.raises(room.CheckpointError, match=r"no room for a checkpoint of 2.5 MB in .*: 3.0 MB are free, 0.5 MB are missing"):
            room.check_room(tmp_path / "x", 2_500_000)


def test_a_lost_disk_is_an_error_of_the_checkpoint(tiny_run):
    """Not of the cleaning up after it."""
    run = tiny_run("run", {"train.steps": "3", "checkpoint.interval": "0"})
    lost = mock.MagicMock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO)))
    with (
        mock.patch.object(CheckpointStore, "abandon", lost),
        mock.patch.object(CheckpointStore, "steps", lambda store: [] if not lost.called else lost()),
        pytest.raises(UserError, match=r"the checkpoint of step 3 could not be written \(rank 0: Input/output error\)$"),
    ):
        pretrain(run)


def small_disk_free(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def test_every_tensor_of_a_checkpoint_is_in_its_index(tiny_run):
    """torch's writer loses what a second thread could not write, without an error; ours has none."""
    run = tiny_run("run", {"train.steps": "1"})
    pretrain(run)
    index = FileSystemReader(Path(run.train.run_dir) / "checkpoints" / "step-00000001").read_metadata()
    assert {entry.fqn for entry in index.storage_data} == set(index.state_dict_metadata)
    assert len({entry.relative_path for entry in index.storage_data.values()}) == 1


def test_the_command_line_gives_the_status(tiny_data, tmp_path):
    """A hang limit that cannot be first is refused; a run that is out of time ends with 75."""
    settings = {**TINY, "data.path": str(tiny_data), "train.run_dir": str(tmp_path / "run"), "train.exit_minutes": "1e-6"}
    words = [sys.executable, "-m", "poet_megatron", "pretrain", *(f"--{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "41"}
    assert subprocess.run(words, env=environment, capture_output=True, timeout=240).returncode == EXIT_SAVED
    assert RunDirectory(tmp_path / "run").read_run_info()[-1]["job"] == "slurm 41"
    refused = subprocess.run([*words, "--guard.hang_minutes=10"], env=environment, capture_output=True, text=True, timeout=240)
    assert refused.returncode == EXIT_USER_ERROR
    assert "guard.hang_minutes is 10; it must be less than parallel.timeout_minutes = 10.0" in refused.stderr
