"""The three maps from skew blocks to orthogonal ones: values, gradients, defects and precision, against dense float64 linear algebra."""

import numpy as np
import pytest
import scipy.linalg
import torch

from poet_megatron.ops.cayley import EXACT, OrthogonalMap, orthogonality_defect, skew_norm
from poet_megatron.ops.skew import packed_length, skew_pack_grad, skew_unpack

MAPS = [OrthogonalMap("cayley-neumann", k, tail) for k in range(1, 8) for tail in (1.0, 2.0)] + [EXACT, OrthogonalMap("exp")]
SIZES = [1, 2, 5, 16]


def map_name(orthogonal_map):
    return f"{orthogonal_map.kind}-{orthogonal_map.terms}-{orthogonal_map.tail:g}"


def skew_with_spectrum(thetas, seed, dtype=torch.float64):
    """A skew matrix with eigenvalues +-i theta (and 0 at the end if there is an odd one out, theta None), in random planes."""
    generator = torch.Generator().manual_seed(seed)
    size = sum(1 if theta is None else 2 for theta in thetas)
    planes = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    q = torch.zeros(size, size, dtype=torch.float64)
    for i, theta in enumerate(thetas):
        if theta is not None:
            u, v = planes[:, 2 * i], planes[:, 2 * i + 1]
            q += theta * (torch.outer(u, v) - torch.outer(v, u))
    return q.to(dtype)


def skews(count, size, norm, seed=0):
    """Random skew blocks [count, size, size], float64, each with |Q|_2 = norm."""
    a = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = a - a.mT
    return norm * q / torch.linalg.matrix_norm(q, 2).clamp_min(1e-300)[:, None, None]


