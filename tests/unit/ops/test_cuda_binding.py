"""The CUDA binding composes its launchers to what the CPU op does in one pass.

There is no GPU here: csrc/bindings/cuda_ops.cpp is compiled for CPU tensors and linked with launchers that call the CPU kernels
(tests/assets/cuda_launchers_on_cpu.cpp). The launchers themselves are tested in tests/cuda.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from build_support import toolchain
from build_support.parts import BINDING_FLAGS, Builder
from build_support.steps import run_steps
from poet_megatron.ops import native

ROOT = Path(__file__).parents[3]
ASSET = ROOT / "tests" / "assets" / "cuda_launchers_on_cpu.cpp"
FLAGS = (*BINDING_FLAGS, "-DPOET_NAMESPACE=poet_binding_test", "-DPOET_KEY=CPU", "-O1")
HEIGHT, WIDTH = 40, 44
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """(ops of the CUDA binding on CPU tensors, ops of the CPU binding)."""
    if not native.load("cpu").available:
        pytest.skip(f"the compiled ops are not here: {native.load('cpu').why}")
    folder = tmp_path_factory.mktemp("cuda-binding")
    try:
        compiler, found = toolchain.find_compiler(os.environ), toolchain.require_torch()
    except toolchain.MissingToolError as error:
        pytest.skip(str(error))
    builder = Builder(ROOT / "csrc", folder, tuple(compiler))
    headers = ("-isystem", str(found.include))
    steps = [builder.compile(ROOT / "csrc/bindings/cuda_ops.cpp", *FLAGS, *headers), builder.compile(ASSET, *FLAGS, *headers)]
    assert not any(run_steps(steps, 2).values())
    kernels = native.FOLDER / native.LIBRARIES["cpu"]  # loaded already: the same kernels serve both
    library = builder.link_ops(folder / "binding_test.so", [*(step.output for step in steps), kernels], found)
    library.run()
    torch.ops.load_library(str(library.output))
    return torch.ops.poet_binding_test, torch.ops.poet_native


def make(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(0.3).to(dtype)


def order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).int()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_product(both: tuple[Any, Any], dtype: torch.dtype, gathered: bool, scattered: bool, blocks: int) -> None:
    ours, reference = both
    increments = [make(2, 16, 16, dtype=dtype), make(1, 8, 8, dtype=dtype)][:blocks]
    x = make(5, WIDTH, dtype=dtype)
    arguments = (x, order(WIDTH, 1) if gathered else None, increments, bool(blocks), order(WIDTH, 2) if scattered else None)
    found = ours.permuted_block_product(*arguments)
    assert torch.equal(found, reference.permuted_block_product(*arguments))
    assert found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("orders", [(None, None), (1, None), (None, 2), (1, 2)])
def test_product_gradient(both: tuple[Any, Any], dtype: torch.dtype, orders: tuple[int | None, int | None]) -> None:
    ours, reference = both
    x, g = make(9, WIDTH, dtype=dtype), make(9, WIDTH, dtype=dtype, seed=1)
    gather_x, gather_g = (None if seed is None else order(WIDTH, seed) for seed in orders)
    for runs in ([2, 16], [2, 16, 1, 8]):
        found = ours.permuted_block_product_grad(x, gather_x, g, gather_g, runs)
        wanted = reference.permuted_block_product_grad(x, gather_x, g, gather_g, runs)
        assert len(found) == len(runs) // 2 and all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))


def test_skews_and_series(both: tuple[Any, Any]) -> None:
    ours, reference = both
    packed, coefficients = make(3, 28), [0.0, 2.0, 2.0, 1.0]
    q = reference.skew_unpack(packed, 8)
    assert torch.equal(ours.skew_unpack(packed, 8), q)
    assert torch.equal(ours.skew_pack_grad(make(3, 8, 8)), reference.skew_pack_grad(make(3, 8, 8)))
    assert torch.equal(ours.series_increment(q, coefficients), reference.series_increment(q, coefficients))
    arguments = (q, coefficients, make(3, 8, 8, seed=1))
    assert torch.equal(ours.series_grad(*arguments), reference.series_grad(*arguments))


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize("out_blocks", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES])
@pytest.mark.parametrize("in_place", [False, True])
def test_merge(
    both: tuple[Any, Any], in_blocks: bool, out_blocks: bool, permuted: bool, dtypes: tuple[torch.dtype, torch.dtype], in_place: bool
) -> None:
    if in_place and dtypes[0] != dtypes[1]:
        pytest.skip("one matrix has one dtype")
    w = make(HEIGHT, WIDTH + 3, dtype=dtypes[0])[:, :WIDTH]
    columns = order(WIDTH, 2)
    permutations = (order(HEIGHT, 1), columns, columns.argsort().int()) if permuted else (None, None, None)
    increments_in = [make(2, 16, 16), make(1, 8, 8)] if in_blocks else []
    increments_out = [make(2, 16, 16, seed=1), make(1, 4, 4)] if out_blocks else []
    results = []
    for ops in both:
        source = torch.full((HEIGHT, WIDTH + 3), 7.0, dtype=dtypes[0])
        source[:, :WIDTH] = w
        out = source[:, :WIDTH] if in_place else torch.empty(HEIGHT, WIDTH, dtype=dtypes[1])
        ops.merge(source[:, :WIDTH], *permutations, increments_in, increments_out, out)
        assert (source[:, WIDTH:] == 7).all() and (in_place or torch.equal(source[:, :WIDTH], w))
        results.append(out.float())
    # Two sums of at most 16 products each, in fp32; then one rounding to bf16, which may fall on either side.
    bound = 2.0**-8 if torch.bfloat16 in dtypes[1:] else 2.0**-20
    torch.testing.assert_close(*results, rtol=bound, atol=bound)


def test_a_failed_launch_names_op_error_and_shape(both: tuple[Any, Any]) -> None:
    ours, _ = both
    with pytest.raises(
        RuntimeError, match=r"skew_unpack: CUDA error 700 \(an error of the test\) with packed float32 \[13, 6\] on cpu, b = 4"
    ):
        ours.skew_unpack(make(13, 6), 4)
    with pytest.raises(RuntimeError, match=r"CUDA error 209 \(no kernel image.*; build with .* in POET_CUDA_ARCHS"):
        ours.skew_pack_grad(make(13, 4, 4))
    with pytest.raises(ValueError, match=r"poet_native::skew_unpack: packed must be float32"):
        ours.skew_unpack(make(3, 6).double(), 4)
