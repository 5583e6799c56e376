"""What a run trains: the model wrapped for data parallelism, its optimizer and its schedule, built from a RunConfig."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from poet_megatron.config.run import RunConfig
from poet_megatron.model.build import build_model, transformer_config
from poet_megatron.model.init import initialize
from poet_megatron.optim.build import build_optimizer, build_scheduler
from poet_megatron.optim.merge import rotated_matrices
from poet_megatron.parallel.context import ParallelContext

logger = logging.getLogger(__name__)


@dataclass
class Engine:
    """The trainable state of this rank.

    Attributes:
        run: the run's settings.
        context: this process's place in the layout.
        config: Megatron's settings of the model.
        model: this rank's GPTModel.
        wrapped: the model inside Megatron's DistributedDataParallel.
        optimizer: AdamW over the trainable parameters.
        scheduler: learning rates and weight decay.
    """

    run: RunConfig
    context: ParallelContext
    config: TransformerConfig
    model: MegatronModule
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    @property
    def micro_batches(self) -> int:
        """Micro-batches per rank and optimizer step."""
        train = self.run.train
        return train.global_batch_size // (train.micro_batch_size * self.context.data_size)


def build_engine(run: RunConfig, context: ParallelContext) -> Engine:
    """Build and initialize model, optimizer and schedule for this rank.

    Factors exist before the model is wrapped, so that Megatron's gradient buffers hold them.

    Raises:
        ValueError: the global batch does not divide over the data-parallel ranks.
    """
    train = run.train
    if train.global_batch_size % (train.micro_batch_size * context.data_size):
        raise ValueError(
            f"train.global_batch_size is {train.global_batch_size}; it must be a multiple of "
            f"train.micro_batch_size x data-parallel ranks = {train.micro_batch_size} x {context.data_size}"
        )
    config = transformer_config(run)
    model = build_model(run, config)
    _keep_masters(run, model)
    initialize(model, run.model, train.seed)
    bf16 = train.precision == "bf16"
    overlap = run.parallel.overlap_grad_reduce
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    wrapped = DistributedDataParallel(config, ddp_config, model)
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:
        config.no_sync_func = wrapped.no_sync
    optimizer = build_optimizer([wrapped], run.optim, bf16)
    scheduler = build_scheduler(optimizer, run.optim, train.steps)
    return Engine(run, context, config, model, wrapped, optimizer, scheduler)


def _keep_masters(run: RunConfig, model: MegatronModule) -> None:
    if run.method != "poet" or run.train.precision == "fp32":
        return
    if run.poet.master_weights:
        for matrix in rotated_matrices([model]):
            matrix.keep_master()
    elif run.poet.merge_interval or run.poet.merge_at_skew_norm:
        logger.warning("poet.master_weights is false in bf16: every merge rounds the weights to bf16, and the spectrum drifts")
