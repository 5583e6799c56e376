"""Training through megatron-core: its pipeline schedules, data parallelism and (distributed) optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from poet_megatron.config.run import RunConfig
from poet_megatron.engine.base import Batch, Engine
from poet_megatron.engine.forward import forward_step, one_or_all
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.optim.build import build_optimizer, build_scheduler
from poet_megatron.optim.state import AdamState, megatron_states
from poet_megatron.parallel.context import ParallelContext
from poet_megatron.parallel.data_parallel import wrap_chunks


class MegatronEngine(Engine):
    """Model chunks inside Megatron's DistributedDataParallel, and Megatron's optimizer.

    Attributes:
        wrapped: the chunks, wrapped; their gradient buffers hold trainable parameters only.
        optimizer: AdamW over the trainable parameters.
    """

    def __init__(self, run: RunConfig, context: ParallelContext, config: TransformerConfig, chunks: list[MegatronModule]) -> None:
        """Wrap initialized chunks; factors must exist by now, or gradient buffers would miss them."""
        self.run, self.context, self.config, self.chunks = run, context, config, chunks
        parallel = run.parallel
        self.wrapped = wrap_chunks(parallel, config, chunks)
        config.finalize_model_grads_func = finalize_model_grads
        if parallel.overlap_grad_reduce:
            config.no_sync_func = one_or_all([chunk.no_sync for chunk in self.wrapped])
            config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in self.wrapped])  # all pipeline stages at the same time
        self.optimizer = build_optimizer(self.wrapped, run.optim, run.train.precision == "bf16", parallel.distributed_optimizer)
        self.scheduler = build_scheduler(self.optimizer, run.optim, run.train.steps)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state_group(self) -> ProcessGroup | None:
        """The data-parallel group under the distributed optimizer."""
        return parallel_state.get_data_parallel_group() if self.run.parallel.distributed_optimizer else None

    def accumulate(self, batches: Sequence[Batch]) -> list[Tensor]:
        """See Engine.accumulate."""
        for chunk in self.wrapped:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        with cached_factors(self.chunks, len(batches)):
            losses = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=one_or_all([iter(batches) for _ in self.wrapped]),
                model=one_or_all(self.wrapped),
                num_microbatches=len(batches),
                seq_length=self.run.model.seq_length,
                micro_batch_size=self.run.train.micro_batch_size,
                forward_only=False,
            )
        return [entry["loss"] for entry in losses]

    def gradients(self) -> Iterator[Tensor]:
        """Megatron's gradient buffers."""
        return (buffer.grad_data for chunk in self.wrapped for buffer in chunk.buffers)

    def named_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The fp32 gradient of every trainable parameter (under the distributed optimizer only this rank's part is reduced)."""
        for name, parameter in self.trainable().items():
            yield name, parameter.main_grad  # type: ignore[attr-defined]

    def update(self, clip_grad: float) -> float:
        """See Engine.update."""
        for inner in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            inner.config.clip_grad = clip_grad
        _, grad_norm, _ = self.optimizer.step()
        if clip_grad <= 0 and not isinstance(self.optimizer, ChainedOptimizer):  # which has formed it; others do so only to clip by it
            grad_norm = self.optimizer.get_grad_norm()  # the gradients are there until the next step
        return float(grad_norm)

    def states(self) -> dict[str, AdamState]:
        """See Engine.states."""
        return megatron_states(self.optimizer, self.trainable())
