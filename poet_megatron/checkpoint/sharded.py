"""A run's tensors as megatron-core sharded tensors: canonical weights, skews, base parameters, fp32 masters and moments.

Weights are in feature order and, where there is an fp32 master, in fp32; optimizer state has the shape and the name of the parameter it
belongs to, so the format says nothing about the engine or the layout that wrote it. Adam's steps, one per parameter group, are plain
numbers beside the tensors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor

from poet_megatron.checkpoint.whole_state import has_masters, whole_states
from poet_megatron.engine.base import Engine
from poet_megatron.optim.merge import broadcast_weights
from poet_megatron.optim.state import MOMENTS

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(engine: Engine, loading: bool = False) -> dict[str, Any]:
    """Every tensor of the run, for dist_checkpointing.save or as the request of dist_checkpointing.load. Collective.

    Args:
        engine: the state of this rank.
        loading: whether the values do not matter, because they are about to be loaded.
    """
    models = {f"model{index}": entries for index, entries in enumerate(_model_states(engine))}
    by_tensor = {id(entry.data): entry for entries in models.values() for entry in entries.values()}
    optimizer: dict[str, dict[str, Any]] = {}
    states, parameters = engine.states(), engine.trainable()
    for name, tensors in whole_states(engine, loading).items():
        entry = by_tensor[id(parameters[name])]
        if engine.state_group is not None:  # of the replicas, the one that has the first element answers for the tensor
            entry = replace(entry, replica_id=(*entry.replica_id[:-1], int(states[name].start > 0)))
        optimizer[name] = {key: make_sharded_optimizer_tensor(entry, tensor, f"optimizer.{key}") for key, tensor in tensors.items()}
    return {**models, "optimizer": optimizer}


def load_tensors(engine: Engine, loaded: dict[str, Any]) -> None:
    """Copy what dist_checkpointing.load returned into the model and the optimizer; permutations must already be those of the checkpoint.

    Collective over data-parallel ranks.
    """
    for index, chunk in enumerate(engine.chunks):
        missing, unexpected = chunk.load_state_dict(loaded[f"model{index}"], strict=False)
        elsewhere = {f"{name}.weight" for name, module in chunk.named_modules() if getattr(module, "master_elsewhere", False)}
        missing = [name for name in missing if not name.endswith("_extra_state") and name not in elsewhere]
        if missing or unexpected:
            raise RuntimeError(f"the checkpoint and the model differ: missing {missing}, unexpected {unexpected}")
    broadcast_weights(engine.chunks, parallel_state.get_data_parallel_group())
    parameters = engine.trainable()
    for name, state in engine.states().items():
        state.materialize()
        tensors: dict[str, Tensor] = loaded["optimizer"][name]
        for moment in MOMENTS:
            state.slots[moment].copy_(state.part_of(tensors[moment]))
        if state.param is not parameters[name]:
            master = tensors["master"] if has_masters(engine) else parameters[name].detach()
            state.param.data.copy_(state.part_of(master))


def adam_steps(engine: Engine) -> dict[str, int]:
    """Adam's step of each parameter group, {"base": ..., "poet": ...}, the same on every rank. Collective."""
    mine = {_group(name): state.step for name, state in engine.states().items()}
    gathered: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, mine)
    return {group: step for steps in gathered for group, step in steps.items()}


def set_adam_steps(engine: Engine, steps: dict[str, int]) -> None:
    """Restore what `adam_steps` returned."""
    for name, state in engine.states().items():
        state.materialize()
        state.set_step(steps[_group(name)])


def _group(name: str) -> str:
    return "poet" if name.endswith(".skew") else "base"


def _model_states(engine: Engine) -> list[dict[str, Any]]:
    metadata = {**METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    states = [chunk.sharded_state_dict(metadata=metadata) for chunk in engine.chunks]
    return [{name: entry for name, entry in state.items() if not name.endswith("_extra_state")} for state in states]
