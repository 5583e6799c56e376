"""The checks of `poet-megatron launch`, those of the run directory included, which know checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.load import load_config
from poet_megatron.config.resume import forbidden_changes
from poet_megatron.config.run import RunConfig
from poet_megatron.errors import UserError
from poet_megatron.launch import check
from poet_megatron.launch.jobs import Job, Request
from poet_megatron.launch.record import earlier_jobs
from poet_megatron.launch.slurm import Slurm
from poet_megatron.monitor.run_dir import RunDirectory

Check = tuple[str, Callable[[], str]]


def all_checks(request: Request, runs: Mapping[Path, RunConfig], slurm: Slurm, partition: str | None) -> list[Check]:
    """Every check of a request, by name; those that need Slurm only where it is.

    Args:
        request: what is to be submitted.
        runs: settings of every run by its directory.
        slurm: the cluster.
        partition: the one of the jobs with GPUs; the default one if None.
    """
    size = (request.nodes, request.gpus_per_node)
    first = next(iter(runs.values()))
    text = request.text
    checks: list[Check] = [("layout", lambda: _layouts(runs, *size))]
    if slurm.available:
        checks.append(("cluster", lambda: check.check_cluster(slurm.partition(partition), *size, request.time)))
        if request.points:
            checks.append(("array", lambda: _array(slurm, "--sweep", len(request.points))))
        if text:
            checks.append(("array", lambda: _array(slurm, "--tokenize-tasks", text.tasks)))
        checks.append(("queue", lambda: _queue(slurm, request.run_dir)))
    checks.append(("data", (lambda: check.check_text(first, text)) if text else (lambda: check.check_data(first))))
    checks.append(("run", lambda: _run_directories(runs)))
    return checks


def sbatch_checks(jobs: list[Job], slurm: Slurm) -> list[Check]:
    """`sbatch --test-only` of every job."""
    return [("sbatch", partial(_test, slurm, job)) for job in jobs]


def _layouts(runs: Mapping[Path, RunConfig], nodes: tuple[int, int], gpus: int) -> str:
    found = []
    for path, run in runs.items():
        try:
            found.append(check.check_layouts(run, nodes, gpus))
        except UserError as error:
            raise UserError(f"{path.name}: {error}" if len(runs) > 1 else str(error)) from None
    return found[0]


def _array(slurm: Slurm, option: str, tasks: int) -> str:
    return check.check_array(tasks, option, slurm.max_array_size())


def _queue(slurm: Slurm, run_dir: Path) -> str:
    """Two jobs must not train one run."""
    alive = slurm.alive(earlier_jobs(run_dir))
    if alive:
        shown = ", ".join(f"{job} ({state})" for job, state in alive.items())
        raise UserError(
            f"train.run_dir {run_dir} has jobs already: {shown}; wait for them, cancel them (scancel {' '.join(map(str, alive))}), "
            "or set another train.run_dir"
        )
    return f"no job of {run_dir} waits or runs"


def _test(slurm: Slurm, job: Job) -> str:
    said = slurm.test(job.words({}))
    return f"{job.name}: {said.removeprefix('sbatch: ').splitlines()[-1] if said else 'accepted'}"


def _run_directories(runs: Mapping[Path, RunConfig]) -> str:
    found = [_run_directory(path, run) for path, run in runs.items()]
    return found[0] if len(found) == 1 else f"{len(found)} runs; {found[0]}"


def _run_directory(path: Path, run: RunConfig) -> str:
    """The directory must be writable, not in use, and not another model's."""
    if path.is_dir():
        directory = RunDirectory(path)
        directory.acquire()
        directory.release()
    else:
        _check_writable(path)
    store = CheckpointStore(RunDirectory(path).checkpoints_path)
    if not store.steps():
        return f"{path}: starts from the beginning"
    step = store.steps()[-1]
    _check_same_model(store.path(step), run)
    return f"{path}: continues from step {step} of {run.train.steps}"


def _check_writable(path: Path) -> None:
    parent = next(found for found in path.parents if found.exists())
    if not parent.is_dir() or path.exists() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"train.run_dir {path} cannot be written ({path if path.exists() else parent} is in the way); choose another")


def _check_same_model(checkpoint: Path, run: RunConfig) -> None:
    """As pretraining does when it starts."""
    if fatal := forbidden_changes(load_config(checkpoint / "config.yaml"), run):
        raise UserError(
            f"{checkpoint} was written by another model and cannot continue with: {'; '.join(fatal)}; undo the change or choose "
            "another train.run_dir"
        )
