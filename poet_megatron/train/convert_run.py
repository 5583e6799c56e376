"""`poet-megatron convert`: a checkpoint of any parallel layout as a new run directory, with a checkpoint that one rank wrote."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.manifest import TOKENIZER_NAME
from poet_megatron.checkpoint.io import PARTS, read_common, save_checkpoint
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.dump import to_yaml
from poet_megatron.engine.base import Engine
from poet_megatron.engine.state import TrainState
from poet_megatron.errors import UserError
from poet_megatron.monitor.run_dir import RunDirectory
from poet_megatron.train.restore import check_one_process, checkpoints, open_run


def convert_run(run: Path, output: Path, step: int | None, report: Callable[[str], None]) -> RunDirectory:
    """Convert a checkpoint; the run that wrote it is only read, and none of its ranks is needed.

    Args:
        run: run directory.
        output: run directory to make; it appears complete or not at all.
        step: which checkpoint; the newest intact one by default.
        report: told what happens.

    Returns:
        The new run directory.

    Raises:
        UserError: several processes, an output that exists, no such run, or no intact checkpoint.
    """
    check_one_process("convert")
    store, output = checkpoints(run), output.absolute()
    with _written_aside(output) as aside:
        report(f"checking and loading {'the newest checkpoint' if step is None else f'the checkpoint of step {step}'} of {run}")
        with open_run(run, step) as (engine, state):
            common = read_common(store.path(state.step))
            report(f"loaded step {state.step}, which was written by {_described(common.get('layout'))}; writing {output}")
            _write(RunDirectory(aside), output, engine, state, {name: common[name] for name in PARTS if name in common}, run)
    return RunDirectory(output)


@contextmanager
def _written_aside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` that takes its place at the end; removed if anything goes wrong."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists; choose an --output that does not, or remove it")
    aside = output.parent / f".{output.name}.writing-{os.getpid()}"
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}; choose another --output") from error
    try:
        yield aside
        if output.is_dir():
            output.rmdir()
        aside.rename(output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(aside: RunDirectory, output: Path, engine: Engine, state: TrainState, parts: dict, source: Path) -> None:
    """Fill the run directory that becomes `output`."""
    engine.run = dataclasses.replace(engine.run, train=dataclasses.replace(engine.run.train, run_dir=str(output)))
    save_checkpoint(CheckpointStore(aside.checkpoints_path), engine, state, parts)
    aside.write_config(to_yaml(engine.run))
    aside.write_run_info()
    for name in (TOKENIZER_NAME, aside.metrics_path.name):
        if (source / name).exists():
            shutil.copyfile(source / name, aside.path / name)


def _described(layout: dict[str, int] | None) -> str:
    if layout is None:
        return "an earlier release"
    tensor, pipeline = layout["tensor_parallel"], layout["pipeline_parallel"]
    return f"{layout['ranks']} rank(s), tensor x pipeline x data parallel {tensor} x {pipeline} x {layout['ranks'] // (tensor * pipeline)}"
