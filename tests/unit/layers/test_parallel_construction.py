"""Tensor-parallel layers as they are built: where the input is rotated, what Megatron is told of parameters, sizes that do not divide."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.cost import FLOPS_PER_BYTE, TensorParallelism, choose_placement, inside_cost, outside_cost
from poet_megatron.layers.parallel import Part, PoetColumnParallelLinear, PoetQkvLinear, PoetRowParallelLinear, PoetSpec
from poet_megatron.layers.side import SideLayout


class Group:
    """As much of a process group as building a layer takes."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


def build(kind, inputs, outputs, group, sequence_parallel=False, bias=False, tokens=10**6, **poet):
    """A layer on the meta device with parts named in `outputs`."""
    heads = outputs["k"] // 8 if "k" in outputs else 4
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16 * heads,
        num_attention_heads=2 * heads,
        num_query_groups=heads,
        kv_channels=8,
        use_cpu_initialization=True,
        tensor_model_parallel_size=group.size() if sequence_parallel else 1,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.bfloat16,
    )
    parts = tuple(Part(name, number, size) for number, (name, size) in enumerate(outputs.items()))
    spec = PoetSpec(PoetConfig(**poet), 0, 0, parts, tokens)
    with torch.device("meta"):
        return kind(inputs, sum(outputs.values()), config=config, init_method=None, poet=spec, bias=bias, tp_group=group)


QKV = {"q": 64, "k": 32, "v": 32}


# -- placement --


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tp_placement": "outside"}, "outside"),
        ({"tp_placement": "inside"}, "inside"),
        ({}, "inside"),
        ({"share_input_rotation": True, "tp_placement": "outside"}, "shared"),
        ({"compute": "weight", "tp_placement": "outside"}, "inside"),  # nothing rotates activations: one copy or gather serves all
        ({"block_size_in": 0, "tp_placement": "outside"}, "inside"),
    ],
)
def test_placement_follows_the_settings(settings, expected):
    settings = {"block_size": 8, "compute": "input", **settings}
    assert build(PoetQkvLinear, 64, QKV, Group(4), **settings).placement == expected


def test_a_single_part_and_a_single_rank_are_outside():
    assert build(PoetColumnParallelLinear, 64, {"q": 64}, Group(4), block_size=8, tp_placement="inside").placement == "outside"
    assert build(PoetQkvLinear, 64, QKV, Group(1), block_size=8, compute="input").placement == "outside"


def sides(width, block, parts):
    return [SideLayout.build(width, 8, block, "bs")] * parts


def test_costs_by_hand():
    """Three rotated inputs of 1,000 tokens, 64 features in bf16, blocks of 8 on 4 ranks."""
    rotating, tokens = sides(64, 8, 3), 1000
    activation, flops, skews = 1000 * 64 * 2 * 2 * 3 / 4, 6 * 1000 * 3 * 64 * 8, 3 * 8 * 28 * 4 * 2 * 3 / 4
    for sp in (False, True):
        tp = TensorParallelism(4, sp, 2)
        assert inside_cost(tokens, rotating, tp) == pytest.approx(flops + FLOPS_PER_BYTE * (activation + skews))
        own, reduced = (flops / 4, skews) if sp else (flops, 0)
        assert outside_cost(tokens, 3, rotating, tp) == pytest.approx(own + FLOPS_PER_BYTE * (3 * activation + reduced))
        assert outside_cost(tokens, 4, rotating, tp) == pytest.approx(own + FLOPS_PER_BYTE * (4 * activation + reduced))


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize(("parts", "block"), [(3, 256), (2, 256), (3, 512), (2, 512), (3, 1024), (2, 1024)])
def test_under_sequence_parallelism_large_blocks_are_rotated_outside(size, parts, block):
    """Inside repeats the rotation, 6 n b flops per feature and token, and saves n - 1 gathers, 2 x 2 bytes each (with their way back):
    the balance is at b = 4 (n - 1) / (6 n) x FLOPS_PER_BYTE, about 590 for three parts and 440 for two, for any number of ranks."""
    rotating = [SideLayout.build(8192, 1, block, "bs")] * parts
    balance = 4 * (parts - 1) / (6 * parts) * FLOPS_PER_BYTE
    expected = "inside" if block < balance else "outside"
    assert choose_placement("auto", 10**6, parts, rotating, TensorParallelism(size, True, 2)) == expected


