"""Products with a block diagonal of increments: y = x + x Diag(E_1, ..., E_c), on the leading columns of x.

The columns are in permuted order (see layers.rotation): full blocks first, then one smaller block per shard group if the width is
ragged, then the columns that no block touches (fully-stochastic layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockRun:
    """`count` adjacent blocks of side `size`, starting at column `offset`."""

    count: int
    size: int
    offset: int

    @property
    def stop(self) -> int:
        """First column after the run."""
        return self.offset + self.count * self.size


def _blocks(x: Tensor, run: BlockRun) -> Tensor:
    """View columns of x [T, width] as [count, T, size]."""
    return x[:, run.offset : run.stop].unflatten(1, (run.count, run.size)).transpose(0, 1)


def block_product(x: Tensor, increments: Sequence[Tensor], runs: Sequence[BlockRun], transpose: bool = False) -> Tensor:
    """y = x + x E (or x + x E^T) on the columns of `runs`, y = x on the rest.

    Args:
        x: [T, width].
        increments: one [count, size, size] tensor per run, dtype of x.
        runs: adjacent runs from column 0 on.
        transpose: multiply by E^T (backward, and merges of a stored [out, in] weight).

    Returns:
        y [T, width], contiguous.
    """
    if x.device.type == "cpu":
        return _block_product_cpu(x, increments, runs, transpose)
    pieces = []
    for increment, run in zip(increments, runs, strict=True):
        columns = _blocks(x, run)
        product = torch.baddbmm(columns, columns, increment.mT if transpose else increment)
        pieces.append(product.transpose(0, 1).reshape(x.shape[0], run.count * run.size))
    stop = runs[-1].stop if runs else 0
    if stop < x.shape[1]:
        pieces.append(x[:, stop:])
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _block_product_cpu(x: Tensor, increments: Sequence[Tensor], runs: Sequence[BlockRun], transpose: bool) -> Tensor:
    """One product per block, written in place: on a CPU the batched product copies its operands, which costs more than the calls."""
    y = torch.empty(x.shape, dtype=x.dtype)
    for increment, run in zip(increments, runs, strict=True):
        blocks = (increment.mT if transpose else increment).unbind(0)
        sources, targets = (tensor[:, run.offset : run.stop].split(run.size, dim=1) for tensor in (x, y))
        for source, target, block in zip(sources, targets, blocks, strict=True):
            torch.addmm(source, source, block, out=target)
    stop = runs[-1].stop if runs else 0
    y[:, stop:] = x[:, stop:]
    return y


def block_product_grad(x: Tensor, grad_y: Tensor, runs: Sequence[BlockRun]) -> list[Tensor]:
    """dE = x_j^T dy_j for each block j: one [count, size, size] tensor per run, in the accumulation dtype (fp32 at least)."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return [torch.bmm(_gemm_ready(_blocks(x, run)).mT, _gemm_ready(_blocks(grad_y, run))).to(accumulate) for run in runs]


def _gemm_ready(blocks: Tensor) -> Tensor:
    """Blocks as the batched product likes them: bf16 on a CPU is 7 to 13 times faster from contiguous memory."""
    return blocks.contiguous() if blocks.device.type == "cpu" and blocks.dtype == torch.bfloat16 else blocks
