"""Shapes, parameter counts, memory, communication and flops of a run, from the real model built and run without data.

One process stands in for one rank of every pipeline stage in turn (tensor- and data-parallel rank 0) in a simulated world
(parallel.simulate). Nothing large is allocated, whatever the size of the model or the number of ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import MegatronModule

from poet_megatron.config.run import RunConfig
from poet_megatron.estimate.memory import stage_memory, table_1_elements
from poet_megatron.estimate.profile import ChunkProfile, hidden_shape, profile_chunk
from poet_megatron.estimate.traffic import Traffic, gradient_traffic, merge_traffic, pipeline_traffic, scalar_traffic, summarize
from poet_megatron.estimate.zero import zero_memory, zero_traffic
from poet_megatron.model.build import DTYPES, build_chunks, transformer_config
from poet_megatron.model.flops import dense_weights, flop_parts
from poet_megatron.optim.merge import rotated_matrices
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.data_parallel import wrap_chunks
from poet_megatron.parallel.layout import check_layout, data_parallel_size, micro_batches
from poet_megatron.parallel.simulate import simulated_world


@dataclass(frozen=True)
class Counts:
    """Parameters of the whole model, however it is laid out.

    Attributes:
        rotated_parameters: trainable parameters of the rotated matrices; under method adamw the elements of those matrices.
        trainable_parameters: everything the optimizer updates.
        total_parameters: elements of the model as it is exported, with vocabulary padding.
        table_1_elements: what Table 1 of the paper counts (see memory.table_1_elements); 0 under method adamw.
    """

    rotated_parameters: int
    trainable_parameters: int
    total_parameters: int
    table_1_elements: int


@dataclass(frozen=True)
class StageEstimate:
    """What one rank of a pipeline stage needs.

    Attributes:
        stage: number of the stage.
        layers: global numbers of its layers.
        shapes: every parameter's name and shape on this rank.
        memory_bytes: bytes by part (see memory.PARTS), of the stage's largest rank.
        traffic: what the rank communicates per step, and per merge.
    """

    stage: int
    layers: list[int]
    shapes: list[tuple[str, tuple[int, ...]]]
    memory_bytes: dict[str, int]
    traffic: list[Traffic]


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        run: the run.
        world_size: ranks in all.
        data_parallel: replicas of the model.
        micro_batches: per rank and step.
        counts: parameters of the whole model.
        stages: one rank of each pipeline stage.
        flops: of a step over all ranks by part (see model.flops).
        dense_flops: of a step of the same model with dense linear layers.
    """

    run: RunConfig
    world_size: int
    data_parallel: int
    micro_batches: int
    counts: Counts
    stages: list[StageEstimate]
    flops: dict[str, int]
    dense_flops: int

    @property
    def largest(self) -> StageEstimate:
        """The stage whose ranks need most memory."""
        return max(self.stages, key=lambda stage: sum(stage.memory_bytes.values()))


