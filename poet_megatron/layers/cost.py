"""Cost models: rotating activations or forming the effective weight, and where a column-parallel layer rotates its input.

Per token the first costs 4mn + 6b(m+n), the second 6mn, so forming the weight wins where 3b(1/m + 1/n) > 1: large blocks on small layers
(b = 256 at 512 x 512), block-stochastic or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from poet_megatron.layers.side import SideLayout

FP32_BYTES = 4
FLOPS_PER_BYTE = 4e14 / 3e11
"""Flops in the time of one byte on an H100: 4e14 bf16 flop/s achieved, 3e11 B/s bus bandwidth of NVLink all-gathers and reduce-scatters."""


def input_centric_flops(tokens: int, side_in: SideLayout, *sides_out: SideLayout, share_in: float = 1, share_out: float = 1) -> int:
    """Flops of one optimizer step on `tokens` tokens when activations are rotated: 4Tmn, plus 6T sum b^2 per side (DESIGN 3).

    Several output sides: matrices that share the input side and its rotation. `share_in` and `share_out` are the fractions of the tokens
    that this rank rotates on a side: under sequence parallelism 1/tp for a replicated factor outside the copies and gathers.
    """
    dense = sum(4 * tokens * side_in.width * side.width for side in sides_out)
    return dense + round(6 * tokens * (share_in * side_in.sum_squares + share_out * sum(side.sum_squares for side in sides_out)))


def weight_centric_flops(tokens: int, side_in: SideLayout, *sides_out: SideLayout) -> int:
    """Flops of one optimizer step when effective weights are formed once: 6Tmn, plus 6 sum b^2 times the other width per side."""
    dense = sum(6 * tokens * side_in.width * side.width for side in sides_out)
    return dense + sum(6 * (side_in.sum_squares * side.width + side.sum_squares * side_in.width) for side in sides_out)


def choose_compute(mode: str, tokens: int, side_in: SideLayout, *sides_out: SideLayout, share_in: float = 1, share_out: float = 1) -> str:
    """Resolve poet.compute ("auto", "input" or "weight") for one matrix, or for several that share their input rotation.

    Args:
        mode: the setting.
        tokens: tokens per rank and optimizer step.
        side_in: input side.
        sides_out: output side of each matrix.
        share_in: see input_centric_flops.
        share_out: likewise.
    """
    if mode != "auto":
        return mode
    rotating = input_centric_flops(tokens, side_in, *sides_out, share_in=share_in, share_out=share_out)
    return "weight" if weight_centric_flops(tokens, side_in, *sides_out) < rotating else "input"


@dataclass(frozen=True)
class TensorParallelism:
    """What the cost of a placement depends on besides the matrices.

    Attributes:
        size: tensor-parallel ranks.
        sequence_parallel: whether activations outside the layer are split along the sequence.
        itemsize: bytes of an activation element.
    """

    size: int
    sequence_parallel: bool
    itemsize: int


def outside_cost(tokens: int, parts: int, rotating: Sequence[SideLayout], tp: TensorParallelism) -> float:
    """Cost per rank and optimizer step of rotating before the copy or gather, in flops (see `inside_cost`).

    Every rotated input is distributed on its own, and the parts that rotate no activations share one more. Under sequence parallelism a
    rank rotates its share of the tokens and Megatron adds up the gradients of the factors.
    """
    distributions = len(rotating) + (len(rotating) < parts)
    own = tokens / tp.size if tp.sequence_parallel else tokens
    moved = distributions * _distribution_bytes(tokens, rotating, tp)
    if tp.sequence_parallel:
        moved += _reduction_bytes(rotating, tp)
    return _rotation_flops(own, rotating) + FLOPS_PER_BYTE * moved


def inside_cost(tokens: int, rotating: Sequence[SideLayout], tp: TensorParallelism) -> float:
    """Cost per rank and optimizer step of rotating after a single copy or gather, in flops; bytes count FLOPS_PER_BYTE each.

    Every rank rotates all tokens, and the factors' gradients are all-reduced once per step.

    Args:
        tokens: tokens per optimizer step of the ranks that split the layer.
        rotating: input side of each part that rotates activations.
        tp: the tensor-parallel layout.
    """
    moved = _distribution_bytes(tokens, rotating, tp) + _reduction_bytes(rotating, tp)
    return _rotation_flops(tokens, rotating) + FLOPS_PER_BYTE * moved


def choose_placement(mode: str, tokens: int, parts: int, rotating: Sequence[SideLayout], tp: TensorParallelism) -> str:
    """Resolve poet.tp_placement ("auto", "outside" or "inside") for a column-parallel layer whose parts rotate their input by themselves.

    Args:
        mode: the setting.
        tokens: tokens per optimizer step of the ranks that split the layer.
        parts: matrices of the layer; a single one is always outside.
        rotating: input side of each part that rotates activations; without any, one copy or gather serves all parts ("inside").
        tp: the tensor-parallel layout.
    """
    if parts == 1:
        return "outside"
    if not rotating:
        return "inside"
    if mode != "auto":
        return mode
    return "inside" if inside_cost(tokens, rotating, tp) < outside_cost(tokens, parts, rotating, tp) else "outside"


def _rotation_flops(tokens: float, rotating: Sequence[SideLayout]) -> float:
    return 6 * tokens * sum(side.sum_squares for side in rotating)


def _distribution_bytes(tokens: int, rotating: Sequence[SideLayout], tp: TensorParallelism) -> float:
    """Bytes on the wire of one copy (all-reduce on the way back) or gather (reduce-scatter on the way back): the same number."""
    return 2 * tokens * rotating[0].width * tp.itemsize * (tp.size - 1) / tp.size


def _reduction_bytes(rotating: Sequence[SideLayout], tp: TensorParallelism) -> float:
    """Bytes on the wire of the all-reduce of the factors' fp32 gradients."""
    return 2 * FP32_BYTES * sum(side.groups * side.packed_per_group for side in rotating) * (tp.size - 1) / tp.size
