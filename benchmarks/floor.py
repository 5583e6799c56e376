"""Flop floors: what a POET layer would cost beside a dense one if every flop took the same time and nothing else did."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.layers.cost import choose_compute, input_centric_flops, weight_centric_flops
from poet_megatron.layers.side import SideLayout


@dataclass(frozen=True)
class Floor:
    """Flops of one optimizer step of a POET layer, as fractions of the dense layer's 6Tmn.

    Attributes:
        compute: "input" or "weight", as the layer chooses under compute = auto.
        products: matrix and block products; input-centric without ragged blocks 2/3 + b(m+n)/(mn).
        with_cayley: products plus the series of the Cayley-Neumann map and its gradient. These run in fp32, so that the floor of a
            bf16 layer is out of reach by more than this says.
    """

    compute: str
    products: float
    with_cayley: float

    @classmethod
    def of(cls, tokens: int, side_in: SideLayout, side_out: SideLayout, neumann_terms: int) -> Floor:
        """Floor of a layer with the given sides.

        Args:
            tokens: per optimizer step.
            side_in: input side.
            side_out: output side.
            neumann_terms: k of the map.
        """
        compute = choose_compute("auto", tokens, side_in, side_out)
        flops = (input_centric_flops if compute == "input" else weight_centric_flops)(tokens, side_in, side_out)
        cubes = _sum_cubes(side_in) + _sum_cubes(side_out)
        dense = 6 * tokens * side_in.width * side_out.width
        return cls(compute, flops / dense, (flops + 2 * series_products(neumann_terms) * cubes) / dense)


def series_products(neumann_terms: int) -> float:
    """b x b products that the series of degree k + 1 and its gradient take per block in csrc/cpu/series.cpp: 1.5 and 5 for k = 4.

    A product whose result is symmetric or skew counts a half.
    """
    degree = neumann_terms + 1
    powers, odd = degree // 2, degree >= 3
    forward = 0.5 * powers + (0.5 if odd else 0.0)
    reverse = 1 + 2 * (powers - 2) if powers > 1 else 0
    return forward + 0.5 * powers + (2 if odd else 0) + reverse + 1


def _sum_cubes(side: SideLayout) -> int:
    return side.groups * (side.full * side.block_size**3 + side.ragged**3)
