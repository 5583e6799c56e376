"""Adam's state per model parameter, wherever the engine keeps it: fp32 masters, two moments, and the step.

torch keeps the step per parameter, Apex and TransformerEngine per parameter group; Megatron's own optimizer checkpoint refuses steps that
differ between parameters, which they do after a merge. So both merges and checkpoints go through this view.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamState:
    """State of one trainable parameter.

    Attributes:
        param: the parameter the optimizer updates: an fp32 master, or the model parameter itself.
        slots: the optimizer's state of it; moments have its shape.
        group: its parameter group.
        step_in_group: whether the engine keeps the step in the group (Apex, TransformerEngine) and not per parameter (torch).
    """

    param: Tensor
    slots: dict[str, Any]
    group: dict[str, Any]
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


def adam_states(optimizer: MegatronOptimizer) -> Iterator[AdamState]:
    """The state of every parameter the optimizer updates on this rank."""
    for inner in getattr(optimizer, "chained_optimizers", [optimizer]):
        step_in_group = not isinstance(inner.optimizer, torch.optim.Adam | torch.optim.AdamW)
        for group in inner.param_groups:
            for param in group["params"]:
                yield AdamState(param, inner.optimizer.state[param], group, step_in_group)


def state_of(optimizer: MegatronOptimizer, parameters: dict[str, torch.nn.Parameter]) -> dict[str, AdamState]:
    """State of named model parameters, {name: state}.

    Raises:
        KeyError: a parameter that this optimizer does not update.
    """
    by_id = {id(state.param): state for state in adam_states(optimizer)}
    return {name: by_id[id(getattr(parameter, "main_param", parameter))] for name, parameter in parameters.items()}
