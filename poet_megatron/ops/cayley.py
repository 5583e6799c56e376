"""Orthogonal maps in increment form: E = G - I for a batch of skew blocks Q, and the gradient of Q.

Three maps: the truncated Cayley-Neumann series T_k(Q) = (I+Q)(I + Q + ... + Q^k) (POET, Eq. 6), the exact Cayley map (I+Q)(I-Q)^{-1}
by a Cholesky factorization of I - Q^2 = I + Q^T Q, and the matrix exponential. Only E is ever formed: a bf16 G = I + E rounds its diagonal
to 1 while keeping the off-diagonal, which inflates the spectrum at every merge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from poet_megatron.ops import native

EXP_SQUARINGS = 4
EXP_DEGREE = 10  # |Q|_2 <= 4 leaves a truncation error of (4/16)^11 / 11! * 16 = 1e-13


@dataclass(frozen=True)
class OrthogonalMap:
    """Which map turns a skew block into an orthogonal one.

    Attributes:
        kind: "cayley-neumann", "cayley" or "exp".
        terms: k of Eq. 6 (cayley-neumann only).
        tail: coefficient of Q^(k+1): 1 in Eq. 6; 2 makes every coefficient 2.
    """

    kind: str
    terms: int = 4
    tail: float = 1.0

    def increment(self, q: Tensor) -> Tensor:
        """E = G(Q) - I for skew q [N, b, b]; same shape and dtype."""
        if self.kind == "cayley-neumann":
            if _on_native(q, self.terms + 1):
                return torch.ops.poet_native.series_increment(q, self._coefficients())
            return _polynomial(q, self._coefficients())[0]
        if self.kind == "cayley":
            return _cayley_increment(q)
        return _exp_increment(q)

    def increment_grad(self, q: Tensor, increment: Tensor, grad_increment: Tensor) -> Tensor:
        """dQ [N, b, b] for the gradient of E; `increment` is E(q), used by the exact Cayley map.

        Only dQ - dQ^T, the gradient along skew directions, is the same for every implementation (see `skew_pack_grad`).
        """
        if self.kind == "cayley-neumann":
            if _on_native(q, self.terms + 1):
                return torch.ops.poet_native.series_grad(q, self._coefficients(), grad_increment)
            return _polynomial_grad(q, self._coefficients(), grad_increment)
        if self.kind == "cayley":
            return _cayley_grad(increment, grad_increment)
        return _exp_grad(q, grad_increment)

    def _coefficients(self) -> list[float]:
        return [0.0] + [2.0] * self.terms + [self.tail]


EXACT = OrthogonalMap("cayley")


NATIVE_CPU_DEGREE = 33
"""Highest degree of the compiled CPU series (max_powers in csrc/cpu/series.cpp)."""
NATIVE_CPU_BLOCK = 512
"""Largest block for the compiled CPU series, which gives a block to one thread; the library's products use all of them."""


def _on_native(q: Tensor, degree: int) -> bool:
    too_large = q.device.type == "cpu" and (q.shape[-1] > NATIVE_CPU_BLOCK or degree > NATIVE_CPU_DEGREE)
    if q.dtype != torch.float32 or too_large:
        return False
    return native.native_available(q.device.type)


def _polynomial(q: Tensor, coefficients: list[float]) -> tuple[Tensor, list[Tensor], Tensor]:
    """sum_i c_i Q^i by Horner's rule in S = Q^2: H_j = c_{2j} I + c_{2j+1} Q + S H_{j+1}.

    Returns:
        (H_0, [H_1, ..., H_top], S): about half as many products as Horner in Q; the partial values serve the gradient.
    """
    square = q @ q
    top = (len(coefficients) - 1) // 2
    partials: list[Tensor] = []
    current: Tensor | None = None
    for j in range(top, -1, -1):
        value = _odd_coefficient(coefficients, j) * q
        if current is not None:
            value = torch.baddbmm(value, square, current)
        value.diagonal(dim1=-2, dim2=-1).add_(coefficients[2 * j])
        if current is not None:
            partials.insert(0, current)
        current = value
    assert current is not None
    return current, partials, square