def test_without_sequence_parallelism_inside_repeats_nothing():
    """It costs an all-reduce of the factors' gradients per step, so only a handful of tokens makes outside cheaper."""
    rotating, tp = sides(8192, 1024, 3), TensorParallelism(8, False, 2)
    assert choose_placement("auto", 4096, 3, rotating, tp) == "inside"
    assert choose_placement("auto", 64, 3, rotating, tp) == "outside"


# -- what Megatron is told --


def marks(parameter):
    split = getattr(parameter, "tensor_model_parallel", False)
    return (split, getattr(parameter, "partition_dim", None), getattr(parameter, "sequence_parallel", False))


SPLIT, WHOLE, SUMMED = (True, 0, False), (False, None, False), (False, None, True)


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize(
    ("settings", "partial"),
    [
        ({"tp_placement": "outside"}, False),
        ({"tp_placement": "inside"}, True),
        ({"share_input_rotation": True}, False),
        ({"share_input_rotation": True, "compute": "weight"}, True),
        ({"compute": "weight"}, True),
    ],
)
def test_marks_of_a_column_parallel_layer(settings, partial, sp):
    settings = {"block_size": 8, "compute": "input", **settings}
    group = Group(4, 1)
    layer = build(PoetQkvLinear, 64, QKV, group, sequence_parallel=sp, bias=True, **settings)
    assert marks(layer.bias) == SPLIT
    for matrix in layer.parts:
        assert marks(matrix.weight) == SPLIT
        assert marks(matrix.rotation_out.skew) == SPLIT
        assert matrix.rotation_out.partial_over is None
        assert marks(matrix.rotation_in.skew) == (SUMMED if sp and not partial else WHOLE)
        assert matrix.rotation_in.partial_over is (group if partial else None)


@pytest.mark.parametrize("sp", [False, True])
@pytest.mark.parametrize("compute", ["input", "weight"])
def test_marks_of_a_row_parallel_layer(compute, sp):
    group = Group(4, 1)
    layer = build(PoetRowParallelLinear, 64, {"o": 32}, group, sequence_parallel=sp, bias=True, block_size=8, compute=compute)
    (matrix,) = layer.parts
    assert marks(matrix.weight) == (True, 1, False)
    assert marks(matrix.rotation_in.skew) == SPLIT
    assert marks(layer.bias) == (SUMMED if sp else WHOLE)
    assert marks(matrix.rotation_out.skew) == (SUMMED if sp and compute == "input" else WHOLE)
    assert matrix.rotation_out.partial_over is (group if compute == "weight" else None)
    assert matrix.rotation_in.partial_over is None


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_take_the_same_decisions(size):
    decided = set()
    for rank in range(size):
        layer = build(PoetQkvLinear, 64, {"q": 64, "k": 32, "v": 32}, Group(size, rank), block_size=8, shard_groups=4)
        decided.add((layer.placement, *(matrix.compute for matrix in layer.parts)))
    assert len(decided) == 1


# -- sizes --


