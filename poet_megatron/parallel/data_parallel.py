"""Model chunks inside Megatron's DistributedDataParallel, the same way for training and for estimates."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from poet_megatron.parallel.config import ParallelConfig


def wrap_chunks(parallel: ParallelConfig, config: TransformerConfig, chunks: Sequence[nn.Module]) -> list[DistributedDataParallel]:
    """Wrap this rank's chunks; fp32 gradient buffers are made for the parameters that are trained, so factors must exist by now."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        use_distributed_optimizer=parallel.distributed_optimizer,
    )
    return [DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0) for index, chunk in enumerate(chunks)]
