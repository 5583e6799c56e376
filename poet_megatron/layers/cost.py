"""Flop model of a rotated matrix, and the choice between rotating activations and forming the effective weight.

Per token the first costs 4mn + 6b(m+n), the second 6mn, so forming the weight wins where 3b(1/m + 1/n) > 1: large blocks on small layers
(b = 256 at 512 x 512), block-stochastic or not.
"""

from __future__ import annotations

from poet_megatron.layers.side import SideLayout


def input_centric_flops(tokens: int, side_in: SideLayout, side_out: SideLayout) -> int:
    """Flops of one optimizer step on `tokens` tokens when activations are rotated: 4Tmn, plus 6T sum b^2 per side (DESIGN 3)."""
    dense = 4 * tokens * side_in.width * side_out.width
    return dense + 6 * tokens * (side_in.sum_squares + side_out.sum_squares)


def weight_centric_flops(tokens: int, side_in: SideLayout, side_out: SideLayout) -> int:
    """Flops of one optimizer step when the effective weight is formed once: 6Tmn, plus 6 sum b^2 times the other width per side."""
    dense = 6 * tokens * side_in.width * side_out.width
    return dense + 6 * (side_in.sum_squares * side_out.width + side_out.sum_squares * side_in.width)


def choose_compute(mode: str, tokens: int, side_in: SideLayout, side_out: SideLayout) -> str:
    """Resolve poet.compute ("auto", "input" or "weight") for one matrix.

    Args:
        mode: the setting.
        tokens: tokens per rank and optimizer step.
        side_in: input side.
        side_out: output side.
    """
    if mode != "auto":
        return mode
    return "weight" if weight_centric_flops(tokens, side_in, side_out) < input_centric_flops(tokens, side_in, side_out) else "input"
