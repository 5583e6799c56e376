"""One optimizer step: micro-batches forward and backward, a check that everything is finite, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from poet_megatron.engine.base import Batch, Engine
from poet_megatron.errors import UserError


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; no parameter was updated with it."""

    exit_status = 3


@dataclass(frozen=True)
class StepResult:
    """What one step reports, the same on every rank.

    Attributes:
        loss: mean loss over the global batch's tokens.
        tokens: tokens of the global batch that count in the loss.
        grad_norm: global gradient norm before clipping.
    """

    loss: float
    tokens: int
    grad_norm: float


def train_step(engine: Engine, batches: Iterable[Batch], clip_grad: float) -> StepResult:
    """Take one optimizer step. Collective over all ranks.

    Args:
        engine: what is trained.
        batches: this rank's micro-batches of the step.
        clip_grad: gradient clipping threshold of this step; 0 disables clipping.

    Raises:
        NonFiniteError: on every rank, before any update, if the loss or a gradient is not finite on one of them.
    """
    losses = engine.accumulate(list(batches))
    # One pass over each buffer, no temporaries; a finite buffer whose sum overflows is looked at again below.
    sums_finite = torch.stack([gradient.sum().isfinite() for gradient in engine.gradients()]).all()
    loss, tokens, finite = _agree(losses, sums_finite, engine)
    if not finite:
        _stop_if_not_finite(engine, loss)
    grad_norm = engine.update(clip_grad)
    engine.scheduler.step(1)
    return StepResult(loss, tokens, grad_norm)


def _agree(losses: list[Tensor], finite: Tensor, engine: Engine) -> tuple[float, int, bool]:
    """Mean loss and tokens over the global batch, and whether everything is finite, the same on every rank."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.context.device)
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the others hold the same losses
        for entry in losses:
            sums[:2] += entry
    sums[2] = (~finite).double()
    dist.all_reduce(sums)
    total, tokens, bad = sums.tolist()
    return total / max(tokens, 1.0), int(tokens), bad == 0 and bool(torch.isfinite(sums[0]))


def _stop_if_not_finite(engine: Engine, loss: float) -> None:
    names = [name for name, gradient in engine.named_gradients() if not bool(gradient.isfinite().all())]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    bad = [] if math.isfinite(loss) else [f"loss = {loss}"]
    for rank, names in enumerate(found):
        if names:
            bad.append(f"rank {rank}: gradients of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}")
    if not bad:
        return
    raise NonFiniteError(
        f"not finite: {'; '.join(bad)}. "
        "Nothing was updated with it. Lower optim.lr or optim.poet_lr, or set poet.orthogonal_map to cayley, and run again: "
        "the run continues from its last checkpoint"
    )
