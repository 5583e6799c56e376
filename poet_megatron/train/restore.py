"""Opening a run's checkpoint on data-parallel ranks (usually one), to evaluate, convert or export it, whatever layout wrote it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from poet_megatron.checkpoint.io import CONFIG_NAME, choose_checkpoint, load_checkpoint, read_common
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.load import load_config
from poet_megatron.engine.base import Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.engine.state import TrainState
from poet_megatron.errors import UserError
from poet_megatron.monitor.run_dir import RunDirectory
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import parallel_context


@contextmanager
def open_run(path: Path, step: int | None) -> Iterator[tuple[Engine, TrainState]]:
    """Load a checkpoint of a run directory with the settings it was written with.

    Args:
        path: run directory.
        step: which checkpoint; the newest intact one by default.

    Raises:
        UserError: no such run, or no intact checkpoint.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist; give the run directory of a pretraining (train.run_dir)")
    store = CheckpointStore(RunDirectory(path).checkpoints_path)
    if not store.steps():
        raise UserError(f"{path} holds no complete checkpoint; has the run saved one (checkpoint.interval)?")
    newest = store.path(step if step in store.steps() else store.steps()[-1])
    seed = load_config(newest / CONFIG_NAME).train.seed
    with parallel_context(ParallelConfig(), seed) as context:
        chosen = choose_checkpoint(store, "must", context.is_main, step)
        assert chosen is not None
        run = load_config(store.path(chosen) / CONFIG_NAME)
        run = dataclasses.replace(
            run,
            engine="megatron",
            parallel=ParallelConfig(),
            train=dataclasses.replace(run.train, global_batch_size=run.train.micro_batch_size * context.data_size),
        )
        engine = build_engine(run, context)
        yield engine, load_checkpoint(store.path(chosen), engine, read_common(store.path(chosen)))