def dense_map(orthogonal_map, q):
    """G(Q) of one block, straight from the definitions; differentiable."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    if orthogonal_map.kind == "cayley-neumann":
        series = eye + sum(torch.linalg.matrix_power(q, i) for i in range(1, orthogonal_map.terms + 1))
        g = (eye + q) @ series
        # The product leaves Q^(k+1) with coefficient 1 where all others have 2; the doubled tail adds the missing one.
        return g + torch.linalg.matrix_power(q, orthogonal_map.terms + 1) if orthogonal_map.tail == 2 else g
    if orthogonal_map.kind == "cayley":
        return (eye + q) @ torch.linalg.inv(eye - q)
    return torch.linalg.matrix_exp(q)


@pytest.mark.parametrize("orthogonal_map", MAPS, ids=map_name)
@pytest.mark.parametrize("size", SIZES)
def test_increments_equal_the_dense_definition(orthogonal_map, size):
    q = skews(3, size, 0.9)
    expected = torch.stack([dense_map(orthogonal_map, block) for block in q]) - torch.eye(size, dtype=q.dtype)
    # A dozen float64 products of matrices of norm about 1: a few hundred eps.
    torch.testing.assert_close(orthogonal_map.increment(q), expected, atol=1e-13, rtol=0)


@pytest.mark.parametrize("norm", [1e-3, 1.0, 4.0])
def test_exp_equals_scipy(norm):
    q = skews(2, 9, norm)
    expected = np.stack([scipy.linalg.expm(block) for block in q.numpy()]) - np.eye(9)
    # The documented truncation error is 1e-13 at |Q|_2 = 4.
    np.testing.assert_allclose(OrthogonalMap("exp").increment(q).numpy(), expected, atol=2e-13, rtol=0)


@pytest.mark.parametrize("orthogonal_map", MAPS, ids=map_name)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_equal_autograd_of_the_dense_definition(orthogonal_map, size):
    generator = torch.Generator().manual_seed(1)
    packed = torch.randn(3, packed_length(size), generator=generator, dtype=torch.float64) * (0.4 / size**0.5)
    packed.requires_grad_()
    weights = torch.randn(3, size, size, generator=generator, dtype=torch.float64)
    rows, cols = np.triu_indices(size, 1)
    q = torch.zeros(3, size, size, dtype=torch.float64)
    q[:, rows, cols] = packed
    q = q - q.mT
    torch.stack([dense_map(orthogonal_map, block) for block in q]).mul(weights).sum().backward()

    blocks = skew_unpack(packed.detach(), size)
    assert torch.equal(blocks, q.detach())
    found = skew_pack_grad(orthogonal_map.increment_grad(blocks, orthogonal_map.increment(blocks), weights))
    assert found.shape == packed.shape
    # As above, times the norm of the weights (about 8) and coefficients up to 2(k + 1).
    torch.testing.assert_close(found, packed.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_skew_blocks_are_packed_by_rows_of_the_upper_triangle(size):
    packed = 1.0 + torch.arange(2 * packed_length(size), dtype=torch.float64).view(2, -1)
    blocks = skew_unpack(packed, size)
    numbers = iter(packed.flatten().tolist())
    for block in blocks:
        for i in range(size):
            assert block[i, i] == 0
            for j in range(i + 1, size):
                value = next(numbers)
                assert (block[i, j], block[j, i]) == (value, -value)
    grad = torch.randn(2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    # The adjoint: <unpack(p), g> = <p, pack_grad(g)>; sums of up to 240 terms of size up to 240.
    torch.testing.assert_close((blocks * grad).sum(), (packed * skew_pack_grad(grad)).sum(), rtol=1e-12, atol=1e-9)


def paper_defect(k, theta):
    """|lambda|^2 - 1 for the eigenvalue of T_k at i theta.

    T_k = (I+Q)(I-Q)^{-1} (I - Q^{k+1}) and the Cayley factor has modulus 1, so |lambda|^2 = |1 - (i theta)^{k+1}|^2:
    1 + theta^{2k+2} for even k, (1 + theta^{k+1})^2 for k = 1 mod 4, (1 - theta^{k+1})^2 for k = 3 mod 4.
    """
    if k % 2 == 0:
        return theta ** (2 * k + 2)
    sign = 1 if k % 4 == 1 else -1
    return sign * 2 * theta ** (k + 1) + theta ** (2 * k + 2)


def doubled_defect(k, theta):
    """The same with every coefficient 2: I + 2 sum_{i=1..k+1} Q^i = (I - Q)^{-1} (I + Q - 2 Q^{k+2}) = Cayley (I - 2 Q^{k+2} (I+Q)^{-1}).

    With a = 2 theta^{k+2} / (1 + theta^2): |lambda|^2 = |1 - a i^{k+2} (1 - i theta)|^2 = 1 - 2 a r + a^2 (1 + theta^2), where
    r = Re(i^{k+2} (1 - i theta)) = 1, theta, -1, -theta for k + 2 = 0, 1, 2, 3 mod 4.
    """
    a = 2 * theta ** (k + 2) / (1 + theta**2)
    r = (1, theta, -1, -theta)[(k + 2) % 4]
    return a**2 * (1 + theta**2) - 2 * a * r


@pytest.mark.parametrize("tail", [1.0, 2.0])
@pytest.mark.parametrize("k", range(1, 8))
@pytest.mark.parametrize("norm", [0.1, 0.5, 0.95])
def test_defect_of_the_series_follows_the_closed_form(k, tail, norm):
    thetas = [norm, 0.7 * norm, 0.31 * norm, 0.02 * norm, None]
    increment = OrthogonalMap("cayley-neumann", k, tail).increment(skew_with_spectrum(thetas, seed=k)[None])[0]
    gram = increment + increment.T + increment @ increment.T
    closed_form = paper_defect if tail == 1 else doubled_defect
    expected = sorted(closed_form(k, theta) for theta in thetas for _ in (0, 1) if theta is not None) + [0.0]
    # Eigenvalues of T T^T - I one by one: float64 rounding of numbers up to 4.
    np.testing.assert_allclose(torch.linalg.eigvalsh(gram).numpy(), sorted(expected), atol=1e-13, rtol=0)
    norm_of_defect = torch.linalg.matrix_norm(gram, 2).item()
    assert norm_of_defect == pytest.approx(max(abs(value) for value in expected), rel=1e-9, abs=1e-13)
    if tail == 1:
        stated = {0: norm ** (2 * k + 2), 1: 2 * norm ** (k + 1) + norm ** (2 * k + 2), 3: 2 * norm ** (k + 1) - norm ** (2 * k + 2)}
        assert norm_of_defect == pytest.approx(stated[k % 4 if k % 2 else 0], rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("orthogonal_map", [EXACT, OrthogonalMap("exp")], ids=map_name)
@pytest.mark.parametrize("norm", [0.03, 0.3, 1.0])
def test_exact_maps_are_orthogonal_in_float32(orthogonal_map, norm):
    increment = orthogonal_map.increment(skews(2, 64, norm).float()).double()
    gram = increment + increment.mT + increment @ increment.mT
    # |G G^T - I|_2 / sqrt(64): a handful of fp32 products of depth 64 (DESIGN 2: 5e-7 at |Q| = 1).
    assert (gram.square().sum() / 128).sqrt() < 2e-6


@pytest.mark.parametrize("orthogonal_map", [OrthogonalMap("cayley-neumann", 4), EXACT, OrthogonalMap("exp")], ids=map_name)
def test_increment_form_keeps_relative_precision_of_small_skews(orthogonal_map):
    q32 = skews(2, 32, 1e-4).float()
    exact = torch.stack([dense_map(orthogonal_map, block) for block in q32.double()]) - torch.eye(32, dtype=torch.float64)
    found = orthogonal_map.increment(q32)
    # E = 2Q + 2Q^2 + ...: the leading term is exact up to one or two roundings of each entry, the others are 1e-4 smaller. 4 eps.
    assert (found - exact).norm() < 4 * torch.finfo(torch.float32).eps * exact.norm()
    # So does the diagonal, E_ii = -|row i of E|^2 / 2 of about 5e-9 (sums of 32 products), which is what keeps the rows of G at norm 1 ...
    exact_diagonal = exact.diagonal(dim1=1, dim2=2)
    assert (found.diagonal(dim1=1, dim2=2) - exact_diagonal).norm() < 1e-5 * exact_diagonal.norm()
    # ... and which a G in the same precision rounds away (eps / 2 = 6e-8): this is why G is never formed.
    through_g = (torch.eye(32) + found) - torch.eye(32)
    assert (through_g.diagonal(dim1=1, dim2=2) - exact_diagonal).norm() > 0.5 * exact_diagonal.norm()

    grad = torch.randn(2, 32, 32, generator=torch.Generator().manual_seed(3))
    exact_grad = folded(orthogonal_map.increment_grad(q32.double(), exact, grad.double()))
    found_grad = folded(orthogonal_map.increment_grad(q32, found, grad))
    assert (found_grad - exact_grad).norm() < 8 * torch.finfo(torch.float32).eps * exact_grad.norm()


def folded(grad_q):
    """The gradient along skew directions, which is all that implementations share."""
    return grad_q - grad_q.mT


@pytest.mark.parametrize("orthogonal_map", [OrthogonalMap("cayley-neumann", 3), EXACT], ids=map_name)
def test_orthogonality_defect_is_the_squared_frobenius_norm(orthogonal_map):
    q = skews(4, 12, 0.8)
    increment = orthogonal_map.increment(q)
    g = increment + torch.eye(12, dtype=q.dtype)
    direct = sum((torch.linalg.matrix_norm(block @ block.T - torch.eye(12, dtype=q.dtype)) ** 2).item() for block in g)
    # The direct form cancels 1 - 1 in float64, which leaves (12 eps)^2 of noise.
    assert orthogonality_defect(increment).item() == pytest.approx(direct, rel=1e-10, abs=1e-26)


def test_skew_norm_against_the_singular_values():
    # A leading plane well apart from the others (ratio 0.6, to the 2 x 16th power 8e-8): power iteration has converged.
    q = torch.stack([skew_with_spectrum([0.6 * s, s, 0.3 * s, 0.0, None], seed=7) for s in (0.2, 0.9, 0.5)])
    assert torch.linalg.svdvals(q).max().item() == pytest.approx(0.9, rel=1e-12)
    assert skew_norm(q).item() == pytest.approx(0.9, rel=1e-6)
    for size, seed in [(2, 0), (3, 1), (64, 2), (256, 3)]:
        a = torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))
        random = a - a.mT
        exact = torch.linalg.svdvals(random.double()).max().item()
        # A random skew has a dense spectral edge: never above (but for fp32 rounding), and a few percent below at most, as documented.
        assert 0.97 * exact < skew_norm(random).item() < exact * (1 + 1e-5)


def test_skew_norm_of_zero_and_tiny_blocks():
    assert skew_norm(torch.zeros(2, 8, 8)).item() == 0.0
    assert skew_norm(torch.zeros(2, 1, 1)).item() == 0.0
    q = skew_with_spectrum([1e-6, 1e-7], seed=1, dtype=torch.float32)[None]
    assert skew_norm(q).item() == pytest.approx(1e-6, rel=1e-5)  # fp32 rounding of the entries
