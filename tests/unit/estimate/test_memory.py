"""Memory by part: against the allocator, against the paper's formula, and by what each part is divided."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.engine.forward import forward_step
from poet_megatron.estimate import profile as profiling
from poet_megatron.estimate.estimate import count_parameters, estimate
from poet_megatron.estimate.memory import table_1_elements
from poet_megatron.estimate.meter import MemoryMeter
from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix
from poet_megatron.model.build import build_chunks, transformer_config
from poet_megatron.model.init import initialize
from poet_megatron.parallel.context import parallel_context
from poet_megatron.parallel.data_parallel import wrap_chunks
from poet_megatron.parallel.deal import deal
from poet_megatron.parallel.simulate import simulated_world

BASE = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 192,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 4,
    "model.seq_length": 64,
    "model.vocab_size": 320,
    "poet.block_size": 16,
    "poet.compute": "input",
    "train.micro_batch_size": 2,
    "train.global_batch_size": 16,
}
RNG_STATES = 4 * 5056
"""Bytes of the random states that Megatron's recomputation keeps per layer, in CPU memory."""


def make(changes: dict | None = None) -> RunConfig:
    return load_config(None, [f"--{key}={value}" for key, value in {**BASE, **(changes or {})}.items()])


@functools.cache
def estimated(ranks: int = 1, **changes: object) -> dict[str, int]:
    """Bytes by part of the largest rank."""
    return estimate(make({key.replace("__", "."): value for key, value in changes.items()}), ranks).largest.memory_bytes


def allocator_record(run: RunConfig) -> tuple[int, int]:
    """(bytes kept between forward and backward, peak) of a micro-batch on a CPU, from the events of torch's allocator."""
    with parallel_context(run.parallel, 0):
        config = transformer_config(run)
        chunks = build_chunks(run, config)
        initialize(chunks[0], run.model, 0)
        (wrapped,) = wrap_chunks(run.parallel, config, chunks)
        shape = (run.train.micro_batch_size, run.model.seq_length)
        batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "labels", "position_ids")}
        batch["loss_mask"] = torch.ones(shape)
        with cached_factors(chunks, 2):
            output, loss_of = forward_step(iter([batch]), wrapped)
            loss_of(output)[0].backward()
            del output, loss_of
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as forward:
                output, loss_of = forward_step(iter([batch]), wrapped)
                loss = loss_of(output)[0]
            kept, peak = _sum_and_peak(forward)
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as backward:
                loss.backward()
    return kept, max(peak, kept + _sum_and_peak(backward)[1])


