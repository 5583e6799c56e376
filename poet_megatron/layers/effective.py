"""Weight-centric computation: form R W0 P once per step, then run a plain linear layer (pays off for blocks large beside the layer)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from poet_megatron.layers.factor_cache import FactorCache
from poet_megatron.ops.block_product import block_product, block_product_grad
from poet_megatron.ops.merge import merge_input, merge_output

if TYPE_CHECKING:
    from poet_megatron.layers.matrix import RotatedMatrix
    from poet_megatron.layers.rotation import Increments


class Factors:
    """The effective weights [sum of out, in] in feature order, and the increments they were made of: of R, and of the P of each matrix."""

    def __init__(self, weight: Tensor, increments_in: Increments, increments_out: list[Increments]) -> None:
        self.weight, self.increments_in, self.increments_out = weight, increments_in, increments_out


class EffectiveWeight:
    """Computes y = x (R W0 P) through an effective weight, cached within a step.

    Several matrices must share R; their outputs lie side by side. R's gradient is added up over them before it goes through the
    orthogonal map (and over tensor-parallel ranks), once.
    """

    def __init__(self, *matrices: RotatedMatrix) -> None:
        self.matrices = matrices
        self.rotation_in = matrices[0].rotation_in
        self.factor_cache: FactorCache[Factors] = FactorCache()

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., sum of out]."""
        last = self.factor_cache.is_last()
        rotations = [self.rotation_in, *(matrix.rotation_out for matrix in self.matrices)]
        anchor = x.new_zeros((), requires_grad=torch.is_grad_enabled())
        return _WeightCentric.apply(x, anchor, self, last, *(rotation.skew if last else None for rotation in rotations))

    def factors(self) -> Factors:
        """The effective weights for the current skews."""
        return self.factor_cache.factor(self._compute)

    def _compute(self) -> Factors:
        dtype = self.matrices[0].weight.dtype
        increments_in = self.rotation_in.increments(dtype)
        increments_out = [matrix.rotation_out.increments(dtype) for matrix in self.matrices]
        weights = []
        for matrix, increments in zip(self.matrices, increments_out, strict=True):
            stored = merge_input(matrix.weight, increments_in.cast, self.rotation_in.layout.runs)
            weights.append(matrix.canonical(merge_output(stored, increments.cast, matrix.rotation_out.layout.runs)))
        return Factors(weights[0] if len(weights) == 1 else torch.cat(weights), increments_in, increments_out)

    def skew_grads(self, factors: Factors, grad_weight: Tensor) -> list[Tensor | None]:
        """Gradients of the skews of R and of every P for the gradient of the effective weights [sum of out, in] in feature order."""
        runs_in = self.rotation_in.layout.runs
        total_in: list[Tensor] | None = None
        grads_out = []
        parts = grad_weight.split([matrix.weight.shape[0] for matrix in self.matrices])
        for matrix, increments_out, part in zip(self.matrices, factors.increments_out, parts, strict=True):
            grad, weight = matrix.stored(part), matrix.weight.to(part.dtype)
            if runs_in:
                own = _input_grad(matrix, weight, increments_out, grad)
                total_in = own if total_in is None else [total.add_(g) for total, g in zip(total_in, own, strict=True)]
            grads_out.append(_output_grad(matrix, weight, factors.increments_in, increments_out, grad))
        grad_in = None if total_in is None else self.rotation_in.skew_grad(factors.increments_in, total_in)
        return [grad_in, *grads_out]


def _input_grad(matrix: RotatedMatrix, weight: Tensor, increments_out: Increments, grad: Tensor) -> list[Tensor]:
    """dE of R from one matrix: `weight` and `grad` [out, in] in stored order."""
    exact = [e.to(grad.dtype) for e in increments_out.exact]
    return block_product_grad(grad, merge_output(weight, exact, matrix.rotation_out.layout.runs), matrix.rotation_in.layout.runs)


def _output_grad(
    matrix: RotatedMatrix, weight: Tensor, increments_in: Increments, increments_out: Increments, grad: Tensor
) -> Tensor | None:
    """Gradient of the skew of P: `weight` and `grad` [out, in] in stored order."""
    runs_in, runs_out = matrix.rotation_in.layout.runs, matrix.rotation_out.layout.runs
    if not runs_out:
        return None
    grad_rotated = block_product(grad, [e.to(grad.dtype) for e in increments_in.exact], runs_in) if runs_in else grad
    return matrix.rotation_out.skew_grad(increments_out, block_product_grad(weight.mT, grad_rotated.mT, runs_out))


class _WeightCentric(torch.autograd.Function):
    """y = x W_eff^T; adds up dW_eff over micro-batches and turns it into skew gradients in the last one."""

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, effective: EffectiveWeight, last: bool, *skews: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        factors = effective.factors()
        ctx.save_for_backward(x)
        ctx.effective, ctx.factors, ctx.last = effective, factors, last
        return x @ factors.weight.mT

    @staticmethod
    def backward(ctx, grad_y: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        effective: EffectiveWeight = ctx.effective
        accumulate = torch.promote_types(x.dtype, torch.float32)
        grad_weight = (grad_y.reshape(-1, grad_y.shape[-1]).mT @ x.reshape(-1, x.shape[-1])).to(accumulate)
        (total,) = effective.factor_cache.add([grad_weight])
        grads = effective.skew_grads(ctx.factors, total) if ctx.last else [None] * (len(effective.matrices) + 1)
        grad_x = grad_y @ ctx.factors.weight if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, *grads
