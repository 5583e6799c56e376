"""What merging does to the singular values of a rotated weight: nothing, or what the closed form of T_k predicts."""

import math

import numpy as np
import pytest
import torch

import poet_megatron.layers.matrix as matrix_module
from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix
from poet_megatron.ops.cayley import OrthogonalMap

MERGES = 50


def build(width_in, width_out, config, dtype=torch.float32):
    """A matrix with normalized Gaussian neurons (rows of [out, in] of norm 1)."""
    matrix = RotatedMatrix(width_in, width_out, config, MatrixId(1, 2, 3), dtype=dtype)
    weight = torch.randn(width_out, width_in, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weight = weight / weight.norm(dim=1, keepdim=True)
    matrix.load_canonical(weight.to(dtype))
    return matrix


def packed(q):
    """Skew matrix -> strict upper triangle by rows."""
    return q[tuple(np.triu_indices(len(q), 1))]


def random_skew(size, norm, generator):
    a = torch.randn(size, size, generator=generator, dtype=torch.float64)
    q = a - a.T
    return q * (norm / torch.linalg.matrix_norm(q, 2).clamp_min(1e-300))


def complex_structure(size, theta, generator):
    """Q with eigenvalues +-i theta only: theta O (+)[[0, 1], [-1, 0]] O^T for a random orthogonal O."""
    o = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return theta * (o[:, ::2] @ o[:, 1::2].T - o[:, 1::2] @ o[:, ::2].T)


def set_skews(matrix, draw):
    """Fill every block of both sides with draw(size)."""
    for rotation in (matrix.rotation_in, matrix.rotation_out):
        layout = rotation.layout
        for group in range(layout.groups):
            sizes = [layout.block_size] * layout.full + [layout.ragged] * (layout.ragged > 0)
            rotation.skew.data[group] = torch.cat([packed(draw(size)) for size in sizes]).to(rotation.skew.dtype)


def singular_values(weight):
    return torch.linalg.svdvals(weight.double())


@pytest.mark.parametrize("norm", [0.03, 0.3, 1.0])
@pytest.mark.parametrize(("orthogonal_map", "exact"), [("cayley", False), ("exp", False), ("cayley-neumann", True)])
@pytest.mark.parametrize(("variant", "block"), [("bs", 16), ("fs", 0.5)])
def test_merges_keep_the_spectrum(variant, block, orthogonal_map, exact, norm):
    config = PoetConfig(variant=variant, block_size=block, orthogonal_map=orthogonal_map)
    matrix = build(40, 56, config)  # ragged on both sides under bs
    before = matrix.canonical(matrix.weight).clone()
    generator = torch.Generator().manual_seed(5)
    for _ in range(MERGES):
        set_skews(matrix, lambda size: random_skew(size, norm, generator))
        matrix.merge(exact=exact)
    after = matrix.canonical(matrix.weight)
    expected = singular_values(before)
    # The bar of the specification: 50 merges of fp32 products of depth 16 to 28 leave about sqrt(50) x 1e-7.
    assert (singular_values(after) - expected).abs().max() < 1e-5 * expected.max()
    assert matrix.merge_index == MERGES
    assert (after - before).norm() > 0.1 * before.norm()  # the weight did move


@pytest.mark.parametrize("terms", [2, 3, 4, 5])
@pytest.mark.parametrize("theta", [0.03, 0.3, 0.6, 1.0])
def test_unpolished_series_drifts_as_the_closed_form_predicts(terms, theta):
    """T_k = Cayley (I - Q^{k+1}), and the Cayley map is orthogonal: eigenvalues at +-i theta have modulus |1 - (i theta)^{k+1}|.

    For even k that is sqrt(1 + theta^{2k+2}) (k = 4: sqrt(1 + theta^10)); for k = 3 mod 4, 1 - theta^{k+1}; for k = 1 mod 4,
    1 + theta^{k+1}. When +-i theta are all eigenvalues of every block, Q^2 = -theta^2 I, so T_k is that modulus times an orthogonal
    matrix, and N merges with R and P multiply every singular value by modulus^(2N).
    """
    merges = MERGES if terms % 2 == 0 or theta < 0.5 else 4  # odd k at theta = 1 vanishes (k = 3) or doubles (k = 5) at once
    matrix = build(32, 48, PoetConfig(block_size=16, neumann_terms=terms))
    expected = singular_values(matrix.canonical(matrix.weight))
    generator = torch.Generator().manual_seed(6)
    for _ in range(merges):
        set_skews(matrix, lambda size: complex_structure(size, theta, generator))
        matrix.merge()
    growth = abs(1 - (1j * theta) ** (terms + 1)) ** (2 * merges)
    if terms == 4:
        assert growth == pytest.approx((1 + theta**10) ** merges, rel=1e-12)  # 1.0003 at 0.3, 1.35 at 0.6, 2^50 at 1
    after = singular_values(matrix.canonical(matrix.weight))
    # fp32 rounding as above (products, and theta itself at 6e-8 times its power 10 x 50); relative to the predicted scale.
    assert (after - growth * expected).abs().max() < 1e-5 * max(growth, 1e-3) * expected.max()


@pytest.mark.parametrize("norm", [0.3, 0.6])
def test_unpolished_t4_with_random_skews_stays_within_the_closed_form(norm):
    """Random skews have eigenvalues up to |Q|_2, so each merge stretches by something in [1, 1 + |Q|_2^10]: it grows, within the bound."""
    matrix = build(32, 48, PoetConfig(block_size=16))
    before = singular_values(matrix.canonical(matrix.weight))
    generator = torch.Generator().manual_seed(7)
    for _ in range(MERGES):
        set_skews(matrix, lambda size: random_skew(size, norm, generator))
        matrix.merge()
    ratio = singular_values(matrix.canonical(matrix.weight)) / before
    bound = (1 + norm**10) ** MERGES
    rounding = 1e-5  # the bar for exact merges
    assert ratio.min() > 1 - rounding and ratio.max() < bound + rounding
    # At least a twentieth of the worst case: two of sixteen eigenvalues of a block reach |Q|_2 exactly.
    assert ratio.max() - 1 > 0.05 * (bound - 1)


def bf16_merges(matrix, merges, std):
    """Merge with bf16 skews of standard deviation `std`, as a bf16 run holds them."""
    generator = torch.Generator().manual_seed(8)
    for rotation in (matrix.rotation_in, matrix.rotation_out):
        rotation.skew.data = rotation.skew.data.bfloat16()
    for _ in range(merges):
        for rotation in (matrix.rotation_in, matrix.rotation_out):
            rotation.skew.data.normal_(0.0, std, generator=generator)
        matrix.merge()


def test_bf16_weight_with_fp32_master_keeps_its_spectrum_over_400_merges():
    matrix = build(512, 512, PoetConfig(block_size=256), dtype=torch.bfloat16)
    matrix.keep_master()
    expected = singular_values(matrix.master)
    norm = matrix.master.norm()
    bf16_merges(matrix, 400, 1e-3)
    assert matrix.weight.dtype == torch.bfloat16 and matrix.master.dtype == torch.float32
    # fp32 rounding alone: |Q|_2 is 1e-3 x 2 sqrt(256) = 0.03, so T_4 itself drifts by 400 x 0.03^10 < 1e-12.
    assert (singular_values(matrix.master) - expected).abs().max() < 1e-4 * expected.max()
    # One rounding to bf16 (relative 2^-9 root mean square at most, of entries of 1/sqrt(512)) shifts one by 1e-4; the bar is 1e-3.
    assert (singular_values(matrix.canonical(matrix.weight)) - expected).abs().max() < 1e-3 * expected.max()
    assert matrix.master.norm() == pytest.approx(norm.item(), rel=1e-4)
    assert torch.equal(matrix.canonical(matrix.weight), matrix.master.bfloat16())


def test_negative_control_a_bf16_g_inflates_the_weight(monkeypatch):
    """The same merges with G = I + E rounded to bf16, which is what the increment form is there to avoid.

    E_ii = -|row i of E|^2 / 2 = -2 (b - 1) std^2 = -5e-4 is below half the spacing of bf16 under 1 (2^-9 = 2e-3), so G_ii rounds to 1
    while the off-diagonal 2Q stays: each row has squared norm 1 + 4 (b - 1) std^2, and two sides over 400 merges multiply |W|_F by
    (1 + 4 x 255 x 1e-6)^400 = 1.50.
    """
    real = matrix_module._merge_factor

    def rounded_g(rotation, dtype, exact):
        increments = real(rotation, dtype, exact)
        eye = torch.eye(increments[0].shape[-1])
        return [(eye + e).bfloat16().to(dtype) - eye for e in increments]

    monkeypatch.setattr(matrix_module, "_merge_factor", rounded_g)
    matrix = build(256, 256, PoetConfig(block_size=256), dtype=torch.bfloat16)
    matrix.keep_master()
    norm = matrix.master.norm()
    bf16_merges(matrix, 400, 1e-3)
    growth = (matrix.master.norm() / norm).item()
    assert growth > 1.2
    # Off-diagonal entries are rounded by 2^-9 relative and without bias: the prediction holds to a percent.
    assert growth == pytest.approx(math.pow(1 + 4 * 255e-6, 400), rel=0.02)


def test_bf16_merges_without_a_master_drift_by_rounding():
    """Without a master every merge rounds the weight: the drift that keep_master() removes must be visible."""
    drifts = {}
    for master in (True, False):
        matrix = build(64, 64, PoetConfig(block_size=32), dtype=torch.bfloat16)
        if master:
            matrix.keep_master()
        expected = singular_values(matrix.canonical(matrix.weight))
        bf16_merges(matrix, 200, 1e-3)
        final = matrix.master if master else matrix.canonical(matrix.weight)
        drifts[master] = ((singular_values(final) - expected).abs().max() / expected.max()).item()
    # 200 independent roundings of relative size 2^-9 against none.
    assert drifts[True] < 1e-5 < 1e-3 < drifts[False]


def test_exact_merges_of_t4_use_the_exact_cayley_map_of_the_same_skews():
    config = PoetConfig(block_size=16)
    matrix = build(32, 32, config)
    generator = torch.Generator().manual_seed(9)
    set_skews(matrix, lambda size: random_skew(size, 0.8, generator))
    polished, plain = matrix.merged(exact=True), matrix.merged()
    matrix.rotation_in.map = matrix.rotation_out.map = OrthogonalMap("cayley")
    assert torch.equal(polished, matrix.merged())
    # T_4 - Cayley = -Cayley Q^5, of norm 0.8^5 = 0.33 in the leading plane.
    assert (plain - polished).norm() > 0.01 * polished.norm()