def _sum_and_peak(record: profile) -> tuple[int, int]:
    live = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return live, peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": "adamw"},
        {"model.num_query_groups": 2, "method": "adamw", "train.precision": "fp32"},
        {"parallel.recompute": "full", "method": "adamw"},
        {"parallel.recompute": "selective", "method": "adamw"},
        pytest.param({"train.precision": "fp32"}, marks=pytest.mark.slow),
        pytest.param({"poet.compute": "weight"}, marks=pytest.mark.slow),
        pytest.param({"poet.variant": "fs", "poet.block_size": 0.5}, marks=pytest.mark.slow),
        pytest.param({"parallel.recompute": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_activations_and_peak_are_those_of_the_allocator(changes: dict):
    """Within 1 %: kept between the passes, and the peak of both. The rest are loss scalars, and random states under recomputation."""
    run = make(changes)
    with simulated_world(run.parallel, 1, 0, fused_norms=False):
        found = profiling.profile_chunk(run, 0, run.model.num_layers)
    kept, peak = allocator_record(run)
    states = RNG_STATES * run.model.num_layers if run.parallel.recompute != "none" else 0
    assert abs(kept - found.activations) <= 0.01 * kept + states
    assert abs(peak - found.activations - found.workspace) <= 0.01 * peak + states


@pytest.mark.parametrize(
    "changes",
    [{"method": "adamw"}, *(pytest.param(c, marks=pytest.mark.slow) for c in ({"poet.compute": "weight"}, {"parallel.recompute": "full"}))],
    ids=str,
)
def test_layers_beyond_the_second_are_like_the_second(changes: dict):
    """The profile of 4 layers, extrapolated from 1 and 2, is that of running all 4."""
    run = make({**changes, "model.num_layers": 4, "parallel.tensor_parallel": 2, "parallel.sequence_parallel": "true"})
    with simulated_world(run.parallel, 2, 0):
        assert profiling.profile_chunk(run, 0, 4) == profiling._measure(run, 0)


def test_fused_norms_keep_less():
    """The input, which is there anyway, and one fp32 number per row, instead of two fp32 copies, of every norm."""
    run = make({"method": "adamw"})
    kept = []
    for fused in (False, True):
        with simulated_world(run.parallel, 1, 0, fused_norms=fused):
            kept.append(profiling.profile_chunk(run, 0, 2).activations)
    tokens = run.train.micro_batch_size * run.model.seq_length
    assert kept[0] - kept[1] == pytest.approx(5 * 2 * 4 * tokens * run.model.hidden_size, rel=0.3)


@pytest.mark.parametrize(("inputs", "outputs", "block"), [(64, 64, 16), (256, 96, 32), (512, 1280, 256)])
def test_table_1_block_stochastic(inputs: int, outputs: int, block: int):
    """mn + 3/2 (m + n)(b - 1)."""
    matrix = RotatedMatrix(inputs, outputs, PoetConfig(block_size=block), MatrixId(0, 0, 0), device="meta")
    assert 2 * table_1_elements([matrix]) == 2 * inputs * outputs + 3 * (inputs + outputs) * (block - 1)


@pytest.mark.parametrize(("width", "fraction"), [(64, 0.25), (256, 0.5), (1024, 0.125)])
def test_table_1_fully_stochastic(width: int, fraction: float):
    """mn + 3 b (b - 1), with the same b on both sides."""
    matrix = RotatedMatrix(width, width, PoetConfig(variant="fs", block_size=fraction), MatrixId(0, 0, 0), device="meta")
    block = int(width * fraction)
    assert table_1_elements([matrix]) == width * width + 3 * block * (block - 1)


def test_table_1_of_a_model_is_what_its_parts_hold():
    """W0 and, of the rotated parameters, one weight and two moments each; shared factors once."""
    counts = count_parameters(make({"poet.share_input_rotation": "true"}))
    frozen = estimated()["frozen W0"] // 2
    assert counts.table_1_elements == frozen + 3 * counts.rotated_parameters


def test_factors_are_increments_their_gradients_and_permutations():
    """bf16: an increment in fp32 and cast, the fp32 sum of its gradient; two int32 permutations per side."""
    run = make()
    hidden, ffn = run.model.hidden_size, run.model.ffn_hidden_size
    widths = 8 * hidden + 2 * (hidden + ffn) + (ffn + hidden)  # both sides of q, k, v, o; gate, up; down
    blocks = widths * 16  # sum of b^2
    per_layer = blocks * (4 + 2 + 4) + widths * 2 * 4
    positions = 4 * run.model.head_size * (run.model.seq_length + 1 / 2)  # table of rotary positions and its frequencies
    assert estimated()["factors"] == run.model.num_layers * per_layer + positions


def test_masters_are_dealt_to_replicas_in_whole_matrices():
    run = make({"train.global_batch_size": 24})
    hidden, ffn = run.model.hidden_size, run.model.ffn_hidden_size
    sizes = run.model.num_layers * ([hidden * hidden] * 4 + [hidden * ffn] * 3)
    shares = [0, 0, 0]
    for size, owner in zip(sizes, deal(sizes, 3), strict=True):
        shares[owner] += 4 * size
    assert estimated(ranks=3, train__global_batch_size=24)["fp32 master of W0"] == max(shares) < 4 * sum(sizes)
    assert estimated(train__precision="fp32")["fp32 master of W0"] == 0


def test_the_distributed_optimizer_divides_its_state_only():
    dense = {"ranks": 4, "method": "adamw"}
    whole, sharded = estimated(**dense), estimated(**dense, parallel__distributed_optimizer="true")
    assert sharded["optimizer"] == pytest.approx(whole["optimizer"] / 4, rel=0.02)
    for part in ("factors", "activations"):
        assert sharded[part] == whole[part]
    assert whole["gradients"] <= sharded["gradients"] <= 1.02 * whole["gradients"]  # padded to equal shards


def test_tensor_and_sequence_parallelism_divide_activations():
    dense = {"ranks": 4, "method": "adamw"}
    one, tensor = estimated(**dense), estimated(**dense, parallel__tensor_parallel=4)
    sequence = estimated(**dense, parallel__tensor_parallel=4, parallel__sequence_parallel="true")
    assert tensor["trainable weights"] == pytest.approx(one["trainable weights"] / 4, rel=0.01)
    assert one["activations"] / 4 < sequence["activations"] < tensor["activations"] < one["activations"]


def test_recomputation_trades_activations_for_workspace():
    none, selective, full = (
        estimated(model__num_layers=4, parallel__recompute=mode, method="adamw") for mode in ("none", "selective", "full")
    )
    assert full["activations"] < selective["activations"] < none["activations"]
    assert full["workspace"] > none["workspace"]
    assert full["activations"] + full["workspace"] < none["activations"] + none["workspace"]


def test_whole_model_counts_do_not_depend_on_the_layout():
    plain = count_parameters(make({"poet.shard_groups": 4}))
    for changes in (
        {"parallel.tensor_parallel": 2},
        {"parallel.tensor_parallel": 4, "parallel.sequence_parallel": "true", "parallel.pipeline_parallel": 2},
    ):
        assert count_parameters(make({"poet.shard_groups": 4, **changes})) == plain
    groups = count_parameters(make({"parallel.tensor_parallel": 4}))
    assert groups == plain  # shard groups are as many as tensor-parallel ranks unless they are set


@pytest.mark.parametrize("method", ["adamw", pytest.param("poet", marks=pytest.mark.slow)])
def test_stages_add_up_to_the_model(method: str):
    run = make({"method": method, "model.num_layers": 8, "parallel.pipeline_parallel": 2, "parallel.virtual_stages": 2})
    found = estimate(run, 2)
    assert [stage.layers for stage in found.stages] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    whole = estimated(model__num_layers=8, method=method)
    for part in ("frozen W0", "fp32 master of W0", "trainable weights", "gradients", "optimizer"):
        assert sum(stage.memory_bytes[part] for stage in found.stages) == whole[part]


def test_the_meter_follows_storages():
    with simulated_world(make().parallel, 1, 0), MemoryMeter() as meter:
        first = torch.empty(100)
        second = first.view(10, 10).t()
        assert (meter.live, meter.peak) == (400, 400)
        third = second.contiguous() + 1
        assert (meter.live, meter.peak) == (800, 1200)
        del first, third
        assert meter.live == 400
        second.add_(1)
        assert meter.live == 400
        del second
        assert (meter.live, meter.peak) == (0, 1200)


def test_an_estimate_leaves_torch_as_it_was():
    state = torch.get_rng_state()
    estimate(make({"method": "adamw"}))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.distributed.is_initialized()
    assert torch.zeros(1).device.type == "cpu"
