"""R:P budgets: frozen sides, what one-sided rotation keeps (hyperspherical energy), and impossible block sizes."""

import pytest
import torch
from torch import nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.linear import PoetLinear
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix
from poet_megatron.layers.side import SideLayout


def test_both_sides_frozen_is_the_plain_linear_layer():
    torch.manual_seed(0)
    linear = nn.Linear(33, 20)
    expected_weight = linear.weight.detach().clone()
    layer = PoetLinear.from_linear(linear, PoetConfig(block_size=0))
    x = torch.randn(4, 6, 33, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, linear(x))  # bitwise: the same kernel on the same numbers
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(linear(x).square().sum(), x)
    assert torch.equal(grad, expected)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    layer.matrix.merge()
    assert torch.equal(layer.matrix.weight, expected_weight)
    assert torch.equal(layer.state_dict()["matrix.weight"], expected_weight)


@pytest.mark.parametrize("variant", ["bs", "fs"])
@pytest.mark.parametrize("frozen", ["in", "out"])
def test_a_frozen_side_has_no_parameters_and_never_moves(variant, frozen):
    config = PoetConfig(variant=variant, block_size=8, **{f"block_size_{frozen}": 0})
    matrix = RotatedMatrix(24, 16, config, MatrixId(0, 0, 0))
    names = [name for name, p in matrix.named_parameters() if p.requires_grad]
    assert names == ["rotation_out.skew" if frozen == "in" else "rotation_in.skew"]
    blocks = {"bs": {"in": 3, "out": 2}, "fs": {"in": 1, "out": 1}}[variant]["out" if frozen == "in" else "in"]
    assert sum(p.numel() for p in matrix.parameters() if p.requires_grad) == blocks * 8 * 7 // 2


def hyperspherical_energy(weight):
    """Eq. (1): the sum over pairs i != j of |w_i/|w_i| - w_j/|w_j||^-1; the neurons w_i are the columns of W, rows of [out, in]."""
    directions = weight.double() / weight.double().norm(dim=1, keepdim=True)
    distances = (directions[:, None] - directions[None, :]).norm(dim=-1)
    off_diagonal = ~torch.eye(len(weight), dtype=torch.bool)
    return distances[off_diagonal].reciprocal().sum().item()


def energy_after_merges(block_in, block_out, variant="bs", neuron_scale=None):
    config = PoetConfig(variant=variant, block_size_in=block_in, block_size_out=block_out, orthogonal_map="cayley")
    matrix = RotatedMatrix(48, 64, config, MatrixId(5, 0, 0))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 48, generator=generator)
    matrix.load_canonical(weight if neuron_scale is None else weight * neuron_scale)
    before = hyperspherical_energy(matrix.canonical(matrix.weight))
    for _ in range(10):
        for rotation in (matrix.rotation_in, matrix.rotation_out):
            if rotation.skew is not None:
                rotation.skew.data.normal_(0, 0.1, generator=generator)
        matrix.merge()
    after = matrix.canonical(matrix.weight)
    assert (after - weight).norm() > 0.5 * weight.norm()  # moved far
    return before, hyperspherical_energy(after)


@pytest.mark.parametrize("scale", [None, "uneven"])
@pytest.mark.parametrize(("variant", "block"), [("bs", 16), ("fs", 1.0), ("fs", 0.5)])
def test_input_side_only_keeps_hyperspherical_energy(variant, block, scale):
    """R:P = 1:0 rotates every neuron by the same matrix, so all distances stay (orthogonal training)."""
    before, after = energy_after_merges(block, 0, variant, None if scale is None else torch.linspace(0.5, 2, 64)[:, None])
    # fp32 rounding over 10 merges is about 1e-7 per distance; the bar of the specification is 1e-5.
    assert after == pytest.approx(before, rel=1e-5)


@pytest.mark.parametrize(("block_in", "block_out"), [(16, 16), (0, 16)])
def test_an_output_side_changes_hyperspherical_energy(block_in, block_out):
    """R:P = 0.5:0.5 and 0:1 mix neurons: the energy is kept in distribution only, so it does change by more than rounding."""
    before, after = energy_after_merges(block_in, block_out)
    assert abs(after - before) > 5e-5 * before
    assert after == pytest.approx(before, rel=0.05)  # 4,032 pairs of near-orthogonal neurons: Gaussian neurons stay Gaussian


def test_block_sizes_per_side():
    layout = SideLayout.build(70, 1, 32, "bs")
    assert [(run.count, run.size, run.offset) for run in layout.runs] == [(2, 32, 0), (1, 6, 64)]
    assert layout.packed_per_group == 2 * 496 + 15
    assert layout.sum_squares == 2 * 32**2 + 36
    fraction = SideLayout.build(70, 2, 0.25, "fs")  # floor(0.25 x 35) = 8 per group
    assert [(run.count, run.size, run.offset) for run in fraction.runs] == [(2, 8, 0)]
    assert SideLayout.build(70, 1, 0, "bs").frozen and SideLayout.build(70, 1, 0, "fs").frozen
    with pytest.raises(ValueError, match="block size 0.01 is 0 of 70 features"):  # a typing error, not a frozen side
        SideLayout.build(70, 1, 0.01, "fs")


@pytest.mark.parametrize(("width", "groups", "block", "variant"), [(64, 1, 65, "bs"), (64, 1, 100, "fs"), (64, 4, 17, "fs")])
def test_blocks_larger_than_the_width_are_named(width, groups, block, variant):
    with pytest.raises(ValueError, match=rf"block size {block} is larger than the width {width // groups}"):
        SideLayout.build(width, groups, block, variant)


def test_groups_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match="shard_groups is 3, which does not divide a width of 64"):
        SideLayout.build(64, 3, 8, "bs")
