"""Merging, wrapping and saving do not change the function of a layer."""

import copy

import pytest
import torch
from torch import nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.linear import PoetLinear
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix
from poet_megatron.ops.skew import skew_unpack

CONFIGS = {
    "bs": {"variant": "bs", "block_size": 16},
    "bs-ragged": {"variant": "bs", "block_size": 12},
    "fs": {"variant": "fs", "block_size": 0.5},
    "fs-weight": {"variant": "fs", "block_size": 0.5, "compute": "weight"},
    "one-sided": {"variant": "bs", "block_size_in": 16, "block_size_out": 0},
}
MAPS = [{"orthogonal_map": "cayley"}, {"orthogonal_map": "cayley-neumann"}, {"orthogonal_map": "cayley-neumann", "neumann_terms": 3}]


def dense_layer(dtype=torch.float32):
    """64 -> 48 with a bias; outputs are of order 1 for inputs of order 1."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 48, dtype=dtype)
    nn.init.normal_(linear.weight, std=64**-0.5)
    nn.init.normal_(linear.bias)
    return linear


def rotations(layer):
    return [r for r in (layer.matrix.rotation_in, layer.matrix.rotation_out) if r.skew is not None]


def randomize_skews(layer, norm=0.5):
    """Random skews whose blocks have |Q|_2 of about `norm` (norm of a b x b Gaussian skew: 2 sqrt(b) std)."""
    generator = torch.Generator().manual_seed(1)
    for rotation in rotations(layer):
        std = norm / (2 * rotation.layout.block_size**0.5)
        rotation.skew.data.normal_(0, std, generator=generator)


def inputs(dtype=torch.float32):
    return torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("orthogonal_map", MAPS, ids=["cayley", "T4", "T3"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_keeps_the_function_and_reinitializes(name, orthogonal_map, master):
    linear = dense_layer()
    bias = linear.bias.detach().clone()
    layer = PoetLinear.from_linear(linear, PoetConfig(**CONFIGS[name], **orthogonal_map), MatrixId(3, 1, 2))
    if master:
        layer.matrix.keep_master()
    x = inputs()
    for index in range(1, 4):
        randomize_skews(layer)
        before = layer(x).detach()
        assert (before - linear(x)).abs().max() > 0.1  # the rotations do something
        permutations = [rotation.perm.clone() for rotation in rotations(layer)]
        layer.matrix.merge()
        after = layer(x).detach()
        # fp32 sums of 64 terms of order 1 in another order, seen relative to the largest output (about 5): the bar is 1e-6.
        assert (after - before).abs().max() < 1e-6 * before.abs().max()
        assert layer.matrix.merge_index == index
        for rotation, permutation in zip(rotations(layer), permutations, strict=True):
            assert not rotation.skew.any()
            assert not torch.equal(rotation.perm, permutation)
            assert torch.equal(rotation.perm[rotation.inverse], torch.arange(rotation.layout.width))
        assert torch.equal(layer.bias, bias)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_keeps_the_function_in_float64(name):
    layer = PoetLinear.from_linear(dense_layer(torch.float64), PoetConfig(**CONFIGS[name])).double()
    randomize_skews(layer, 1.0)
    before = layer(inputs(torch.float64)).detach()
    layer.matrix.merge()
    torch.testing.assert_close(layer(inputs(torch.float64)), before, atol=1e-13, rtol=0)  # as above with eps = 2e-16


def test_a_merge_leaves_parameters_in_place_and_the_weight_frozen():
    """Optimizers and data parallelism hold on to parameters: a merge writes into them."""
    layer = PoetLinear.from_linear(dense_layer(), PoetConfig(block_size=16))
    randomize_skews(layer)
    before = {name: (id(p), p.data_ptr()) for name, p in layer.named_parameters()}
    layer.matrix.merge()
    assert before == {name: (id(p), p.data_ptr()) for name, p in layer.named_parameters()}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        "bias",
        "matrix.rotation_in.skew",
        "matrix.rotation_out.skew",
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_wrapping_a_dense_layer_keeps_its_function(name):
    linear = dense_layer()
    layer = PoetLinear.from_linear(linear, PoetConfig(**CONFIGS[name]))
    x = inputs()
    expected = linear(x)
    # The same products in another order of summation; 64 terms, relative to the largest output. (A scrambled wrapper is off by O(1).)
    assert (layer(x) - expected).abs().max() < 1e-6 * expected.abs().max()
    assert torch.equal(layer.matrix.canonical(layer.matrix.weight), linear.weight)  # bitwise: only moved
    assert torch.equal(layer.matrix.merged(), linear.weight)  # zero skews are exactly the identity
    assert layer.bias is linear.bias


def test_wrapping_a_layer_without_bias():
    linear = nn.Linear(64, 48, bias=False)
    layer = PoetLinear.from_linear(linear, PoetConfig(block_size=16))
    assert layer.bias is None
    torch.testing.assert_close(layer(inputs()), linear(inputs()), atol=2e-6, rtol=0)  # as above, outputs up to 2


def test_the_bias_comes_after_p():
    """y(x) - y(0) is linear and y(0) is the bias itself, whatever the skews."""
    layer = PoetLinear.from_linear(dense_layer(), PoetConfig(block_size=16))
    randomize_skews(layer)
    assert torch.equal(layer(torch.zeros(1, 64))[0], layer.bias)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_state_dict_is_canonical_and_round_trips(name, master):
    config = PoetConfig(**CONFIGS[name])
    layer = PoetLinear.from_linear(dense_layer(), config, MatrixId(3, 1, 2))
    if master:
        layer.matrix.keep_master()
    for _ in range(3):
        randomize_skews(layer)
        layer.matrix.merge()
    canonical = layer.matrix.merged()  # skews are zero: W0 itself
    randomize_skews(layer)
    x = inputs()
    expected = layer(x)

    state = copy.deepcopy(nn.ModuleDict({"proj": layer}).state_dict())
    assert set(state) == {"proj.bias", "proj.matrix.weight", "proj.matrix._extra_state"} | {
        f"proj.matrix.rotation_{side}.skew" for side in ("in", "out") if getattr(layer.matrix, f"rotation_{side}").skew is not None
    }
    assert torch.equal(state["proj.matrix.weight"], canonical)
    assert not torch.equal(layer.matrix.weight, canonical)  # the stored order is another one

    for earlier in (0, 7):
        other = PoetLinear.from_linear(nn.Linear(64, 48), config, MatrixId(3, 1, 2))
        if master:
            other.matrix.keep_master()
        other.matrix.set_merge_index(earlier)
        other.matrix.set_merge_index(3)
        nn.ModuleDict({"proj": other}).load_state_dict(state)
        assert torch.equal(other(x), expected)
        assert torch.equal(other.matrix.weight, layer.matrix.weight)
        if master:
            assert torch.equal(other.matrix.master, layer.matrix.master)

    without_index = {key.removeprefix("proj."): value for key, value in state.items() if not key.endswith("_extra_state")}
    wrong = PoetLinear.from_linear(nn.Linear(64, 48), config, MatrixId(3, 1, 2))
    wrong.load_state_dict(without_index, strict=False)
    assert torch.equal(wrong.matrix.canonical(wrong.matrix.weight), canonical)  # W0 does not depend on the merge index ...
    assert (wrong(x) - expected).abs().max() > 0.1  # ... but what the skews mean does


def test_loading_does_not_change_the_given_state_or_share_memory():
    layer = PoetLinear.from_linear(dense_layer(), PoetConfig(block_size=16))
    state = copy.deepcopy(layer.state_dict())
    given = dict(state)
    layer.load_state_dict(given)
    assert all(given[key] is state[key] for key in state)
    layer.matrix.weight.data.zero_()
    assert state["matrix.weight"].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_setting_a_merge_index_changes_no_weight(name):
    layer = PoetLinear.from_linear(dense_layer(), PoetConfig(**CONFIGS[name]))
    before = layer.matrix.canonical(layer.matrix.weight)
    first = [rotation.perm.clone() for rotation in rotations(layer)]
    layer.matrix.set_merge_index(5)
    assert torch.equal(layer.matrix.canonical(layer.matrix.weight), before)
    assert all(not torch.equal(rotation.perm, perm) for rotation, perm in zip(rotations(layer), first, strict=True))
    layer.matrix.set_merge_index(0)
    assert all(torch.equal(rotation.perm, perm) for rotation, perm in zip(rotations(layer), first, strict=True))


def test_a_bf16_master_holds_what_the_weight_lost():
    """load_canonical keeps full precision in the master; merged() starts from it and stays in float32."""
    matrix = RotatedMatrix(64, 48, PoetConfig(block_size=16), MatrixId(0, 0, 0), dtype=torch.bfloat16)
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    matrix.load_canonical(torch.zeros(48, 64))
    matrix.keep_master()
    matrix.load_canonical(weight)
    assert torch.equal(matrix.master, weight)
    assert torch.equal(matrix.merged(), weight)
    assert torch.equal(matrix.canonical(matrix.weight), weight.bfloat16())
    matrix.rotation_in.skew.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(4))
    merged = matrix.merged()
    assert merged.dtype == torch.float32
    assert torch.equal(matrix.master, weight)  # merged() changes nothing
    matrix.merge()
    assert torch.equal(matrix.master, merged)
    assert torch.equal(matrix.state_dict()["weight"], merged)


def test_diagnostics_report_defect_and_norm_of_the_blocks():
    layer = PoetLinear.from_linear(dense_layer(), PoetConfig(block_size=16))
    assert layer.matrix.rotation_in.diagnostics().tolist() == [0.0, 64.0, 0.0]
    randomize_skews(layer, 0.9)
    defect, size, norm = layer.matrix.rotation_in.diagnostics().tolist()
    q = skew_unpack(layer.matrix.rotation_in.skew.detach().double().reshape(4, -1), 16)
    eye = torch.eye(16, dtype=torch.float64)
    g = (eye + q) @ (eye + q + q @ q + q @ q @ q + q @ q @ q @ q)
    assert size == 64.0
    assert defect == pytest.approx((g @ g.mT - eye).square().sum().item(), rel=1e-4)  # fp32 sums against float64
    exact = torch.linalg.svdvals(q).max().item()
    assert 0.95 * exact < norm < exact * 1.0001  # power iteration, see test_skew_norm_against_the_singular_values


def test_state_dict_carries_the_merge_index_to_a_fresh_module():
    """Skews mean something only under their own permutations: a new module loads both, and computes the same."""
    torch.manual_seed(0)
    config = PoetConfig(block_size=8, orthogonal_map="cayley")
    old, fresh = (PoetLinear.from_linear(torch.nn.Linear(24, 40), config) for _ in range(2))
    old.matrix.merge()
    for rotation in (old.matrix.rotation_in, old.matrix.rotation_out):
        rotation.skew.data.normal_(std=0.2)
    fresh.load_state_dict(old.state_dict())
    x = torch.randn(6, 24)
    assert fresh.matrix.merge_index == 1
    assert torch.equal(fresh(x), old(x))
