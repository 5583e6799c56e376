"""Optimizer state in the shape of the parameters it belongs to, also where it is spread over ranks in flat parts.

A rank that shards the optimizer has flat parts of some parameters. Each parameter is assembled, and written, by the rank that has its first
element; since nearly all parameters lie on one rank, that is almost no communication, and no rank needs more memory than for its share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from poet_megatron.engine.base import Engine
from poet_megatron.optim.state import MOMENTS, AdamState


def has_masters(engine: Engine) -> bool:
    """Whether fp32 masters of trainable parameters are part of the state (elsewhere they would repeat the parameters)."""
    return engine.run.train.precision == "bf16"


def whole_states(engine: Engine, loading: bool) -> dict[str, dict[str, Tensor]]:
    """Moments and masters of trainable parameters, {name: {"exp_avg", "exp_avg_sq", "master"}}, in the parameters' shapes.

    Without engine.state_group they are the optimizer's own tensors, of every parameter of this rank. With it they are copies: of the
    parameters whose first element this rank has, or to be loaded into, of those that it has any part of. Collective over the group.

    Args:
        engine: the state of this rank.
        loading: leave the tensors uninitialized, to be loaded into.
    """
    states = engine.states()
    for state in states.values():
        state.materialize()
    keys = [*MOMENTS, "master"] if has_masters(engine) else list(MOMENTS)
    if engine.state_group is None:
        return {name: {key: _part(state, key) for key in keys} for name, state in states.items()}
    if not loading:
        return _assembled(engine, states, keys, engine.state_group)
    parameters = engine.trainable()
    return {name: {key: _zeros(parameters[name]) for key in keys} for name in states}


def _assembled(engine: Engine, states: Mapping[str, AdamState], keys: Sequence[str], group: ProcessGroup) -> dict[str, dict[str, Tensor]]:
    """Whole tensors of the parameters whose first element this rank has; parts of other ranks are added into zeros."""
    holders = _holders(states, group)
    whole: dict[str, dict[str, Tensor]] = {}
    for name, parameter in engine.trainable().items():
        first, *others = holders[name]
        if group.rank() != first and not others:
            continue
        tensors = {key: _zeros(parameter) for key in keys}
        for key, tensor in tensors.items():
            if name in states:
                states[name].part_of(tensor).copy_(_part(states[name], key))
            if others:
                dist.reduce(tensor, dist.get_global_rank(group, first), group=group)
        if group.rank() == first:
            whole[name] = tensors
    return whole


def _holders(states: Mapping[str, AdamState], group: ProcessGroup) -> dict[str, list[int]]:
    """The ranks of the group that have a part of each parameter, in the order of the parts."""
    gathered: list[dict[str, int]] = [{} for _ in range(group.size())]
    dist.all_gather_object(gathered, {name: state.start for name, state in states.items()}, group=group)
    holders: dict[str, list[tuple[int, int]]] = {}
    for rank, starts in enumerate(gathered):
        for name, start in starts.items():
            holders.setdefault(name, []).append((start, rank))
    return {name: [rank for _, rank in sorted(parts)] for name, parts in holders.items()}


def _part(state: AdamState, key: str) -> Tensor:
    return state.param.detach() if key == "master" else state.slots[key]


def _zeros(parameter: Tensor) -> Tensor:
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
