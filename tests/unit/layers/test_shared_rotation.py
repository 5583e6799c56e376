"""Matrices that share one R: one parameter, gradients added up once, merged and loaded together."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix
from poet_megatron.layers.parallel import Part, PoetColumnParallelLinear, PoetSpec
from poet_megatron.ops.cayley import OrthogonalMap

WIDTH_IN, WIDTHS_OUT = 20, {"q": 12, "k": 6, "v": 6}
CONFIG = PoetConfig(block_size=4, orthogonal_map="cayley")


def fill(matrices, seed=0):
    """Random weights and skews; a shared skew is drawn for each sharer, the last draw counts."""
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        matrix.load_canonical(torch.randn(matrix.weight.shape, generator=generator, dtype=torch.float64))
        for rotation in (matrix.rotation_in, matrix.rotation_out):
            rotation.skew.data.normal_(0, 0.2, generator=generator)


def sharers(config=CONFIG):
    """Three float64 matrices on one R."""
    first = RotatedMatrix(WIDTH_IN, 12, config, MatrixId(3, 1, 0), dtype=torch.float64)
    others = [RotatedMatrix(WIDTH_IN, 6, config, MatrixId(3, 1, i), dtype=torch.float64, shares_with=first) for i in (1, 2)]
    layer = nn.ModuleDict({name: matrix.double() for name, matrix in zip("qkv", [first, *others], strict=True)})
    fill(layer.values())
    return layer


def randn(*shape, seed=9):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_rotation_is_listed_with_its_owner_only():
    layer = sharers()
    assert [name for name, _ in layer.named_parameters() if "rotation_in" in name] == ["q.rotation_in.skew"]
    assert [key for key in layer.state_dict() if "rotation_in" in key] == ["q.rotation_in.skew"]
    assert layer["k"].rotation_in is layer["v"].rotation_in is layer["q"].rotation_in
    assert layer["k"].rotation_in.skew.dtype == torch.float64  # moved and converted with its owner
    copied = copy.deepcopy(layer)
    assert copied["k"].rotation_in is copied["q"].rotation_in is not layer["q"].rotation_in


def merge_all(matrices):
    merged = [matrix.merged() for matrix in matrices]
    for matrix in matrices:
        matrix.restart()
    for matrix, weight in zip(matrices, merged, strict=True):
        matrix.load_canonical(weight)


def test_merging_the_sharers_together_keeps_the_function():
    layer = sharers()
    x = randn(5, WIDTH_IN)
    for index in (1, 2):
        before, permutation = [matrix(x).detach() for matrix in layer.values()], layer["q"].rotation_in.perm.clone()
        merge_all(layer.values())
        for matrix, expected in zip(layer.values(), before, strict=True):
            torch.testing.assert_close(matrix(x).detach(), expected, atol=1e-12, rtol=0)
            assert matrix.merge_index == index
        assert not layer["q"].rotation_in.skew.any()
        assert not torch.equal(layer["q"].rotation_in.perm, permutation)
        lone = RotatedMatrix(WIDTH_IN, 12, CONFIG, MatrixId(3, 1, 0))
        lone.set_merge_index(index)
        assert torch.equal(layer["q"].rotation_in.perm, lone.rotation_in.perm)  # one draw ahead, however many sharers restart
        for matrix in layer.values():
            matrix.rotation_in.skew.data.normal_(0, 0.2)


def test_merging_one_sharer_alone_is_refused():
    layer = sharers()
    with pytest.raises(RuntimeError, match="R is shared by 3 matrices"):
        layer["k"].merge()


@pytest.mark.parametrize("first", ["q", "k"])
def test_setting_the_merge_index_of_one_sharer_restores_all(first):
    layer = sharers()
    canonical = [matrix.canonical(matrix.weight) for matrix in layer.values()]
    stored = [matrix.weight.clone() for matrix in layer.values()]
    layer[first].set_merge_index(4)
    for _ in range(2):
        assert [matrix.merge_index for matrix in layer.values()] == [4, 4, 4]
        for matrix, weight, old in zip(layer.values(), canonical, stored, strict=True):
            assert torch.equal(matrix.canonical(matrix.weight), weight)
            assert not torch.equal(matrix.weight, old)
        for matrix in layer.values():  # as optim does it, one after the other
            matrix.set_merge_index(4)


@pytest.mark.parametrize("earlier", [0, 2, 5])
def test_state_dict_round_trip(earlier):
    layer, other = sharers(), sharers()
    for _ in range(2):
        merge_all(layer.values())
    fill(layer.values(), seed=4)
    other["v"].set_merge_index(earlier)
    other.load_state_dict(copy.deepcopy(layer.state_dict()))
    x = randn(5, WIDTH_IN)
    for ours, theirs in zip(layer.values(), other.values(), strict=True):
        assert torch.equal(ours(x), theirs(x))
        assert torch.equal(ours.weight, theirs.weight)


# -- the parallel layer on one rank --


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def parallel_layer(group, compute, blocks=(4, 4)):
    poet = PoetConfig(
        block_size_in=blocks[0], block_size_out=blocks[1], orthogonal_map="cayley", share_input_rotation=True, compute=compute
    )
    config = TransformerConfig(
        num_layers=1, hidden_size=WIDTH_IN, num_attention_heads=1, use_cpu_initialization=True, params_dtype=torch.float64
    )
    parts = tuple(Part(name, number, size) for number, (name, size) in enumerate(WIDTHS_OUT.items()))
    spec = PoetSpec(poet, 3, 1, parts, 10**6)
    return PoetColumnParallelLinear(WIDTH_IN, 24, config=config, init_method=None, poet=spec, tp_group=group)


def copies(layer):
    """Lone matrices with the same function, each with an R of its own."""
    lone = []
    for number, matrix in enumerate(layer.parts):
        copied = RotatedMatrix(WIDTH_IN, matrix.weight.shape[0], CONFIG, MatrixId(3, 1, number), dtype=torch.float64).double()
        copied.rotation_in = copy.deepcopy(matrix.rotation_in)
        copied.rotation_out.load_state_dict(matrix.rotation_out.state_dict())
        copied.load_canonical(matrix.canonical(matrix.weight))
        lone.append(copied)
    return lone


@pytest.mark.parametrize("compute", ["input", "weight"])
def test_gradients_of_the_shared_rotation_add_up(compute, group, monkeypatch):
    """R's gradient is the sum of those of three copies, delivered once per step; its map and its map's gradient are computed once."""
    layer = parallel_layer(group, compute)
    fill(layer.parts)
    assert layer.placement == "shared" and {matrix.compute for matrix in layer.parts} == {compute}
    lone = copies(layer)
    xs, grads = [randn(4, 1, WIDTH_IN, seed=seed).requires_grad_() for seed in (1, 2)], [randn(4, 1, 24, seed=seed) for seed in (3, 4)]
    expected_xs = [x.detach().clone().requires_grad_() for x in xs]
    outputs = [torch.cat([matrix(x) for matrix in lone], dim=-1) for x in expected_xs]
    for output, grad in zip(outputs, grads, strict=True):
        output.backward(grad)

    calls = {"increment": 0, "increment_grad": 0}
    for name in calls:
        original = getattr(OrthogonalMap, name)

        def counted(self, *args, name=name, original=original):
            calls[name] += 1
            return original(self, *args)

        monkeypatch.setattr(OrthogonalMap, name, counted)
    fired = []
    layer.parts[0].rotation_in.skew.register_post_accumulate_grad_hook(lambda parameter: fired.append(parameter.grad.clone()))
    with cached_factors([layer], 2):
        for x, grad, output in zip(xs, grads, outputs, strict=True):
            y = layer(x)[0]
            torch.testing.assert_close(y, output, atol=1e-12, rtol=0)
            y.backward(grad)
    runs = len(layer.parts[0].rotation_in.layout.runs) + sum(len(matrix.rotation_out.layout.runs) for matrix in layer.parts)
    assert calls == {"increment": runs, "increment_grad": runs}
    assert len(fired) == 1
    total = sum(matrix.rotation_in.skew.grad for matrix in lone)
    torch.testing.assert_close(fired[0], total, atol=1e-12, rtol=0)
    for x, expected in zip(xs, expected_xs, strict=True):
        torch.testing.assert_close(x.grad, expected.grad, atol=1e-12, rtol=0)
    for matrix, copied in zip(layer.parts, lone, strict=True):
        torch.testing.assert_close(matrix.rotation_out.skew.grad, copied.rotation_out.skew.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("blocks", "alone", "together"),
    [((4, 0), {"input", "weight"}, "input"), ((6, 2), {"weight"}, "input"), ((4, 4), {"weight"}, "weight")],
)
def test_parts_that_share_r_decide_together(blocks, alone, together, group):
    """One rotation for three makes rotating activations cheaper than it is for each alone."""
    config = PoetConfig(block_size_in=blocks[0], block_size_out=blocks[1])
    lone = [RotatedMatrix(WIDTH_IN, size, config, MatrixId(0, 0, 0), tokens_per_step=10**6) for size in WIDTHS_OUT.values()]
    assert {matrix.compute for matrix in lone} == alone
    layer = parallel_layer(group, "auto", blocks)
    assert {matrix.compute for matrix in layer.parts} == {together}
    assert (layer.effective is not None) == (together == "weight")


def test_a_single_part_shares_with_nobody(group):
    config = TransformerConfig(num_layers=1, hidden_size=20, num_attention_heads=1, use_cpu_initialization=True)
    spec = PoetSpec(PoetConfig(block_size=4, share_input_rotation=True), 3, 1, (Part("o", 3, 12),), 100)
    layer = PoetColumnParallelLinear(WIDTH_IN, 12, config=config, init_method=None, poet=spec, tp_group=group)
    assert layer.placement == "outside" and len(layer.parts[0].sharers) == 1
