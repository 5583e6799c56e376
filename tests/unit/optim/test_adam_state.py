"""The view of Adam's state, for engines that keep the step per parameter and per group."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from poet_megatron.optim.state import AdamState, megatron_states


class GroupStepAdam:
    """Keeps the step in the group, as Apex's and TransformerEngine's FusedAdam do, from its first step on."""

    def __init__(self, param: torch.Tensor) -> None:
        self.param_groups = [{"params": [param]}]
        self.state: dict = {param: {}}


def view(optimizer) -> AdamState:
    named = {"x": optimizer.param_groups[0]["params"][0]}
    (state,) = megatron_states(SimpleNamespace(optimizer=optimizer, param_groups=optimizer.param_groups), named).values()
    return state


@pytest.mark.parametrize("kind", ["torch", "group"])
def test_a_fresh_optimizer_takes_the_step_of_a_checkpoint(kind):
    """The bias correction of the next update must see it, wherever this engine looks."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([param]) if kind == "torch" else GroupStepAdam(param)
    state = view(optimizer)
    state.materialize()
    state.set_step(500)
    assert view(optimizer).step == 500
    held = optimizer.state[param].get("step"), optimizer.param_groups[0].get("step")
    assert (held == (None, 500)) if kind == "group" else (float(held[0]) == 500 and held[1] is None)
    state.reset_moments()
    assert view(optimizer).step == 0


def test_a_reset_parameter_updates_as_if_it_were_new():
    """AdamW's next step after reset_moments equals a new AdamW's first step, bit for bit."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2)]
    old, new = (torch.optim.AdamW([p], lr=1e-2) for p in params)
    for _ in range(3):
        params[0].grad = torch.randn(5)
        old.step()
    view(old).reset_moments()
    params[0].data.copy_(params[1].data)
    for param, optimizer in zip(params, (old, new), strict=True):
        param.grad = torch.arange(5.0)
        optimizer.step()
    assert torch.equal(params[0], params[1])
