"""Saving and resuming a run through megatron-core's distributed checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from poet_megatron.checkpoint.rng import rng_state, set_rng_state
from poet_megatron.checkpoint.room import CheckpointError, agree, bytes_to_write, check_room
from poet_megatron.checkpoint.safety import check_metadata
from poet_megatron.checkpoint.sharded import adam_steps, load_tensors, set_adam_steps, sharded_state
from poet_megatron.checkpoint.store import CheckpointStore, Checksums
from poet_megatron.checkpoint.writer import split, write_common, write_tensors
from poet_megatron.config.dump import to_yaml
from poet_megatron.engine.base import Engine
from poet_megatron.engine.state import TrainState
from poet_megatron.errors import UserError
from poet_megatron.ops.philox import ALGORITHM_VERSION
from poet_megatron.optim.merge import set_merge_index

FORMAT_VERSION = 1
CONFIG_NAME = "config.yaml"
PARTS = ("data", "guard")
"""What the training loop adds to a checkpoint: position in the data, and the loss guard's memory (not in older checkpoints)."""


def save_checkpoint(store: CheckpointStore, engine: Engine, state: TrainState, parts: Mapping[str, Any]) -> Path:
    """Write the whole state of the run; it appears under its final name only when every rank's part is on disk. Collective.

    Args:
        store: the run's checkpoints.
        engine: model, optimizer, schedule.
        state: counters of the run.
        parts: what else continues, by the names of PARTS, as plain data that is the same on every rank.

    Raises:
        CheckpointError: on every rank, with the same message, if any rank could not write; nothing is left of the checkpoint.
    """
    try:
        return _save(store, engine, state, parts)
    except CheckpointError as error:
        last = [""]
        if engine.context.is_main:
            with suppress(OSError):  # the disk that failed; the next save clears up
                store.abandon()
            with suppress(OSError):
                last[0] = f"; the last one is of step {max(steps)}" if (steps := store.steps()) else "; there is none yet"
        dist.broadcast_object_list(last, src=0)
        raise CheckpointError(f"the checkpoint of step {state.step} could not be written ({error}){last[0]}") from error


def _save(store: CheckpointStore, engine: Engine, state: TrainState, parts: Mapping[str, Any]) -> Path:
    """Write a checkpoint in steps; after each, ranks learn of any that failed, so that none waits for another one."""
    context, staging = engine.context, store.staging(state.step)
    whole = sharded_state(engine)
    needed = bytes_to_write(whole, context.device)
    tensors, common = split({**whole, "common": {**_common(engine, state), **parts}})
    checksums: Checksums = {}

    def begin() -> None:
        if context.is_main:
            check_room(store.begin(state.step), needed)
            write_common(common, staging)
            (staging / CONFIG_NAME).write_text(to_yaml(engine.run), encoding="utf-8")

    def finish_files() -> None:
        torch.save(rng_state(), staging / f"rng-{context.rank}.pt")
        checksums.update(store.checksums(state.step, context.rank))

    agree(context, begin)
    agree(context, lambda: write_tensors(tensors, staging))
    agree(context, finish_files)
    gathered = _gather(checksums)
    agree(context, lambda: store.commit(state.step, gathered) if context.is_main else None)
    return store.path(state.step)


def _gather(mine: Checksums) -> Checksums:
    """Checksums of the files of all ranks; a rank on another machine may not see them all yet."""
    gathered: list[Checksums] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    return {name: entry for checksums in gathered for name, entry in checksums.items()}


def choose_checkpoint(store: CheckpointStore, resume: str, is_main: bool, step: int | None = None) -> int | None:
    """Step of the checkpoint to continue from, the same on every rank, or None to start afresh.

    Args:
        store: the run's checkpoints.
        resume: "auto", "never" or "must" (checkpoint.resume).
        is_main: only this rank reads the files.
        step: a particular step instead of the newest intact one.

    Raises:
        UserError: `never` with a checkpoint there, `must` (or `step`) without an intact one, or no intact one among those there.
    """
    answer: list[Any] = [None, None]
    if is_main:
        try:
            answer[0] = _choose(store, resume, step)
        except UserError as error:
            answer[1] = str(error)
    dist.broadcast_object_list(answer, src=0)
    if answer[1]:
        raise UserError(answer[1])
    return answer[0]


def _choose(store: CheckpointStore, resume: str, step: int | None) -> int | None:
    steps = store.steps()
    if resume == "never" and steps:
        raise UserError(
            f"{store.root} holds checkpoints of steps {steps} and checkpoint.resume is never: delete them or choose another train.run_dir"
        )
    if step is not None:
        if step not in steps:
            raise UserError(f"there is no checkpoint of step {step} in {store.root}; it has {steps or 'none'}")
        if damage := store.damage(step):
            raise UserError(f"the checkpoint of step {step} in {store.root} is damaged: {damage}")
        return step
    found = store.newest_intact()
    if found is None and (steps or resume == "must"):
        raise UserError(
            f"{store.root} holds no intact checkpoint"
            + (f" (damaged: {steps})" if steps else "; start the run without checkpoint.resume must")
        )
    return found


def read_common(path: Path) -> dict[str, Any]:
    """The plain part of a checkpoint: counters, versions, Adam's steps, position in the data.

    Raises:
        UserError: a file that is not to be trusted, or a format newer than this release.
    """
    check_metadata(path / ".metadata")
    common = dist_checkpointing.load_common_state_dict(str(path))["common"]
    for name, newest in (("format_version", FORMAT_VERSION), ("philox_version", ALGORITHM_VERSION)):
        if common[name] > newest:
            raise UserError(f"{path} has {name} {common[name]}; this release reads up to {newest}: upgrade poet-megatron")
    return common


def load_checkpoint(path: Path, engine: Engine, common: dict[str, Any]) -> TrainState:
    """Restore the whole state of a run from a complete checkpoint.

    The permutations of the checkpoint's merge index are drawn first; then the canonical weights are stored in their order. Random-number
    state belongs to a rank of a layout: in another layout ranks keep the state that the seed gave them (see checkpoint.rng).

    Args:
        path: a checkpoint directory, written in any layout.
        engine: built from the same model and method.
        common: `read_common(path)`.

    Raises:
        CheckpointingException: the model and the checkpoint do not have the same tensors.
    """
    set_merge_index(engine.chunks, common["state"]["merge_index"])
    load_tensors(engine, dist_checkpointing.load(sharded_state(engine, loading=True), str(path), strict=StrictHandling.RAISE_ALL))
    set_adam_steps(engine, common["adam_steps"])
    engine.scheduler.num_steps = common["scheduler_steps"]
    engine.scheduler.step(0)
    if common.get("layout") == _layout(engine):
        set_rng_state(torch.load(path / f"rng-{engine.context.rank}.pt", weights_only=True))
    return TrainState(**common["state"])


def _common(engine: Engine, state: TrainState) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "philox_version": ALGORITHM_VERSION,
        "state": asdict(state),
        "adam_steps": adam_steps(engine),
        "scheduler_steps": engine.scheduler.num_steps,
        "layout": _layout(engine),
    }


def _layout(engine: Engine) -> dict[str, int]:
    parallel = engine.run.parallel
    return {
        "ranks": engine.context.world_size,
        "tensor_parallel": parallel.tensor_parallel,
        "pipeline_parallel": parallel.pipeline_parallel,
    }
