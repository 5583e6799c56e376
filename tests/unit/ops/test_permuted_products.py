"""Compiled CPU kernels against dense float64 products, for every instruction set this machine has, any thread count and any alignment."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from poet_megatron.ops import native
from poet_megatron.ops.permuted_product import adjacent_runs, permuted_block_product, permuted_block_product_grad

# (tokens, width, runs): whole tiles, ragged blocks, columns without a block, sides that no tile divides, a token count below a tile.
SHAPES = [
    (100, 256, [(4, 64)]),
    (33, 300, [(4, 64), (1, 44)]),
    (7, 50, [(2, 20)]),
    (530, 512, [(2, 256)]),
    (1, 16, [(1, 16)]),
    (65, 100, [(3, 32), (1, 3)]),
    (40, 33, [(1, 33)]),
    (600, 520, [(32, 16), (1, 8)]),  # several blocks in one task of dE
    (530, 512, [(8, 64)]),
]
WAYS = [(False, True, False), (True, False, True), (True, True, True), (False, False, False)]  # transpose, gather, scatter
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def built():
    if not native.native_available("cpu"):
        pytest.skip(f"the compiled ops are not here: {native.load('cpu').why}")


def dense(increments, width, transpose):
    """Diag(E) as one float64 matrix [width, width]."""
    matrix, offset = torch.zeros(width, width, dtype=torch.float64), 0
    for increment in increments:
        for block in increment.double():
            stop = offset + len(block)
            matrix[offset:stop, offset:stop] = block.T if transpose else block
            offset = stop
    return matrix


def data(tokens, width, runs, dtype):
    generator = torch.Generator().manual_seed(tokens + width)
    x, grad = (torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(2))
    increments = [(torch.randn(count, size, size, generator=generator) / size).to(dtype) for count, size in runs]
    perm = torch.randperm(width, generator=generator)
    return x, grad, increments, perm


def products(x, grad, increments, perm, way):
    """What the kernels give, and the same in float64."""
    transpose, gather, scatter = way
    inverse = perm.argsort()
    index, index_out = (perm.int() if gather else None), (inverse.int() if scatter else None)
    y = permuted_block_product(x, index, increments, transpose, index_out)
    runs = adjacent_runs([(e.shape[0], e.shape[1]) for e in increments])
    grads = permuted_block_product_grad(x, index, grad, perm.int() if scatter else None, runs)
    stored = x.double()[:, perm] if gather else x.double()
    expected = stored + stored @ dense(increments, x.shape[1], transpose)
    outer = stored.T @ (grad.double()[:, perm] if scatter else grad.double())
    pieces = []
    for run in runs:
        starts = range(run.offset, run.stop, run.size)
        pieces.append(torch.stack([outer[start : start + run.size, start : start + run.size] for start in starts]))
    return (y, expected[:, inverse] if scatter else expected), list(zip(grads, pieces, strict=True))


def check(x, grad, increments, perm, way):
    (y, expected), grads = products(x, grad, increments, perm, way)
    assert y.dtype == x.dtype
    # A sum of k <= 256 fp32 terms of size 1: rms error sqrt(k) eps = 1e-6 of it. bf16 rounds the result once, by at most 2^-8 of it.
    rounding = 2.0**-8 if x.dtype == torch.bfloat16 else 2e-6
    assert ((y.double() - expected).abs() <= rounding * expected.abs() + 4e-6).all()
    for found, oracle in grads:
        assert found.dtype == torch.float32
        # T terms of size 1, added one by one: partial sums grow like sqrt(t), their roundings like eps T / 5, the result like sqrt(T).
        assert (found.double() - oracle).norm() <= 1.2e-7 * len(x) ** 0.5 * oracle.norm()
        assert (found.double() - oracle).abs().max() <= 4e-7 * len(x) + 1e-6  # nothing is wrong in one place only


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "way", WAYS, ids=lambda way: "".join(name[0] for name, on in zip(("transpose", "gather", "scatter"), way, strict=True) if on)
)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape[:2])))
def test_products_and_gradients(shape, way, dtype):
    check(*data(*shape, dtype), way)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "shape", [(530, 300, [(4, 64), (1, 44)]), (600, 520, [(32, 16), (1, 8)]), (300, 256, [(1, 256)])], ids=["ragged", "many", "one"]
)
def test_results_depend_neither_on_threads_nor_on_alignment(shape, dtype):
    x, grad, increments, perm = data(*shape, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads, shift in ((1, 0), (2, 0), (3, 1), (2, 7)):
            torch.set_num_threads(threads)
            moved = torch.empty(x.numel() + shift, dtype=dtype)[shift:].view(x.shape).copy_(x)
            (y, _), grads = products(moved, grad, increments, perm, (True, True, True))
            results.append([y, *(found for found, _ in grads)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_infinities_stay_in_their_row_and_block(dtype):
    """Blocks that no tile divides are padded: what lies behind them must not be multiplied by the zeros of the padding."""
    x, grad, increments, perm = data(40, 50, [(2, 20)], dtype)
    x[3, 25] = float("inf")  # second block, row 3
    y = permuted_block_product(x, None, increments, False, None)
    finite = y.isfinite()
    assert finite[:, :20].all() and finite[:, 40:].all() and not finite[3, 20:40].any()
    finite[3] = True
    assert finite.all()


def test_rows_may_be_strided():
    x, grad, increments, perm = data(40, 64, [(2, 32)], torch.bfloat16)
    wide = torch.zeros(40, 100, dtype=torch.bfloat16)
    wide[:, :64] = x
    found = permuted_block_product(wide[:, :64], perm.int(), increments, False, None)
    assert torch.equal(found, permuted_block_product(x, perm.int(), increments, False, None))


ISA_SCRIPT = """
import json, sys
import torch
sys.path.insert(0, {folder!r})
import test_permuted_products as t
from poet_megatron.ops import native
for dtype in t.DTYPES:
    for shape in t.SHAPES:
        for way in t.WAYS[:3]:
            t.check(*t.data(*shape, dtype), way)
