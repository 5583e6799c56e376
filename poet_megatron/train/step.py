"""One optimizer step: micro-batches forward and backward, a look at the loss and the gradients, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.profiler import record_function

from poet_megatron.engine.base import Batch, Engine
from poet_megatron.guard.losses import UPDATE, LossGuard, Verdict

Measure = Callable[[Callable[[], list[Batch]], Callable[[list[Batch]], list[Tensor]]], list[Tensor]]
"""Does `work(load())` and measures it."""
NAMED = 8  # gradients of a rank in a message


@dataclass(frozen=True)
class StepResult:
    """What one step reports, the same on every rank.

    Attributes:
        loss: mean loss over the global batch's tokens.
        tokens: tokens of the global batch that count in the loss.
        grad_norm: global gradient norm before clipping; NaN if there was no update.
        verdict: whether there was an update, and what was noticed.
    """

    loss: float
    tokens: int
    grad_norm: float
    verdict: Verdict = Verdict()

    @property
    def updated(self) -> bool:
        """Whether the parameters were updated."""
        return self.verdict.action == UPDATE


def train_step(
    engine: Engine,
    batches: Iterable[Batch],
    clip_grad: float,
    guard: LossGuard | None = None,
    measure: Measure | None = None,
    beat: Callable[[], None] | None = None,
) -> StepResult:
    """Take one optimizer step, or pass over its batch as the guard decides; the schedule goes on either way. Collective over all ranks.

    Args:
        engine: what is trained.
        batches: this rank's micro-batches of the step.
        clip_grad: gradient clipping threshold of this step; 0 disables clipping.
        guard: judges losses and gradients; by default, what is not finite stops the run.
        measure: how to load the micro-batches and run them forward and backward, if they are measured meanwhile.
        beat: called with each micro-batch that is loaded, and again with each that is begun: the step makes progress.

    Raises:
        NonFiniteError, LossSpikeError: on every rank, before any update, if that is the guard's policy.
    """
    losses = (measure or _do)(lambda: _load(batches, beat), lambda loaded: _forward_backward(engine, loaded))
    # One pass over each buffer, no temporaries; a finite buffer whose sum overflows is looked at again below.
    sums_finite = torch.stack([gradient.sum().isfinite() for gradient in engine.gradients()]).all()
    loss, tokens, finite = _agree(losses, sums_finite, engine)
    verdict = (guard or LossGuard()).judge(loss, "" if finite else _not_finite(engine, loss))
    with record_function("update"):
        grad_norm = engine.update(clip_grad) if verdict.action == UPDATE else math.nan
    engine.scheduler.step(1)
    return StepResult(loss, tokens, grad_norm, verdict)


def _do(load: Callable[[], list[Batch]], work: Callable[[list[Batch]], list[Tensor]]) -> list[Tensor]:
    """What a step does when nobody measures it."""
    return work(load())


class _Beating(list[Batch]):
    """Micro-batches, each of which is progress when it is taken."""

    def __init__(self, batches: Iterable[Batch], beat: Callable[[], None]) -> None:
        super().__init__(batches)
        self._beat = beat

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            self._beat()
            yield batch


def _load(batches: Iterable[Batch], beat: Callable[[], None] | None) -> list[Batch]:
    with record_function("data"):
        if beat is None:
            return list(batches)
        loaded = []
        for batch in batches:
            beat()
            loaded.append(batch)
        return _Beating(loaded, beat)


def _forward_backward(engine: Engine, batches: list[Batch]) -> list[Tensor]:
    with record_function("forward-backward"):
        return engine.accumulate(batches)


def _agree(losses: list[Tensor], finite: Tensor, engine: Engine) -> tuple[float, int, bool]:
    """Mean loss and tokens over the global batch, and whether everything is finite, the same on every rank."""
    sums = torch.zeros(3, dtype=torch.float64, device=engine.context.device)
    if parallel_state.get_tensor_model_parallel_rank() == 0:  # the others hold the same losses
        for entry in losses:
            sums[:2] += entry
    sums[2] = (~finite).double()
    dist.all_reduce(sums)
    total, tokens, bad = sums.tolist()
    return total / max(tokens, 1.0), int(tokens), bad == 0 and math.isfinite(total)


def _not_finite(engine: Engine, loss: float) -> str:
    """What is not finite, by rank; empty if only a sum of finite gradients overflowed. Collective over all ranks."""
    names = [name for name, gradient in engine.named_gradients() if not bool(gradient.isfinite().all())]
    found: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, names)
    bad = [] if math.isfinite(loss) else [f"loss = {loss}"]
    for rank, names in enumerate(found):
        if names:
            shown = ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
            bad.append(f"rank {engine.context.name(rank)}: gradients of {shown}")
    return "; ".join(bad)