def estimate(run: RunConfig, world_size: int | None = None, fused_norms: bool = True) -> Estimate:
    """Estimate a run on `world_size` processes.

    Args:
        run: the run.
        world_size: by default WORLD_SIZE of the environment (torchrun), or else a single replica of the model.
        fused_norms: whether RMSNorm is one kernel, as on GPUs; on CPUs it keeps more activations.

    Raises:
        UserError: a layout that cannot be (see parallel.layout).
    """
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", run.parallel.tensor_parallel * run.parallel.pipeline_parallel))
    check_layout(run, world_size)
    parallel = run.parallel
    replicas, tokens = data_parallel_size(run, world_size), run.train.global_batch_size * run.model.seq_length
    stages, flops, profiles = [], Counter[str](), dict[tuple[bool, bool], ChunkProfile]()
    for stage in range(parallel.pipeline_parallel):
        with simulated_world(parallel, world_size, stage * world_size // parallel.pipeline_parallel, fused_norms):
            chunks = build_chunks(run, transformer_config(run))
            stages.append(_stage(run, world_size, stage, chunks, profiles))
            for part, count in flop_parts(run, chunks, tokens // replicas).items():
                flops[part] += count * parallel.tensor_parallel * replicas
    dense = 6 * tokens * dense_weights(run) + flops["attention"] + flops["lm_head"]
    return Estimate(run, world_size, replicas, micro_batches(run, world_size), count_parameters(run), stages, dict(flops), dense)


def communication(run: RunConfig, world_size: int) -> list[Traffic]:
    """What one rank of every pipeline stage communicates in a step, and in a merge (purpose "merge"); see traffic.Traffic."""
    return [entry for stage in estimate(run, world_size).stages for entry in stage.traffic]


def count_parameters(run: RunConfig) -> Counts:
    """Count the parameters of the whole model: of the model on one rank that has the shard groups of the run."""
    groups = run.poet.shard_groups or run.parallel.tensor_parallel
    whole = dataclasses.replace(run, parallel=ParallelConfig(), poet=dataclasses.replace(run.poet, shard_groups=groups))
    with simulated_world(whole.parallel, 1, 0):
        chunks = build_chunks(whole, transformer_config(whole))
    parameters = dict(chunks[0].named_parameters())
    skews = sum(p.numel() for name, p in parameters.items() if name.endswith(".skew"))
    return Counts(
        rotated_parameters=skews if run.method == "poet" else dense_weights(run),
        trainable_parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        total_parameters=sum(p.numel() for p in parameters.values()) - skews,
        table_1_elements=table_1_elements(rotated_matrices(chunks)),
    )


def _stage(
    run: RunConfig, world_size: int, stage: int, chunks: Sequence[MegatronModule], profiles: dict[tuple[bool, bool], ChunkProfile]
) -> StageEstimate:
    """Estimate the stage whose rank this process stands in for; `profiles` keeps those of chunks that are alike (first, last)."""
    own = []
    for number, chunk in enumerate(chunks):
        kind = (chunk.pre_process, chunk.post_process)
        if kind not in profiles:
            profiles[kind] = profile_chunk(run, number, len(chunk.decoder.layers))
        own.append(profiles[kind])
    shapes = [(name, tuple(parameter.shape)) for chunk in chunks for name, parameter in chunk.named_parameters()]
    wrapped = wrap_chunks(run.parallel, chunks[0].config, chunks)
    memory, traffic = stage_memory(run, world_size, stage, wrapped, own), _step_traffic(run, world_size, stage, wrapped)
    if run.engine == "deepspeed":
        memory |= zero_memory(run, world_size, chunks[0])
        traffic = zero_traffic(run, world_size, stage, chunks[0])
    return StageEstimate(
        stage=stage,
        layers=[layer.layer_number - 1 for chunk in chunks for layer in chunk.decoder.layers],
        shapes=shapes,
        memory_bytes=memory,
        traffic=[*_layer_traffic(stage, own, micro_batches(run, world_size)), *traffic, *merge_traffic(stage, chunks)],
    )


def _step_traffic(run: RunConfig, world_size: int, stage: int, wrapped: Sequence[DistributedDataParallel]) -> list[Traffic]:
    """What Megatron's engine communicates in a step, beyond the layers."""
    length, micro, hidden = hidden_shape(run)
    message_bytes = length * micro * hidden * DTYPES[run.train.precision].itemsize
    return [
        *pipeline_traffic(run, world_size, stage, message_bytes),
        *gradient_traffic(run, stage, wrapped),
        *scalar_traffic(run, stage),
    ]


def _layer_traffic(stage: int, profiles: Sequence[ChunkProfile], batches: int) -> list[Traffic]:
    """Collectives inside the layers: those of every micro-batch, and what the last one has beyond them."""
    layers, factors = Counter[tuple[str, str, int]](), Counter[tuple[str, str, int]]()
    for profile in profiles:
        for key, times in profile.collectives.items():
            layers[key] += times * batches
        for key, times in profile.last_collectives.items():
            factors[key] += times - profile.collectives.get(key, 0)
    return summarize(stage, "layers", layers) + summarize(stage, "factor gradients", factors)
