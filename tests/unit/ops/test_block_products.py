"""Products with block-diagonal increments and merges of a stored weight, against dense matrices."""

import pytest
import torch

from poet_megatron.ops.block_product import BlockRun, block_product, block_product_grad
from poet_megatron.ops.merge import merge_input, merge_output, permute_weight

RUNS = {
    "one": (BlockRun(1, 5, 0),),
    "several": (BlockRun(3, 4, 0),),
    "ragged": (BlockRun(4, 3, 0), BlockRun(2, 2, 12)),
    "ragged-by-one": (BlockRun(2, 4, 0), BlockRun(1, 1, 8)),
}


class Elsewhere(torch.Tensor):
    """A tensor on the CPU that does not say so: runs what other devices run, without one."""

    device = property(lambda self: torch.device("meta"))


DEVICES = ["cpu", "elsewhere", pytest.param("cuda", marks=pytest.mark.gpu)]


def move(x, device):
    return x.as_subclass(Elsewhere) if device == "elsewhere" else x.to(device)


def back(x):
    return x.as_subclass(torch.Tensor).cpu()


def setup(name, rest, device="cpu", dtype=torch.float64):
    """Runs, increments, and the dense I + Diag(E) of width covered + rest."""
    runs = RUNS[name]
    generator = torch.Generator().manual_seed(0)
    increments = [torch.randn(run.count, run.size, run.size, generator=generator, dtype=torch.float64).to(dtype) for run in runs]
    blocks = [block.double() for increment in increments for block in increment]
    width = runs[-1].stop + rest
    dense = torch.eye(width, dtype=torch.float64)
    dense[: runs[-1].stop, : runs[-1].stop] += torch.block_diag(*blocks)
    return runs, [move(increment, device) for increment in increments], dense


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("rest", [0, 3])
@pytest.mark.parametrize("name", RUNS)
def test_products_equal_the_dense_ones(name, rest, transpose, device):
    runs, increments, dense = setup(name, rest, device)
    x = torch.randn(7, len(dense), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for given in (move(x, device), move(x.T.contiguous(), device).T):  # contiguous, and the transposed view that merges pass
        before = given.clone()
        y = block_product(given, increments, runs, transpose)
        # float64 sums of at most 5 products of order 1
        torch.testing.assert_close(back(y), x @ (dense.T if transpose else dense), atol=1e-13, rtol=0)
        assert y.is_contiguous() and y.data_ptr() != given.data_ptr()
        assert torch.equal(given, before)
        assert torch.equal(y[:, runs[-1].stop :], given[:, runs[-1].stop :])  # untouched columns bit for bit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_gradients_are_the_diagonal_blocks_of_the_dense_one(name, device):
    runs, increments, dense = setup(name, 2)
    x = torch.randn(7, len(dense), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad = torch.randn(7, len(dense), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = block_product_grad(move(x, device), move(grad, device), runs)
    full = x.T @ grad
    for run, blocks in zip(runs, found, strict=True):
        for i, block in enumerate(blocks):
            here = slice(run.offset + i * run.size, run.offset + (i + 1) * run.size)
            torch.testing.assert_close(back(block), full[here, here], atol=1e-13, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_products_and_gradients(device):
    runs, increments, dense = setup("ragged", 1, device, torch.bfloat16)
    x = torch.randn(7, len(dense), generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = x.double() @ dense
    y = block_product(move(x, device), increments, runs)
    assert y.dtype == torch.bfloat16
    # At most two roundings to 8 bits: of the product (when it is not fused) and of the sum.
    assert ((back(y).double() - exact).abs() <= 2 * 2**-8 * (x.double().abs() @ dense.abs())).all()
    assert all(grad.dtype == torch.float32 for grad in block_product_grad(move(x, device), y, runs))


def test_merges_equal_the_dense_products_on_the_stored_weight():
    """w' is W^T in stored order: R W P has the transpose P^T w' R^T."""
    runs_in, increments_in, r = setup("ragged", 1)
    runs_out, increments_out, p = setup("several", 2)
    weight = torch.randn(len(p), len(r), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    merged = merge_output(merge_input(weight, increments_in, runs_in), increments_out, runs_out)
    torch.testing.assert_close(merged, (r @ weight.T @ p).T, atol=1e-12, rtol=0)
    assert torch.equal(merge_output(merge_input(weight, [], ()), [], ()), weight)


def test_permuting_a_weight_never_returns_its_storage():
    weight = torch.arange(12.0).view(3, 4)
    rows, columns = torch.tensor([2, 0, 1]), torch.tensor([3, 1, 0, 2])
    assert torch.equal(permute_weight(weight, rows, columns), weight[rows][:, columns])
    assert torch.equal(permute_weight(weight, rows, None), weight[rows])
    assert torch.equal(permute_weight(weight, None, columns), weight[:, columns])
    copy = permute_weight(weight, None, None)
    assert torch.equal(copy, weight) and copy.data_ptr() != weight.data_ptr()
