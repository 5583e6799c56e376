"""What one rank communicates in an optimizer step.

Bytes are those of the whole tensor, as parallel.collectives counts them: of the output of an all_gather, the input of a reduce_scatter, the
tensor itself otherwise. What crosses the wires depends on the algorithm: a ring moves (n - 1)/n of the bytes per rank for all_gather and
reduce_scatter, twice that for all_reduce. Groups of a single rank are left out.

The collectives of layers, gradients and parameters are recorded from the real code in a simulated world; pipeline messages, the few
scalars of a step and what DeepSpeed does (estimate.zero) are counted from their rules. What happens every few steps (logging, evaluation,
checkpoints, comparing replicas before a merge) is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import nn

from poet_megatron.config.run import RunConfig
from poet_megatron.estimate.schedule import messages
from poet_megatron.optim.merge import broadcast_weights
from poet_megatron.parallel.collectives import Collective, CollectiveCounter
from poet_megatron.parallel.layout import micro_batches

Calls = Mapping[tuple[str, str, int], int]
"""How often a collective is issued: {(kind, group, bytes): times}."""

INT32_BYTES, INT64_BYTES, FP32_BYTES, FP64_BYTES = 4, 8, 4, 8
MERGE = "merge"

PURPOSES = {
    "layers": "activations and their gradients, between the ranks that split a layer",
    "factor gradients": "of factors that every tensor-parallel rank holds but only has a partial sum of, once per step",
    "pipeline": "activations to the next stage, their gradients to the one before",
    "gradients": "of trainable weights over the replicas; over tensor-parallel ranks those of norms and factors under sequence parallelism",
    "parameters": "updated weights, gathered from the shards of the distributed optimizer, or of ZeRO",
    "scalars": "loss, token counts, gradient norm, whether a signal asked to stop",
    MERGE: "merged weights from the rank that merged them; per merge, not per step",
}


@dataclass(frozen=True)
class Traffic:
    """Collectives of one kind that one rank of a pipeline stage issues for one purpose in an optimizer step.

    Attributes:
        stage: pipeline stage.
        purpose: what for (see PURPOSES).
        collective: all_reduce, all_gather, reduce_scatter, broadcast, send or recv.
        group: which ranks take part: tensor, data, pipeline, model (tensor x pipeline) or world.
        calls: how many.
        bytes: of all calls together.
    """

    stage: int
    purpose: str
    collective: str
    group: str
    calls: int
    bytes: int


def group_name(ranks: Sequence[int]) -> str:
    """Name of the process group with these global ranks; the narrowest one where several have the same ranks."""
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "model": parallel_state.get_model_parallel_group(),
        "world": dist.group.WORLD,
    }
    return next(name for name, group in groups.items() if tuple(dist.get_process_group_ranks(group)) == tuple(ranks))


def count_calls(records: Iterable[Collective]) -> Counter[tuple[str, str, int]]:
    """Count recorded collectives by kind, group and size; those within a single rank are left out."""
    return Counter((record.kind, group_name(record.ranks), record.bytes) for record in records if len(record.ranks) > 1)


def summarize(stage: int, purpose: str, calls: Calls) -> list[Traffic]:
    """One entry per kind and group."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for (kind, group, size), times in calls.items():
        count, total = totals.get((kind, group), (0, 0))
        totals[kind, group] = (count + times, total + size * times)
    return [Traffic(stage, purpose, kind, group, count, total) for (kind, group), (count, total) in sorted(totals.items()) if count]


def gradient_traffic(run: RunConfig, stage: int, wrapped: Sequence[DistributedDataParallel]) -> list[Traffic]:
    """Gradients, and parameters of the distributed optimizer, of a stage, by issuing them."""
    with CollectiveCounter() as gradients:
        for chunk in wrapped:
            if run.parallel.overlap_grad_reduce:  # otherwise finalize_model_grads starts it
                chunk.start_grad_sync()
        finalize_model_grads(list(wrapped))
    with CollectiveCounter() as parameters:
        for chunk in wrapped:
            if run.parallel.distributed_optimizer:
                chunk.start_param_sync(force_sync=True)
    counters = {"gradients": gradients, "parameters": parameters}
    return [entry for purpose, counter in counters.items() for entry in summarize(stage, purpose, count_calls(counter.records))]


def merge_traffic(stage: int, chunks: Sequence[nn.Module]) -> list[Traffic]:
    """A merge of a stage, by issuing its broadcasts."""
    with CollectiveCounter() as merge:
        broadcast_weights(chunks, parallel_state.get_data_parallel_group())
    return summarize(stage, MERGE, count_calls(merge.records))


def pipeline_traffic(run: RunConfig, world_size: int, stage: int, message_bytes: int) -> list[Traffic]:
    """Messages of a stage; each is the activations of one micro-batch between layers, or their gradient."""
    parallel = run.parallel
    count = messages(stage, parallel.pipeline_parallel, micro_batches(run, world_size), parallel.virtual_stages)
    return [Traffic(stage, "pipeline", kind, "pipeline", count, count * message_bytes) for kind in ("send", "recv") if count]


def scalar_traffic(run: RunConfig, stage: int) -> list[Traffic]:
    """Token counts (Megatron's finalize_model_grads), gradient norm, loss with the check for finite numbers, and the flag of signals."""
    everyone = tuple(range(dist.get_world_size()))
    norm_group = everyone if run.parallel.distributed_optimizer else group_ranks(parallel_state.get_model_parallel_group())
    records = [
        Collective("broadcast", group_ranks(parallel_state.get_pipeline_model_parallel_group()), INT32_BYTES),
        Collective("all_reduce", group_ranks(parallel_state.get_data_parallel_group()), INT32_BYTES),
        Collective("all_reduce", norm_group, FP32_BYTES),
        *loss_and_stop(),
    ]
    return summarize(stage, "scalars", count_calls(records))


def loss_and_stop() -> list[Collective]:
    """Loss with the check for finite numbers, and the flag of signals."""
    everyone = tuple(range(dist.get_world_size()))
    return [Collective("all_reduce", everyone, 3 * FP64_BYTES), Collective("all_reduce", everyone, INT64_BYTES)]


def group_ranks(group: dist.ProcessGroup) -> tuple[int, ...]:
    """Global ranks of a process group, in order."""
    return tuple(dist.get_process_group_ranks(group))
