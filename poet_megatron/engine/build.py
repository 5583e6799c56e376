"""Builds what a run trains from a RunConfig: model chunks, their weights, and the engine that updates them."""

from __future__ import annotations

import logging

from megatron.core import parallel_state

from poet_megatron.config.run import RunConfig
from poet_megatron.engine.base import Engine
from poet_megatron.engine.megatron import MegatronEngine
from poet_megatron.model.build import build_chunks, transformer_config
from poet_megatron.model.init import initialize
from poet_megatron.optim.fused import fused_kernels
from poet_megatron.optim.merge import keep_masters
from poet_megatron.parallel.context import ParallelContext
from poet_megatron.parallel.layout import check_layout

logger = logging.getLogger(__name__)


def build_engine(run: RunConfig, context: ParallelContext) -> Engine:
    """Build and initialize model, optimizer and schedule for this rank.

    Raises:
        ValueError: sizes that do not divide over the ranks (see parallel.layout).
    """
    check_layout(run, context.world_size)
    config = transformer_config(run)
    config.gradient_accumulation_fusion = fused_kernels(context.device.type, run.engine).weight_gradient
    chunks = build_chunks(run, config)
    if run.method == "poet" and run.train.precision == "bf16":
        if run.poet.master_weights:
            keep_masters(chunks, parallel_state.get_data_parallel_group())
        elif run.poet.merge_interval or run.poet.merge_at_skew_norm:
            logger.warning("poet.master_weights is false in bf16: every merge rounds the weights to bf16, and the spectrum drifts")
    for chunk in chunks:
        initialize(chunk, run.model, run.train.seed)
    if run.engine == "deepspeed":
        from poet_megatron.engine.deepspeed import DeepSpeedEngine  # DeepSpeed is an extra

        return DeepSpeedEngine(run, context, config, chunks)
    return MegatronEngine(run, context, config, chunks)