print(json.dumps(native.cpu_isa()))
"""


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """POET_CPU_ISA caps the kernels; it is read once, hence a process each."""
    order = ["portable", "avx2", "avx512", "amx"]
    if order.index(isa) >= order.index(native.cpu_isa() or "portable"):
        pytest.skip(f"this machine has {native.cpu_isa()}")
    script = ISA_SCRIPT.format(folder=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "POET_CPU_ISA": isa}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == isa


def test_large_results_do_not_share_memory_while_they_live():
    """Buffers are kept for the next result of that size, but never handed out twice."""
    x, _, increments, perm = data(2048, 512, [(8, 64)], torch.float32)  # 4 MB

    def product(scale):
        return permuted_block_product(scale * x, perm.int(), increments, False, None)

    first, second = product(1.0), product(2.0)
    copy, address = first.clone(), second.data_ptr()
    kept = second[5:7]  # a view keeps the buffer
    del second
    third = product(3.0)
    assert len({first.data_ptr(), third.data_ptr(), address}) == 3
    assert torch.equal(first, copy) and torch.equal(kept, 2.0 * copy[5:7])
    del kept, third
    assert product(4.0).data_ptr() != first.data_ptr()
    assert torch.equal(first, copy)


def faults(call):
    """Pages that a call had to be given."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.slow
def test_sizes_that_are_no_longer_asked_for_make_room():
    """1.1 GB of results of 4 MB are more than the pool keeps; results of 16 MB are then kept all the same."""
    small, _, increments, perm = data(2048, 512, [(8, 64)], torch.float32)
    large = small.repeat(4, 1)
    results = [permuted_block_product(small, perm.int(), increments, False, None) for _ in range(280)]
    del results
    for _ in range(2):
        permuted_block_product(large, perm.int(), increments, False, None)
    # A fresh buffer is 8 huge pages or 4,096 small ones; one of the pool is none.
    assert sum(faults(lambda: permuted_block_product(large, perm.int(), increments, False, None)) for _ in range(5)) < 5 * 8 / 2