def test_ragged_shards_of_the_1_3b_model():
    """5376 / 8 = 672 features per shard: two blocks of 256 and one of 160, on the split side and on the replicated one."""
    up = build(PoetColumnParallelLinear, 2048, {"gate": 5376, "up": 5376}, Group(8, 3), block_size=256)
    down = build(PoetRowParallelLinear, 5376, {"down": 2048}, Group(8, 3), block_size=256)
    for rotation in (up.parts[0].rotation_out, down.parts[0].rotation_in):
        assert [(run.count, run.size, run.offset) for run in rotation.layout.runs] == [(2, 256, 0), (1, 160, 512)]
        assert rotation.first_group == 3 and rotation.skew.shape == (1, 2 * 256 * 255 // 2 + 160 * 159 // 2)
    replicated = up.parts[0].rotation_in
    assert (replicated.layout.groups, replicated.layout.group_width, replicated.first_group) == (8, 256, 0)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_blocks_are_capped_at_the_width_of_a_shard_group(size):
    """On every number of ranks, also where a rank has a single group."""
    layer = build(PoetColumnParallelLinear, 64, {"q": 32}, Group(size, size - 1), block_size=24, shard_groups=4)
    (matrix,) = layer.parts
    assert matrix.rotation_in.layout.block_size == 16 and matrix.rotation_out.layout.block_size == 8
    local = 4 // size
    assert (matrix.rotation_out.layout.groups, matrix.rotation_out.first_group) == (local, 4 - local)


def test_blocks_wider_than_an_undivided_side_are_refused():
    with pytest.raises(ValueError, match="block size 65 is larger than the width 64"):
        build(PoetColumnParallelLinear, 64, {"q": 96}, Group(1), block_size=65)


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "size", "poet", "message"),
    [
        (PoetRowParallelLinear, 64, {"o": 64}, 3, {"shard_groups": 4}, "tensor_parallel is 3, which does not divide poet.shard_groups = 4"),
        (PoetRowParallelLinear, 66, {"o": 64}, 2, {"shard_groups": 4}, "shard_groups is 4, which does not divide the 66 inputs of o"),
        (PoetRowParallelLinear, 64, {"o": 66}, 2, {"shard_groups": 4}, "shard_groups is 4, which does not divide the 66 outputs of o"),
        (PoetColumnParallelLinear, 64, {"gate": 63, "up": 63}, 2, {}, "shard_groups is 2, which does not divide the 63 outputs of gate"),
        (PoetColumnParallelLinear, 63, {"gate": 64, "up": 64}, 2, {}, "tensor_parallel = 2 that divides every width"),
        (
            PoetQkvLinear,
            48,
            {"q": 48, "k": 24, "v": 24},
            4,
            {},
            "num_query_groups is 3, which parallel.tensor_parallel = 4 does not divide",
        ),
    ],
)
def test_sizes_that_do_not_divide_are_named(kind, inputs, outputs, size, poet, message):
    with pytest.raises(ValueError, match=message):
        build(kind, inputs, outputs, Group(size), block_size=8, **poet)


def test_unknown_placements_are_refused():
    with pytest.raises(ValueError, match="poet.tp_placement is 'within'; choose one of auto, outside, inside"):
        PoetConfig(tp_placement="within")


# -- compute: auto --


@pytest.mark.parametrize(("sp", "expected"), [(False, "weight"), (True, "input")])
@pytest.mark.parametrize(
    ("kind", "inputs", "outputs", "settings"),
    [
        (PoetRowParallelLinear, 5376, {"down": 2048}, {}),
        (PoetColumnParallelLinear, 2048, {"q": 2048}, {}),
        (PoetColumnParallelLinear, 2048, {"gate": 5376, "up": 5376}, {"tp_placement": "outside"}),
        (PoetColumnParallelLinear, 2048, {"gate": 2048, "up": 2048}, {"share_input_rotation": True}),
    ],
)
def test_auto_counts_the_tokens_that_a_rank_rotates(kind, inputs, outputs, settings, sp, expected):
    """On 8 ranks a 256 x 256 block of a replicated factor costs as much as the GEMM that it feeds, or under sequence parallelism an eighth
    of it: 4mn + 6b(m/8 + n) per token against 6mn."""
    layer = build(kind, inputs, outputs, Group(8), sequence_parallel=sp, block_size=256, **settings)
    assert {matrix.compute for matrix in layer.parts} == {expected}
