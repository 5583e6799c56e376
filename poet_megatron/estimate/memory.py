"""Bytes of one rank by part.

The peak of a training step is their sum: parameters, gradients and optimizer state are there all the time, activations and workspace at the
first backward pass after the pipeline has filled. Not in it: scratch memory inside operators, what the allocator loses to fragmentation,
communication buffers of NCCL, and the CUDA context (0.5 to 2 GB together on a GPU).
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.distributed import DistributedDataParallel
from torch import nn

from poet_megatron.config.run import RunConfig
from poet_megatron.estimate.profile import ChunkProfile
from poet_megatron.estimate.schedule import peak_in_flight
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.parallel.deal import deal
from poet_megatron.parallel.layout import data_parallel_size, micro_batches

FP32_BYTES = 4
MOMENTS = 2

PARTS = {
    "frozen W0": "working copy of the matrices that are rotated, in the dtype of training",
    "fp32 master of W0": "what merges are computed on: whole matrices, dealt to the data-parallel ranks; bf16 training only",
    "trainable weights": "skews, embedding, norms, lm_head (method adamw: every weight)",
    "factors": "increments of the factors, sums of their gradients, permutations, effective weights; rotary tables, the gather buffer",
    "gradients": "fp32, one buffer for all trainable weights; engine deepspeed: its sums and buckets",
    "optimizer": "Adam's two moments, in bf16 also fp32 masters of trainable weights; the distributed optimizer and ZeRO share them out",
    "activations": "what the layers keep for backward, over the micro-batches in flight",
    "workspace": "beyond those at the peak of one backward pass: logits, gradients of activations, recomputed layers",
}


def stage_memory(
    run: RunConfig, world_size: int, stage: int, wrapped: Sequence[DistributedDataParallel], profiles: Sequence[ChunkProfile]
) -> dict[str, int]:
    """Bytes by part (see PARTS) of the largest rank of a pipeline stage under Megatron's engine (for DeepSpeed's see estimate.zero).

    Args:
        run: the run's settings.
        world_size: ranks in all.
        stage: number of the stage.
        wrapped: its chunks inside Megatron's DistributedDataParallel, without data.
        profiles: of its chunks.
    """
    replicas = data_parallel_size(run, world_size)
    frozen = [p for chunk in wrapped for p in chunk.parameters() if not p.requires_grad]
    buffers = [buffer for chunk in wrapped for buffer in chunk.buffers]
    permutations = sum(buffer.nbytes for chunk in wrapped for buffer in nn.Module.buffers(chunk))
    in_flight = peak_in_flight(
        stage, run.parallel.pipeline_parallel, micro_batches(run, world_size), [profile.activations for profile in profiles]
    )
    return {
        "frozen W0": sum(p.nbytes for p in frozen),
        "fp32 master of W0": _largest_master_share(run, wrapped, replicas),
        "trainable weights": sum(
            sum(p.nbytes for p in buffer.params) if buffer.param_data is None else buffer.param_data.nbytes for buffer in buffers
        ),
        "factors": sum(profile.factors for profile in profiles) + permutations,
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _optimizer(run, sum(buffer.numel for buffer in buffers), replicas),
        "activations": in_flight,
        "workspace": max(profile.workspace for profile in profiles),
    }


def table_1_elements(matrices: Sequence[RotatedMatrix]) -> int:
    """Elements that Table 1 of the paper counts: W0, factors and their two moments.

    A block-stochastic matrix with inputs m and outputs n that b divides: mn + 3/2 (m + n)(b - 1); a fully-stochastic one: mn + 3 b (b - 1).
    """
    skews = {id(skew): skew.numel() for m in matrices for skew in (m.rotation_in.skew, m.rotation_out.skew) if skew is not None}
    return sum(matrix.weight.numel() for matrix in matrices) + (1 + MOMENTS) * sum(skews.values())


def _largest_master_share(run: RunConfig, chunks: Sequence[nn.Module], replicas: int) -> int:
    if run.train.precision == "fp32" or not run.poet.master_weights:
        return 0
    sizes = [module.weight.numel() for chunk in chunks for module in chunk.modules() if isinstance(module, RotatedMatrix)]
    shares = [0] * replicas
    for size, owner in zip(sizes, deal(sizes, replicas), strict=True):
        shares[owner] += size * FP32_BYTES
    return max(shares)


def _optimizer(run: RunConfig, elements: int, replicas: int) -> int:
    """Adam's state of `elements` trainable elements (padded to shards of equal size under the distributed optimizer)."""
    own = elements // replicas if run.parallel.distributed_optimizer else elements
    masters = 1 if run.train.precision == "bf16" else 0
    return own * (MOMENTS + masters) * FP32_BYTES
