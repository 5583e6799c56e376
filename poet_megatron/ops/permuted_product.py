"""The product of activations with one factor: y = scatter(gather(x) (I + Diag(E))), and the gradient of E.

A side of a rotated matrix costs exactly one such product (docs/design.md): the input side gathers x into stored order, the output side
scatters back into feature order, and the permutations in between are part of the frozen weight. The compiled CPU kernel does all of it in
one pass over x (csrc/cpu/permuted_product.cpp); CUDA takes a permutation and a product (csrc/cuda/); the reference is three plain torch
steps, and runs in any dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from poet_megatron.ops import native
from poet_megatron.ops.block_product import BlockRun, block_product, block_product_grad

NATIVE_DTYPES = (torch.float32, torch.bfloat16)


def runs_on_native(x: Tensor) -> bool:
    """Whether compiled kernels take this tensor."""
    return x.dtype in NATIVE_DTYPES and native.native_available(x.device.type)


def adjacent_runs(shapes: Sequence[tuple[int, int]]) -> tuple[BlockRun, ...]:
    """Runs of (count, size) blocks, one after the other from column 0 on."""
    runs: list[BlockRun] = []
    for count, size in shapes:
        runs.append(BlockRun(count, size, runs[-1].stop if runs else 0))
    return tuple(runs)


def permuted_block_product(
    x: Tensor, gather: Tensor | None, increments: Sequence[Tensor], transpose: bool, inverse: Tensor | None
) -> Tensor:
    """y = scatter(gather(x) (I + D)), D = Diag(E) or Diag(E^T) on the leading columns.

    Args:
        x: [T, width], fp32 or bf16 for compiled kernels, any floating dtype otherwise.
        gather: int32 [width], stored column i is column gather[i] of x; None leaves the order.
        increments: one tensor E [count, size, size] per run of equal blocks (full ones, ragged ones), dtype of x.
        transpose: multiply by E^T.
        inverse: int32 [width], column i of y is stored column inverse[i]; None leaves the order.

    Returns:
        y [T, width], contiguous. bf16 products are summed in fp32.
    """
    if runs_on_native(x):
        return torch.ops.poet_native.permuted_block_product(x, gather, list(increments), transpose, inverse)
    stored = x if gather is None else x.index_select(1, gather)
    y = block_product(stored, increments, adjacent_runs([(e.shape[0], e.shape[1]) for e in increments]), transpose)
    return y if inverse is None else y.index_select(1, inverse)


def permuted_block_product_grad(
    x: Tensor, gather_x: Tensor | None, grad: Tensor, gather_grad: Tensor | None, runs: Sequence[BlockRun]
) -> list[Tensor]:
    """dE_j = x_j^T dy_j for every block j, x and dy gathered into stored order first.

    Args:
        x: [T, width].
        gather_x: int32 [width] or None, as in `permuted_block_product`.
        grad: [T, width], dtype of x.
        gather_grad: int32 [width] or None.
        runs: adjacent runs from column 0 on.

    Returns:
        One tensor [count, size, size] per run, in fp32 (fp64 for fp64).
    """
    if not runs:
        return []
    if runs_on_native(x):
        shapes = [number for run in runs for number in (run.count, run.size)]
        return torch.ops.poet_native.permuted_block_product_grad(x, gather_x, grad, gather_grad, shapes)
    stored = x if gather_x is None else x.index_select(1, gather_x)
    return block_product_grad(stored, grad if gather_grad is None else grad.index_select(1, gather_grad), runs)
