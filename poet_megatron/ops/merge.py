"""Merging rotations into a stored weight: W <- R W P, on the permuted [out, in] form w' = W^T[perm_out][:, perm_in]."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from poet_megatron.ops.block_product import BlockRun, block_product


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
