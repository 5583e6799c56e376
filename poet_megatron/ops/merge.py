"""Merging rotations into a stored weight: W <- R W P, on the permuted [out, in] form w' = W^T[perm_out][:, perm_in]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from poet_megatron.ops.block_product import BlockRun, block_product
from poet_megatron.ops.permuted_product import adjacent_runs, runs_on_native

NATIVE_CUDA_BLOCK = 4096
"""Largest output block for the compiled CUDA merge, which holds 8 columns of a block in shared memory (5,088 fit on an A100)."""


def blocks_fit(weight: Tensor, increments_out: Sequence[Tensor]) -> bool:
    """Whether the compiled merge of this device holds blocks of that size; the one for CPUs takes any."""
    return weight.device.type == "cpu" or all(e.shape[1] <= NATIVE_CUDA_BLOCK for e in increments_out)


def merge_into(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    inverse_columns: Tensor | None,
    increments_in: Sequence[Tensor],
    increments_out: Sequence[Tensor],
    out: Tensor,
) -> None:
    """out[rows[i], columns[j]] = Y[i, j] with Y = (I + D_out)^T X (I + D_in)^T and X[i, j] = weight[rows[i], columns[j]].

    Both factors are folded into a weight that stays in its order. The compiled CPU kernel reads and writes it once; CUDA takes a pass per
    permutation and side. The arithmetic is that of the
    increments (fp32 at least), the result is rounded once.

    Args:
        weight: [height, width], any floating dtype (fp32 or bf16 for compiled kernels).
        rows: int32 [height]: stored row i is row rows[i]; None leaves the order.
        columns: int32 [width], stored column j is column columns[j]; None leaves the order.
        inverse_columns: int32 [width], the inverse of `columns`; None as well if that is.
        increments_in: E of R, one fp32 or fp64 tensor [count, size, size] per run; empty if R is not learned.
        increments_out: E of P.
        out: [height, width], may be `weight` itself.
    """
    increments = (*increments_in, *increments_out)
    if (
        blocks_fit(weight, increments_out)
        and runs_on_native(weight)
        and runs_on_native(out)
        and all(e.dtype == torch.float32 for e in increments)
    ):
        torch.ops.poet_native.merge(weight, rows, columns, inverse_columns, list(increments_in), list(increments_out), out)
        return
    dtype = torch.promote_types(increments[0].dtype if increments else weight.dtype, torch.float32)
    stored = permute_weight(weight.to(dtype), rows, columns)
    runs_in, runs_out = (adjacent_runs([(e.shape[0], e.shape[1]) for e in side]) for side in (increments_in, increments_out))
    merged = merge_output(merge_input(stored, increments_in, runs_in), increments_out, runs_out)
    inverse_rows = None if rows is None else rows.argsort()
    out.copy_(permute_weight(merged, inverse_rows, inverse_columns))


def merge_input(weight: Tensor, increments: Sequence[Tensor], runs: Sequence[BlockRun]) -> Tensor:
    """w' D_in^T for w' [out, in]: the input-side factor R folded into the weight."""
    return block_product(weight, increments, runs, transpose=True) if runs else weight


def merge_output(weight: Tensor, increments: Sequence[Tensor], runs: Sequence[BlockRun]) -> Tensor:
    """D_out^T w' for w' [out, in]: the output-side factor P folded into the weight."""
    return block_product(weight.mT, increments, runs).mT if runs else weight


def permute_weight(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """weight[rows][:, columns]; None leaves a dimension in place. Never returns the argument's own storage."""
    if rows is not None:
        weight = weight.index_select(0, rows)
    if columns is not None:
        return weight.index_select(1, columns)
    return weight if rows is not None else weight.clone()
