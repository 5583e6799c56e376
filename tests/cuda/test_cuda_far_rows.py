"""Rows more than 2^31 elements apart: every kernel of the block-product family must compute row offsets in 64 bits.

Memory is reserved, not used: only the two rows of each matrix are registered with the simulator (and touched).
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator

import pytest
import torch
from harness import Simulator
from torch import Tensor

from benchmarks.cuda_toolchain import Blocks
from poet_megatron.ops.block_product import BlockRun, block_product, block_product_grad
from poet_megatron.ops.merge import merge_output

pytest_plugins = ("cuda_fixtures",)

STRIDE, WIDTH = 2**31 + 64, 64
NO_RESERVE = 0x4000


class FarRows:
    """Matrices [2, WIDTH] of 4-byte (or smaller) elements whose rows are STRIDE elements apart."""

    def __init__(self, simulator: Simulator):
        self.sim, self.used, self.rows = simulator.sim, 0, []
        self.memory = mmap.mmap(-1, STRIDE * 4 + 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    def matrix(self, values: Tensor | None, dtype: torch.dtype) -> tuple[int, Tensor]:
        """Address and a view of a matrix; uninitialised without `values`."""
        item, first = dtype.itemsize, self.base + self.used
        self.used += 4096
        for row in range(2):
            piece = (ctypes.c_char * (WIDTH * item)).from_address(first + row * STRIDE * item)
            self.sim.register(piece, init=values is not None)
            self.rows.append(piece)
        near = [torch.frombuffer(piece, dtype=dtype) for piece in self.rows[-2:]]
        if values is not None:
            for row, value in zip(near, values, strict=True):
                row.copy_(value)
        return first, near


@pytest.fixture
def far(simulator: Simulator) -> Iterator[FarRows]:
    rows = FarRows(simulator)
    yield rows
    simulator.sim.unregister(*rows.rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("b", [32, 20])
def test_block_product_and_grad(simulator: Simulator, far: FarRows, dtype: torch.dtype, b: int) -> None:
    count, code = WIDTH // b, int(dtype == torch.bfloat16)
    run, blocks = BlockRun(count, b, 0), Blocks(count, b, 0, 0)
    x, g, e = torch.randn(2, WIDTH).to(dtype), torch.randn(2, WIDTH).to(dtype), (torch.randn(count, b, b) / b).to(dtype)
    (x_at, _), (g_at, _), (y_at, y) = far.matrix(x, dtype), far.matrix(g, dtype), far.matrix(None, dtype)
    increments, de = simulator.tensor(e), simulator.empty(e.shape)
    product = simulator.load(["block_product.cu", "permute_columns.cu"]).poet_cuda_block_product
    grad = simulator.load("block_product_grad.cu").poet_cuda_block_product_grad
    with simulator.checked():
        simulator.call(product, code, x_at, STRIDE, increments, None, blocks, 1, y_at, STRIDE, 2, WIDTH)
        simulator.call(grad, code, x_at, STRIDE, g_at, STRIDE, de, None, blocks, 2, WIDTH, None)
    # Placement, not rounding, is tested: a wrong row would be off by about 1.
    torch.testing.assert_close(torch.stack(y).double(), block_product(x.double(), [e.double()], [run], True), rtol=1e-2, atol=1e-5)
    torch.testing.assert_close(de.read().double(), block_product_grad(x.double(), g.double(), [run])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ordered", [True, False])
def test_permute_columns(simulator: Simulator, far: FarRows, dtype: torch.dtype, ordered: bool) -> None:
    x, order = torch.randn(2, WIDTH).to(dtype), torch.randperm(WIDTH)
    (x_at, _), (y_at, y) = far.matrix(x, dtype), far.matrix(None, dtype)
    index = simulator.tensor(order.int()) if ordered else None
    permute = simulator.load("permute_columns.cu").poet_cuda_permute_columns
    with simulator.checked():
        simulator.call(permute, int(dtype == torch.bfloat16), x_at, STRIDE, index, y_at, STRIDE, 2, WIDTH)
    assert torch.equal(torch.stack(y), x[:, order] if ordered else x)


@pytest.mark.parametrize("b", [2, 1])
def test_merge_rows(simulator: Simulator, far: FarRows, b: int) -> None:
    """b = 1: the second row belongs to no block and is copied."""
    w, e, rows = torch.randn(2, WIDTH), torch.randn(1, b, b) / 4, torch.tensor([1, 0])
    (w_at, _), (out_at, out) = far.matrix(w, torch.float32), far.matrix(None, torch.float32)
    merge = simulator.load("merge_rows.cu").poet_cuda_merge_rows
    with simulator.checked():
        index, increments = simulator.tensor(rows.int()), simulator.tensor(e)
        simulator.call(merge, w_at, STRIDE, index, increments, None, Blocks(1, b, 0, 0), out_at, STRIDE, 2, WIDTH)
    want = merge_output(w.double()[rows], [e.double()], [BlockRun(1, b, 0)])[rows]
    torch.testing.assert_close(torch.stack(out).double(), want, rtol=1e-5, atol=1e-5)
