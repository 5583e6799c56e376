"""Compiled skew, series and merge kernels against float64 autograd and dense products; the operators `torch.ops.poet.*` by opcheck."""

from __future__ import annotations

import pytest
import torch

import poet_megatron.ops.library  # noqa: F401  registers torch.ops.poet
from poet_megatron.ops import native
from poet_megatron.ops.cayley import OrthogonalMap
from poet_megatron.ops.merge import NATIVE_CUDA_BLOCK, blocks_fit, merge_into
from poet_megatron.ops.skew import skew_pack_grad, skew_unpack

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def built():
    if not native.native_available("cpu"):
        pytest.skip(f"the compiled ops are not here: {native.load('cpu').why}")


def skews(count, size, norm, seed=0):
    q = torch.randn(count, size, size, generator=torch.Generator().manual_seed(seed)) * norm / size**0.5 / 2
    return q - q.mT


def folded(grad_q):
    return grad_q - grad_q.mT


@pytest.mark.parametrize("size", [1, 2, 5, 20, 33, 64, 100, 256])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 5, 6, 7, 10])
def test_series_and_its_gradient(built, size, degree):
    coefficients = [0.0] + [2.0] * (degree - 1) + [1.0]
    q = skews(2, size, 0.3)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    leaf = q.double().requires_grad_()
    expected, power = torch.zeros_like(leaf), torch.eye(size, dtype=torch.float64)
    for coefficient in coefficients[1:]:
        power = power @ leaf
        expected = expected + coefficient * power
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad.double())
    increment = torch.ops.poet_native.series_increment(q, coefficients)
    found = torch.ops.poet_native.series_grad(q, coefficients, grad)
    # Products of |Q|_2 <= 0.6: every term is smaller than the one before, so that errors are those of a few sums of `size` terms.
    assert (increment - expected).norm() <= 4 * EPS * expected.norm()
    assert (folded(found) - folded(expected_grad)).norm() <= 8 * EPS * folded(expected_grad).norm()
    assert torch.equal(found, -found.mT)


@pytest.mark.parametrize(("terms", "size"), [(32, 8), (33, 8), (4, 513)])
def test_what_the_kernel_does_not_take_runs_on_the_library(built, terms, size):
    series, q = OrthogonalMap("cayley-neumann", terms), skews(1, size, 0.3)
    increment, exact = series.increment(q), series.increment(q.double())
    assert (increment - exact).norm() <= 8 * EPS * exact.norm()
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1))
    found, oracle = series.increment_grad(q, increment, grad), series.increment_grad(q.double(), exact, grad.double())
    assert (folded(found) - folded(oracle)).norm() <= 16 * EPS * folded(oracle).norm()


@pytest.mark.parametrize("size", [1, 2, 10, 32, 33, 64, 256])
def test_skew_blocks(built, size):
    length = size * (size - 1) // 2
    packed = torch.randn(3, length + 5)[:, :length]  # with a row stride
    q = skew_unpack(packed, size)
    rows, columns = torch.triu_indices(size, size, 1)
    assert torch.equal(q[:, rows, columns], packed) and torch.equal(q, -q.mT)
    grad = torch.randn(3, size, size)
    assert torch.equal(skew_pack_grad(grad), folded(grad)[:, rows, columns])


def dense(increments, width):
    matrix, offset = torch.eye(width, dtype=torch.float64), 0
    for block in (block for increment in increments for block in increment.double()):
        stop = offset + len(block)
        matrix[offset:stop, offset:stop] += block
        offset = stop
    return matrix


MERGES = [
    (64, 96, [(3, 32)], [(2, 32)]),
    (70, 300, [(4, 64), (1, 44)], [(3, 20), (1, 10)]),
    (300, 50, [(2, 20)], [(2, 64)]),  # rows and columns without a block
    (10, 10, [], [(1, 4)]),
    (10, 12, [(1, 5)], []),
]


