"""Going back to the last checkpoint within a run, without going back in the data."""

from __future__ import annotations

from poet_megatron.checkpoint.io import choose_checkpoint, load_checkpoint, read_common
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.engine.base import Engine
from poet_megatron.engine.state import TrainState
from poet_megatron.guard.losses import LossGuard


def roll_back(store: CheckpointStore, engine: Engine, state: TrainState, guard: LossGuard) -> int | None:
    """Restore weights, optimizer and permutations of the newest intact checkpoint. Collective over all ranks.

    Steps, tokens, the schedule and the position in the data stay where they are: the batches since the checkpoint are passed over, the run
    ends after as many steps as before, and makes that many updates fewer.

    Args:
        store: the run's checkpoints.
        engine: what is trained.
        state: counters of the run; those of merges become the checkpoint's.
        guard: compares with the losses before the checkpoint from now on.

    Returns:
        The checkpoint's step, or None if there is no checkpoint yet; then nothing is changed.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    step = choose_checkpoint(store, "auto", engine.context.is_main)
    if step is None:
        return None
    common = read_common(store.path(step))
    schedule = engine.scheduler.num_steps
    saved = load_checkpoint(store.path(step), engine, common)
    state.merge_index, state.last_merge = saved.merge_index, saved.last_merge
    engine.scheduler.num_steps = schedule
    engine.scheduler.step(0)
    guard.rolled_back(common.get("guard", {}))
    return step
