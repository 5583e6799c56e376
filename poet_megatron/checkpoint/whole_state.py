"""Optimizer state in the shape of the parameters it belongs to, also where it is spread over ranks in flat parts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from poet_megatron.engine.base import Engine
from poet_megatron.optim.state import MOMENTS


def has_masters(engine: Engine) -> bool:
    """Whether fp32 masters of trainable parameters are part of the state (elsewhere they would repeat the parameters)."""
    return engine.run.train.precision == "bf16"


def whole_states(engine: Engine, loading: bool) -> dict[str, dict[str, Tensor]]:
    """Moments and masters of every trainable parameter of this rank, {name: {"exp_avg", "exp_avg_sq", "master"}}, whole.

    Collective over engine.state_group, where there is one: parts are summed into zeros, one parameter at a time. Elsewhere the tensors are
    the optimizer's own.

    Args:
        engine: the state of this rank.
        loading: leave the tensors uninitialized, to be loaded into.
    """
    states = engine.states()
    for state in states.values():
        state.materialize()
    keys = [*MOMENTS, "master"] if has_masters(engine) else list(MOMENTS)
    if engine.state_group is None:
        return {name: {key: state.param if key == "master" else state.slots[key] for key in keys} for name, state in states.items()}
    whole: dict[str, dict[str, Tensor]] = {}
    for name, parameter in engine.trainable().items():
        whole[name] = {key: torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device) for key in keys}
        if loading:
            continue
        mine = states.get(name)
        for key, tensor in whole[name].items():
            if mine is not None:
                mine.part_of(tensor).copy_(mine.param.detach() if key == "master" else mine.slots[key])
            dist.all_reduce(tensor, group=engine.state_group)
    return whole
