"""Data-parallel training through DeepSpeed: ZeRO-1 or ZeRO-2 over the same model, schedule and checkpoints as Megatron's engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from poet_megatron.config.run import RunConfig
from poet_megatron.engine.base import Batch, Engine
from poet_megatron.engine.forward import forward_step
from poet_megatron.engine.zero import drop_gradients, import_deepspeed, named_zero_gradients, start_zero, zero_gradients, zero_states
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.optim.build import build_plain_optimizer, build_scheduler
from poet_megatron.optim.state import AdamState
from poet_megatron.parallel.context import ParallelContext


class DeepSpeedEngine(Engine):
    """One model chunk, trained by ZeRO.

    Attributes:
        adam: AdamW over this rank's flat partitions, one for each parameter group.
        zero: DeepSpeed's engine.
    """

    def __init__(self, run: RunConfig, context: ParallelContext, config: TransformerConfig, chunks: list[MegatronModule]) -> None:
        """Give an initialized chunk to DeepSpeed; factors must exist by now, or ZeRO would miss them.

        Raises:
            UserError: DeepSpeed is missing, or too old or new.
        """
        self.run, self.context, self.config, self.chunks = run, context, config, chunks
        (chunk,) = chunks
        self.adam = build_plain_optimizer(self.trainable().items(), run.optim)
        self.zero: Any = start_zero(import_deepspeed(context), _MicroBatch(chunk), self.adam, run, self.micro_batches)
        self.scheduler = build_scheduler(self.adam, run.optim, run.train.steps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.adam.param_groups

    @property
    def state_group(self) -> ProcessGroup:
        """The data-parallel group."""
        return parallel_state.get_data_parallel_group()

    def accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See Engine.accumulate. As in Megatron, gradients of summed losses are added up over micro-batches and ranks, then divided."""
        drop_gradients(self.zero)
        losses = []
        with cached_factors(self.chunks, len(batches)):
            for number, batch in enumerate(batches, 1):
                self.zero.set_gradient_accumulation_boundary(number == len(batches))
                with self._timed("forward-compute"):
                    total, loss = self.zero(batch)
                with self._timed("backward-compute"):
                    self.zero.backward(total, scale_wrt_gas=False)
                losses.append(loss)
        tokens = torch.stack(losses).sum(dim=0)[1]
        dist.all_reduce(tokens, group=self.state_group)
        for gradient in self.gradients():
            gradient.mul_(1 / tokens.clamp_min(1))
        return losses

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Time a part of the step as Megatron's schedules do, where somebody measures it."""
        if self.config.timers is None:
            yield
            return
        timer = self.config.timers(name, log_level=2)
        timer.start()
        yield
        timer.stop()

    def gradients(self) -> Iterator[Tensor]:
        """The reduced gradients of this rank's partitions."""
        return zero_gradients(self.zero)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The parts of parameters' gradients in this rank's partitions."""
        return named_zero_gradients(self.zero, self.trainable())

    def update(self, clip_grad: float) -> float:
        """See Engine.update."""
        self.zero.optimizer.clip_grad = clip_grad
        self.zero.step()
        if not self.zero.was_step_applied():
            raise RuntimeError("DeepSpeed skipped an update: the gradient norm is not finite although every gradient is")
        return float(self.zero.get_global_grad_norm())

    def states(self) -> dict[str, AdamState]:
        """See Engine.states."""
        return zero_states(self.adam, self.trainable())


class _MicroBatch(nn.Module):
    """What DeepSpeed sees of the model: one forward pass that ends in a loss."""

    def __init__(self, chunk: MegatronModule) -> None:
        super().__init__()
        self.chunk = chunk

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum of the batch's token losses, and [that, number of tokens] for reporting."""
        output, to_loss = forward_step(iter([batch]), self.chunk)
        total, _, report = to_loss(output)
        return total, report["loss"]
