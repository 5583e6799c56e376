"""What one micro-batch of a model chunk needs, measured on the real layers with tensors that have no data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import custom_backward, deallocate_output_tensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from poet_megatron.config.run import RunConfig
from poet_megatron.engine.forward import forward_step
from poet_megatron.estimate.meter import MemoryMeter
from poet_megatron.estimate.traffic import Calls, count_calls
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.model.build import build_model, transformer_config
from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.data_parallel import wrap_chunks


@dataclass(frozen=True)
class ChunkProfile:
    """What the micro-batches of one optimizer step need in a model chunk.

    Attributes:
        activations: bytes kept from the end of a forward pass to its backward pass.
        workspace: bytes beyond those at the peak of a forward and backward pass (gradients of activations, recomputed layers, logits).
        factors: bytes kept from the first to the last micro-batch (increments and their gradients, effective weights).
        collectives: of every micro-batch but the last.
        last_collectives: of the last micro-batch, in which the gradients of the skews are formed.
    """

    activations: int
    workspace: int
    factors: int
    collectives: Calls
    last_collectives: Calls


def profile_chunk(run: RunConfig, vp_stage: int, layers: int) -> ChunkProfile:
    """Profile a chunk of `layers` layers: every layer after the second one needs what the second one needs.

    Args:
        run: the run's settings.
        vp_stage: which chunk of this rank, from 0. Inside a simulated world (see parallel.simulate).
        layers: layers of the chunk.
    """
    measured = [_measure(_with_layers(run, count), vp_stage) for count in range(1, min(layers, 2) + 1)]
    if layers <= 2:
        return measured[-1]
    one, two = measured

    def extrapolate(first: int, second: int) -> int:
        return first + (layers - 1) * (second - first)

    def calls(part: Callable[[ChunkProfile], Calls]) -> Calls:
        return {key: extrapolate(part(one).get(key, 0), times) for key, times in part(two).items()}

    return ChunkProfile(
        activations=extrapolate(one.activations, two.activations),
        workspace=two.workspace,
        factors=extrapolate(one.factors, two.factors),
        collectives=calls(lambda profile: profile.collectives),
        last_collectives=calls(lambda profile: profile.last_collectives),
    )


def hidden_shape(run: RunConfig) -> tuple[int, int, int]:
    """Shape [s, micro, h] (or [s / tp, micro, h] under sequence parallelism) of the activations between layers, and between stages."""
    split = run.parallel.tensor_parallel if run.parallel.sequence_parallel else 1
    return run.model.seq_length // split, run.train.micro_batch_size, run.model.hidden_size


def _with_layers(run: RunConfig, layers: int) -> RunConfig:
    """The run with `layers` layers per chunk."""
    chunks = run.parallel.pipeline_parallel * run.parallel.virtual_stages
    return dataclasses.replace(run, model=dataclasses.replace(run.model, num_layers=layers * chunks))


def _measure(run: RunConfig, vp_stage: int) -> ChunkProfile:
    config = transformer_config(run)
    chunk = build_model(run, config, vp_stage if run.parallel.virtual_stages > 1 else None)
    (wrapped,) = wrap_chunks(dataclasses.replace(run.parallel, overlap_grad_reduce=False), config, [chunk])
    micro, length = run.train.micro_batch_size, run.model.seq_length
    batch = {name: torch.empty(micro, length, dtype=torch.long) for name in ("tokens", "labels", "position_ids")}
    batch["loss_mask"] = torch.empty(micro, length)
    hidden = hidden_shape(run)
    with cached_factors([chunk], 2), MemoryMeter() as meter:

        def micro_batch() -> tuple[int, Calls]:
            with CollectiveCounter() as counter:
                held = _forward_and_backward(chunk, wrapped, batch, hidden, meter)
            return held, count_calls(counter.records)

        _, collectives = micro_batch()
        factors = meter.peak = meter.live
        activations, last_collectives = micro_batch()
        workspace = meter.peak - factors - activations
    return ChunkProfile(activations, workspace, factors, collectives, last_collectives)


def _forward_and_backward(
    chunk: MegatronModule, wrapped: DistributedDataParallel, batch: dict[str, Tensor], hidden: tuple[int, int, int], meter: MemoryMeter
) -> int:
    """One micro-batch as the pipeline schedules run it; returns the bytes that are kept between the two passes."""
    before, dtype = meter.live, chunk.config.params_dtype
    if not chunk.pre_process:
        chunk.set_input_tensor(torch.empty(hidden, dtype=dtype, requires_grad=True))  # as received
    output, loss_of = forward_step(iter([batch]), wrapped)
    if chunk.post_process:
        output = loss_of(output)[0]
    else:
        deallocate_output_tensor(output, chunk.config.deallocate_pipeline_outputs)  # as after sending it
    held = meter.live - before
    custom_backward(output, None if chunk.post_process else torch.empty(hidden, dtype=dtype))
    if not chunk.pre_process:
        chunk.set_input_tensor(None)
    return held
