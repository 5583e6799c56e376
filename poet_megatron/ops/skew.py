"""Packed skew-symmetric blocks: the strict upper triangle, row-major, b(b-1)/2 numbers per b x b block."""

from __future__ import annotations

import torch
from torch import Tensor

from poet_megatron.ops import native


def packed_length(block_size: int) -> int:
    """Numbers in the packed form of one skew block of side `block_size`."""
    return block_size * (block_size - 1) // 2


def _on_native(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and native.native_available(tensor.device.type)


def _upper_positions(block_size: int, device: torch.device) -> Tensor:
    rows, cols = torch.triu_indices(block_size, block_size, offset=1, device=device)
    return rows * block_size + cols


def skew_unpack(packed: Tensor, block_size: int) -> Tensor:
    """Unpack skew blocks.

    Args:
        packed: [N, b(b-1)/2], any floating dtype.
        block_size: b.

    Returns:
        Q [N, b, b] with Q = -Q^T, same dtype.
    """
    if _on_native(packed):
        return torch.ops.poet_native.skew_unpack(packed, block_size)
    count = packed.shape[0]
    upper = packed.new_zeros(count, block_size * block_size)
    upper[:, _upper_positions(block_size, packed.device)] = packed
    upper = upper.view(count, block_size, block_size)
    return upper - upper.mT


def skew_pack_grad(grad_q: Tensor) -> Tensor:
    """Adjoint of `skew_unpack`: fold dQ [N, b, b] to the gradient of the packed form, dQ_ij - dQ_ji for i < j, [N, b(b-1)/2]."""
    if _on_native(grad_q):
        return torch.ops.poet_native.skew_pack_grad(grad_q)
    count, block_size, _ = grad_q.shape
    folded = (grad_q - grad_q.mT).reshape(count, block_size * block_size)
    return folded[:, _upper_positions(block_size, grad_q.device)]
