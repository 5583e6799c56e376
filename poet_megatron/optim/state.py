"""Adam's state per model parameter, wherever the engine keeps it: fp32 masters, two moments, and the step.

torch keeps the step per parameter, Apex and TransformerEngine per parameter group; sharded optimizers keep a flat part of some parameters
and nothing of others; Megatron's own optimizer checkpoint refuses steps that differ between parameters, which they do after a merge. So
both merges and checkpoints go through this view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamState:
    """State of one trainable parameter, or of the flat part of it that this rank updates.

    Attributes:
        param: what the optimizer updates: an fp32 master, or the model parameter itself; whole, or a flat part.
        slots: the optimizer's state of it; moments have its shape.
        group: its parameter group.
        start: first element of the flattened model parameter.
        stop: end of the range of elements.
        step_in_group: whether the engine keeps the step in the group (Apex, TransformerEngine) and not per parameter (torch).
    """

    param: Tensor
    slots: dict[str, Any]
    group: dict[str, Any]
    start: int
    stop: int
    step_in_group: bool = False

    @property
    def step(self) -> int:
        """Adam steps taken."""
        return int((self.group if self.step_in_group else self.slots).get("step", 0))

    def set_step(self, step: int) -> None:
        """Set the Adam step, in whichever place this engine keeps it."""
        holder = self.group if self.step_in_group else self.slots
        current = holder.get("step")
        if isinstance(current, Tensor):
            current.fill_(step)
        else:
            holder["step"] = step if self.step_in_group else torch.tensor(float(step))

    def materialize(self) -> None:
        """Create zero moments where the optimizer has not stepped yet."""
        for moment in MOMENTS:
            if moment not in self.slots:
                self.slots[moment] = torch.zeros_like(self.param)
        if "step" not in (self.group if self.step_in_group else self.slots):
            self.set_step(0)

    def reset_moments(self) -> None:
        """Zero both moments and the step: the next update is a first update."""
        for moment in MOMENTS:
            if moment in self.slots:
                self.slots[moment].zero_()
        if self.slots:
            self.set_step(0)

    def part_of(self, whole: Tensor) -> Tensor:
        """The elements of a tensor of the model parameter's shape that this state is about, in the shape of `param`."""
        return whole.reshape(-1)[self.start : self.stop].view(self.param.shape)


def megatron_states(optimizer: MegatronOptimizer, parameters: dict[str, nn.Parameter]) -> dict[str, AdamState]:
    """State of named model parameters in Megatron's optimizers, {name: state}; parameters that other ranks update are left out."""
    states: dict[str, AdamState] = {}
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        names = {id(parameter): name for name, parameter in parameters.items()}
        entries = _sharded_entries(inner, names) if isinstance(inner, DistributedOptimizer) else _whole_entries(inner, parameters)
        step_in_group = not isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW)
        for name, param, group, start, stop in entries:
            states[name] = AdamState(param, inner.optimizer.state[param], group, start, stop, step_in_group)
    return states


Entry = tuple[str, Tensor, dict[str, Any], int, int]


def _whole_entries(inner: MegatronOptimizer, parameters: dict[str, nn.Parameter]) -> Iterator[Entry]:
    names = {id(getattr(parameter, "main_param", parameter)): name for name, parameter in parameters.items()}
    for group in inner.param_groups:
        for param in group["params"]:
            if name := names.get(id(param)):
                yield name, param, group, 0, param.numel()


def _sharded_entries(inner: DistributedOptimizer, names: dict[int, str]) -> Iterator[Entry]:
    for parameter, (group_index, order) in inner.model_param_group_index_map.items():
        if name := names.get(id(parameter)):
            group = inner.optimizer.param_groups[group_index]
            part = inner._get_model_param_range_map(parameter)["param"]
            yield name, group["params"][order], group, part.start, part.end
