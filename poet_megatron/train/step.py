"""One optimizer step: micro-batches forward and backward, a check that everything is finite, clipping, update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from poet_megatron.engine.build import Engine
from poet_megatron.errors import UserError
from poet_megatron.layers.factor_cache import cached_factors

Batch = dict[str, Tensor]


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; no parameter was updated with it."""

    exit_status = 3


@dataclass(frozen=True)
class StepResult:
    """What one step reports.

    Attributes:
        loss: mean loss over the global batch's tokens.
        tokens: tokens of the global batch that count in the loss.
        grad_norm: global gradient norm before clipping.
    """

    loss: float
    tokens: int
    grad_norm: float


def train_step(engine: Engine, batches: Iterator[Batch], clip_grad: float) -> StepResult:
    """Take one optimizer step.

    Args:
        engine: what is trained.
        batches: yields this rank's micro-batches of the step.
        clip_grad: gradient clipping threshold of this step; 0 disables clipping.

    Raises:
        NonFiniteError: before any update, if the loss or a gradient is not finite on any rank.
    """
    engine.wrapped.zero_grad_buffer()
    engine.optimizer.zero_grad()
    with cached_factors([engine.model], engine.micro_batches):
        losses = get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=batches,
            model=engine.wrapped,
            num_microbatches=engine.micro_batches,
            seq_length=engine.run.model.seq_length,
            micro_batch_size=engine.run.train.micro_batch_size,
            forward_only=False,
        )
    loss, tokens = _global_loss(losses, engine.context.device)
    _require_finite(engine, loss)
    for inner in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        inner.config.clip_grad = clip_grad
    _, grad_norm, _ = engine.optimizer.step()
    engine.scheduler.step(1)
    return StepResult(loss, tokens, float(grad_norm) if grad_norm is not None else 0.0)


def _forward_step(batches: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Callable]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, lambda losses: _loss(losses, batch["loss_mask"])


def _loss(losses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses [micro, s], number of tokens, and both for reporting (Megatron divides by the global number)."""
    total = (losses.float() * mask).sum()
    tokens = mask.sum().to(torch.int)
    return total, tokens, {"loss": torch.stack([total.detach(), tokens.to(total.dtype)])}


def _global_loss(losses: list[dict[str, Tensor]], device: torch.device) -> tuple[float, int]:
    """Mean loss and tokens over the global batch."""
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for entry in losses:
        sums += entry["loss"]
    dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    total, tokens = sums.tolist()
    return total / max(tokens, 1.0), int(tokens)


def _require_finite(engine: Engine, loss: float) -> None:
    names = [] if torch.isfinite(torch.tensor(loss)) else [f"loss = {loss}"]
    sums = torch.stack([buffer.grad_data.sum() for buffer in engine.wrapped.buffers])  # one pass, no temporaries
    if not names and bool(sums.isfinite().all()):
        return
    names += [name for name, p in engine.model.named_parameters() if p.requires_grad and not bool(p.main_grad.isfinite().all())]
    if not names:
        return  # finite gradients whose sum overflows
    raise NonFiniteError(
        f"not finite on rank {engine.context.rank}: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}. "
        "Nothing was updated with it. Lower optim.lr or optim.poet_lr, or set poet.orthogonal_map to cayley, and run again: "
        "the run continues from its last checkpoint"
    )