@pytest.mark.parametrize("shape", MERGES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "to fp32"])
def test_merge(built, shape, dtype, in_place):
    height, width, runs_in, runs_out = shape
    generator = torch.Generator().manual_seed(height)
    weight = torch.randn(height, width, generator=generator).to(dtype)
    increments_in, increments_out = (
        [torch.randn(count, size, size, generator=generator) / size for count, size in runs] for runs in (runs_in, runs_out)
    )
    rows, columns = torch.randperm(height, generator=generator), torch.randperm(width, generator=generator)
    expected = torch.empty(height, width, dtype=torch.float64)
    stored = weight.double()[rows][:, columns]
    expected[rows[:, None], columns[None]] = dense(increments_out, height).T @ stored @ dense(increments_in, width).T
    out = weight.clone() if in_place else torch.empty(height, width)
    merge_into(out if in_place else weight, rows.int(), columns.int(), columns.argsort().int(), increments_in, increments_out, out)
    # Two sums of up to 65 fp32 terms of size 1: 65 eps / 2 = 4e-6 at worst; bf16 rounds the result once, by at most 2^-8 of it.
    rounding = 2.0**-8 if out.dtype == torch.bfloat16 else 2e-6
    assert ((out - expected).abs() <= rounding * expected.abs() + 4e-6).all()


@pytest.mark.parametrize(
    ("device", "size", "fits"), [("cpu", 9000, True), ("meta", NATIVE_CUDA_BLOCK, True), ("meta", NATIVE_CUDA_BLOCK + 1, False)]
)
def test_blocks_beyond_the_shared_memory_of_a_gpu_take_the_reference(device, size, fits):
    """The meta device stands for a GPU: it is none that the CPU kernel serves. 8 fp32 columns of 5,088 rows fill the 163 KB of an A100."""
    blocks = [torch.empty(2, 64, 64, device="meta"), torch.empty(1, size, size, device="meta")]
    assert blocks_fit(torch.empty(0, device=device), blocks) is fits
    assert 8 * 4 * NATIVE_CUDA_BLOCK <= 163 * 1024


def permutation(size):
    return torch.randperm(size, generator=torch.Generator().manual_seed(0), dtype=torch.int64).int()


def samples(dtype):
    """Arguments of every operator, with gradients where it has them."""
    x = torch.randn(6, 20, dtype=dtype, requires_grad=True)
    increments = [torch.randn(2, 8, 8, dtype=dtype, requires_grad=True), torch.randn(1, 3, 3, dtype=dtype, requires_grad=True)]
    order, inverse = permutation(20), permutation(20).argsort().int()
    q = skews(2, 6, 0.3).to(dtype)
    yield torch.ops.poet.permuted_block_product, (x, order, increments, False, None)
    yield torch.ops.poet.permuted_block_product, (x, None, increments, True, inverse)
    yield torch.ops.poet.permuted_block_product, (x, order, [], False, inverse)
    yield torch.ops.poet.permuted_block_product_grad, (x.detach(), order, torch.randn(6, 20, dtype=dtype), None, [2, 8, 1, 3])
    if dtype == torch.bfloat16:
        return
    yield torch.ops.poet.skew_unpack, (torch.randn(2, 15, dtype=dtype, requires_grad=True), 6)
    yield torch.ops.poet.skew_pack_grad, (torch.randn(2, 6, 6, dtype=dtype, requires_grad=True),)
    for kind in ("cayley-neumann", "cayley", "exp"):
        yield torch.ops.poet.cayley_increment, (q.clone().requires_grad_(), kind, 4, 1.0)
        yield torch.ops.poet.cayley_increment_grad, (q, OrthogonalMap(kind).increment(q), torch.randn(2, 6, 6, dtype=dtype), kind, 4, 1.0)
    weight = torch.randn(12, 20, dtype=dtype)
    blocks = [torch.randn(1, 8, 8, dtype=dtype)]
    yield torch.ops.poet.merge, (weight, permutation(12), order, inverse, blocks, blocks, torch.empty(12, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_opcheck(dtype):
    for operator, arguments in samples(dtype):
        torch.library.opcheck(operator, arguments)


def test_gradients_of_the_operators():
    """float64 runs on the reference; gradcheck compares with finite differences."""
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    increment = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    order, inverse = permutation(7), permutation(7).argsort().int()
    for transpose in (False, True):
        for way in ((order, None), (None, inverse), (order, inverse)):
            product = torch.ops.poet.permuted_block_product
            assert torch.autograd.gradcheck(lambda x, e: product(x, way[0], [e], transpose, way[1]), (x, increment))  # noqa: B023
    packed = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    for kind in ("cayley-neumann", "cayley", "exp"):
        function = torch.ops.poet.cayley_increment
        assert torch.autograd.gradcheck(lambda p: function(torch.ops.poet.skew_unpack(0.1 * p, 4), kind, 4, 1.0), (packed,))  # noqa: B023
