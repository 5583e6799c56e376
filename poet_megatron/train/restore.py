"""Opening a run's checkpoint on data-parallel ranks (usually one), to evaluate, convert or export it, whatever layout wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poet_megatron.checkpoint.io import CONFIG_NAME, choose_checkpoint, load_checkpoint, read_common
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.engine.base import Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.engine.state import TrainState
from poet_megatron.errors import UserError
from poet_megatron.monitor.run_dir import RunDirectory
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import launched_ranks, parallel_context, seed_rng


@contextmanager
def open_run(path: Path, step: int | None) -> Iterator[tuple[Engine, TrainState]]:
    """Load a checkpoint of a run directory with the settings it was written with, but those of the layout.

    Args:
        path: run directory.
        step: which checkpoint; the newest intact one by default.

    Raises:
        UserError: no such run, or no intact checkpoint.
    """
    store = checkpoints(path)
    with parallel_context(ParallelConfig(), 0) as context:
        chosen = choose_checkpoint(store, "must", context.is_main, step)
        assert chosen is not None
        run = data_parallel_only(load_config(store.path(chosen) / CONFIG_NAME), context.data_size)
        seed_rng(run.train.seed)
        engine = build_engine(run, context)
        yield engine, load_checkpoint(store.path(chosen), engine, read_common(store.path(chosen)))


def checkpoints(path: Path) -> CheckpointStore:
    """The checkpoints of a run directory; UserError if there are none."""
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the run directory of a pretraining (train.run_dir)")
    store = CheckpointStore(RunDirectory(path).checkpoints_path)
    if not store.steps():
        raise UserError(f"{path} holds no complete checkpoint; has the run saved one (checkpoint.interval)?")
    return store


def data_parallel_only(run: RunConfig, replicas: int) -> RunConfig:
    """`run` with whole models on `replicas` ranks; the global batch is kept where it can be divided among them."""
    batch = run.train.micro_batch_size * replicas
    if run.train.global_batch_size % batch:
        run = dataclasses.replace(run, train=dataclasses.replace(run.train, global_batch_size=batch))
    kept = {name: getattr(run.parallel, name) for name in ("recompute", "check_replicas", "timeout_minutes")}
    return dataclasses.replace(run, engine="megatron", parallel=ParallelConfig(**kept))


def check_one_process(command: str) -> None:
    """Raise UserError if a launcher started more than one process of a command that writes files as one."""
    if launched_ranks() > 1:
        raise UserError(f"`poet-megatron {command}` runs in one process and was started in {launched_ranks()}: start it without torchrun")