def _odd_coefficient(coefficients: list[float], j: int) -> float:
    return coefficients[2 * j + 1] if 2 * j + 1 < len(coefficients) else 0.0


def _polynomial_grad(q: Tensor, coefficients: list[float], grad: Tensor) -> Tensor:
    """Reverse mode of `_polynomial`; S is symmetric, Q^T = -Q."""
    _, partials, square = _polynomial(q, coefficients)
    grad_q = _odd_coefficient(coefficients, 0) * grad
    grad_square = torch.zeros_like(q)
    for j, partial in enumerate(partials, start=1):
        grad_square = torch.baddbmm(grad_square, grad, partial.mT)
        grad = square @ grad
        grad_q = grad_q + _odd_coefficient(coefficients, j) * grad
    return grad_q - grad_square @ q - q @ grad_square


def _cayley_increment(q: Tensor) -> Tensor:
    """E = 2 (Q + Q^2)(I - Q^2)^{-1}; the factors commute, so one Cholesky solve from the left suffices."""
    square = q @ q
    definite = -square
    definite.diagonal(dim1=-2, dim2=-1).add_(1.0)
    factor, _ = torch.linalg.cholesky_ex(definite)  # I + Q^T Q is positive definite; checking that would wait for the GPU
    return torch.cholesky_solve(2.0 * (q + square), factor).contiguous()  # it comes column by column


def _cayley_grad(increment: Tensor, grad: Tensor) -> Tensor:
    """dC = 1/2 (I+C) dQ (I+C) with I + C = 2I + E, hence dQ = 1/2 (2I+E)^T G (2I+E)^T."""
    left = 2.0 * grad + increment.mT @ grad
    return left + 0.5 * (left @ increment.mT)


def _exp_increment(q: Tensor) -> Tensor:
    """exp(Q) - I by a Taylor polynomial of Q / 2^s and s squarings in increment form, E <- 2E + E^2."""
    return _exp_steps(q)[-1]


def _exp_steps(q: Tensor) -> list[Tensor]:
    """Every intermediate value of `_exp_increment`: EXP_DEGREE Horner steps from Q / 2^s / EXP_DEGREE on, then the squarings."""
    scaled = q / 2**EXP_SQUARINGS
    values = [scaled / EXP_DEGREE]
    for divisor in range(EXP_DEGREE - 1, 0, -1):
        values.append((scaled + scaled @ values[-1]) / divisor)
    for _ in range(EXP_SQUARINGS):
        values.append(2.0 * values[-1] + values[-1] @ values[-1])
    return values


def _exp_grad(q: Tensor, grad: Tensor) -> Tensor:
    """Reverse mode of `_exp_increment`."""
    values = _exp_steps(q)[:-1]
    for _ in range(EXP_SQUARINGS):
        transposed = values.pop().mT
        grad = 2.0 * grad + grad @ transposed + transposed @ grad
    scaled = q / 2**EXP_SQUARINGS
    total = torch.zeros_like(q)
    for divisor in range(1, EXP_DEGREE):
        grad = grad / divisor
        total = total + grad + grad @ values.pop().mT
        grad = scaled.mT @ grad
    return (total + grad / EXP_DEGREE) / 2**EXP_SQUARINGS


def orthogonality_defect(increment: Tensor) -> Tensor:
    """|G G^T - I|_F^2 summed over blocks, for E = G - I of shape [N, b, b] (numerator of POET's e_orth); a scalar."""
    gram = increment + increment.mT + increment @ increment.mT
    return gram.square().sum()


def skew_norm(q: Tensor, iterations: int = 16) -> Tensor:
    """Largest |Q|_2 over the blocks of q [N, b, b] by power iteration on Q^T Q; a scalar, a slight underestimate."""
    ramp = torch.arange(q.shape[-1], device=q.device, dtype=q.dtype)
    vector = (1.0 + (ramp * 0.754877666).frac()).expand(q.shape[0], -1).unsqueeze(-1)
    for _ in range(iterations):
        vector = q.mT @ (q @ vector)
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
    return (q @ vector).norm(dim=1).max()
