"""What DeepSpeed's ZeRO-1 and ZeRO-2 keep and communicate (engine: deepspeed), by the rules of its stage_1_and_2.py.

Gradients are added up in fp32. ZeRO-1 keeps all of them on every rank, and all-reduces them in the last micro-batch. ZeRO-2 all-reduces the
gradients of every micro-batch and keeps the rank's own part of the sum; those of skews are there in the last micro-batch only (see
layers.factor_cache). Neither uses a reduce-scatter: of the reduced bucket each rank keeps its part and drops the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core import parallel_state
from torch import nn

from poet_megatron.config.run import RunConfig
from poet_megatron.engine.zero import BUCKET
from poet_megatron.estimate.traffic import FP32_BYTES, Traffic, count_calls, group_ranks, loss_and_stop, summarize
from poet_megatron.model.build import DTYPES
from poet_megatron.optim.build import SKEW_SUFFIX, plain_groups
from poet_megatron.parallel.collectives import Collective
from poet_megatron.parallel.layout import data_parallel_size, micro_batches

STATE = 3
"""fp32 numbers per element of a rank's partition: its master, also in fp32 training, and two moments."""


@dataclass(frozen=True)
class ZeroGroup:
    """A parameter group of the optimizer, flattened and divided evenly.

    Attributes:
        sizes: elements of its parameters, in order.
        are_skews: whether they have a gradient in the last micro-batch only.
        partition: elements that one rank updates.
    """

    sizes: list[int]
    are_skews: bool
    partition: int

    def touched(self, rank: int) -> int:
        """Elements of the parameters, counted whole, of which a rank updates at least a part."""
        first, start, total = rank * self.partition, 0, 0
        for size in self.sizes:
            if start < first + self.partition and start + size > first:
                total += size
            start += size
        return total


@dataclass(frozen=True)
class ZeroLayout:
    """What ZeRO makes of a model's trainable parameters.

    Attributes:
        groups: the groups of the optimizer.
        backward: elements of every parameter, in about the order in which gradients are formed, and whether it is a skew.
        replicas: data-parallel ranks.
    """

    groups: list[ZeroGroup]
    backward: list[tuple[int, bool]]
    replicas: int

    @property
    def elements(self) -> int:
        """Elements of all trainable parameters."""
        return sum(size for size, _ in self.backward)

    @property
    def bucket(self) -> int:
        """Elements of a bucket."""
        return min(BUCKET, self.elements)

    @property
    def partition(self) -> int:
        """Elements that one rank updates, padding included."""
        return sum(group.partition for group in self.groups)


def zero_layout(chunk: nn.Module, replicas: int) -> ZeroLayout:
    """Partitions of a model over data-parallel ranks; groups are padded to two elements per rank."""
    named = [(name, parameter) for name, parameter in chunk.named_parameters() if parameter.requires_grad]
    skews = {id(parameter) for name, parameter in named if name.endswith(SKEW_SUFFIX)}
    groups = []
    for members in filter(None, plain_groups(named)):
        sizes = [parameter.numel() for parameter in members]
        groups.append(ZeroGroup(sizes, id(members[0]) in skews, -(-sum(sizes) // (2 * replicas)) * 2))
    return ZeroLayout(groups, [(parameter.numel(), id(parameter) in skews) for _, parameter in reversed(named)], replicas)


def zero_memory(run: RunConfig, world_size: int, chunk: nn.Module) -> dict[str, int]:
    """Bytes of the parts of memory.PARTS that depend on the engine."""
    replicas = data_parallel_size(run, world_size)
    layout, item = zero_layout(chunk, replicas), DTYPES[run.train.precision].itemsize
    return {
        "trainable weights": layout.partition * replicas * item,
        "gradients": _gradients(run, layout, micro_batches(run, world_size)),
        "optimizer": layout.partition * STATE * FP32_BYTES,
    }


def _gradients(run: RunConfig, layout: ZeroLayout, batches: int) -> int:
    """Accumulated gradients and buckets: before the reduction in stage 1, at its end in stage 2."""
    buckets = layout.bucket * (2 if run.parallel.overlap_grad_reduce else 1)
    if run.deepspeed.zero_stage == 1:
        return (layout.elements + buckets) * FP32_BYTES
    if run.train.precision == "bf16":  # buckets in bf16, this rank's part of the sum in fp32
        return buckets * DTYPES[run.train.precision].itemsize + layout.partition * FP32_BYTES
    return (buckets + max(_whole_gradients(layout, rank, batches) for rank in range(layout.replicas))) * FP32_BYTES


def _whole_gradients(layout: ZeroLayout, rank: int, batches: int) -> int:
    """Elements that ZeRO-2 keeps in fp32 training: whole gradients of what a rank updates at least a part of, once for the micro-batch
    and, where there were others, once for the sum, with zeros beside it for the skews, which had no gradient yet."""
    whole = sum(group.touched(rank) for group in layout.groups)
    return whole if batches == 1 else 2 * whole + sum(group.touched(rank) for group in layout.groups if group.are_skews)


def zero_traffic(run: RunConfig, world_size: int, stage: int, chunk: nn.Module) -> list[Traffic]:
    """Gradients, updated parameters and scalars of a step.

    A parameter larger than a bucket counts as one call; DeepSpeed may cut it where partitions end.
    """
    replicas = data_parallel_size(run, world_size)
    layout, batches, item = zero_layout(chunk, replicas), micro_batches(run, world_size), DTYPES[run.train.precision].itemsize
    group = group_ranks(parallel_state.get_data_parallel_group())
    gradients = _reductions(layout, run.deepspeed.zero_stage, run.parallel.overlap_grad_reduce, batches)
    calls = {
        "gradients": [Collective("all_reduce", group, size * FP32_BYTES) for size, times in gradients.items() for _ in range(times)],
        "parameters": [Collective("all_gather", group, part.partition * replicas * item) for part in layout.groups],
        # the count of tokens, and a norm for each group of parameters
        "scalars": [*loss_and_stop(), *[Collective("all_reduce", group, FP32_BYTES)] * (1 + len(layout.groups))],
    }
    return [entry for purpose, records in calls.items() for entry in summarize(stage, purpose, count_calls(records))]


def _reductions(layout: ZeroLayout, stage: int, overlap: bool, batches: int) -> Counter[int]:
    """How often a step reduces so many elements at once."""
    backward = [size for size, _ in layout.backward]
    if stage == 1:
        return Counter(_buckets(backward if overlap else [size for group in layout.groups for size in group.sizes], layout.bucket))
    reductions = Counter(_buckets(backward, layout.bucket))
    for size in _buckets([size for size, is_skew in layout.backward if not is_skew], layout.bucket):
        reductions[size] += batches - 1
    return reductions


def _buckets(sizes: Sequence[int], limit: int) -> list[int]:
    """Elements of each bucket that is reduced; one that the next parameter does not fit into is reduced first."""
    buckets = [0]
    for size in sizes:
        if buckets[-1] and buckets[-1] + size > limit:
            buckets.append(0)
        buckets[-1] += size
    return buckets
