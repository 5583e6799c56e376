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
    """The effective weight [out, in] in feature order, and the increments it was made of."""

    def __init__(self, weight: Tensor, increments_in: Increments, increments_out: Increments) -> None:
        self.weight, self.increments_in, self.increments_out = weight, increments_in, increments_out


class EffectiveWeight:
    """Computes y = x (R W0 P) for a RotatedMatrix through its effective weight, cached within a step."""

    def __init__(self, matrix: RotatedMatrix) -> None:
        self.matrix = matrix
        self.factor_cache: FactorCache[Factors] = FactorCache()

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out]."""
        last = self.factor_cache.is_last()
        skews = [rotation.skew if last else None for rotation in (self.matrix.rotation_in, self.matrix.rotation_out)]
        anchor = x.new_zeros((), requires_grad=torch.is_grad_enabled())
        return _WeightCentric.apply(x, skews[0], skews[1], anchor, self, last)

    def factors(self) -> Factors:
        """The effective weight for the current skews."""
        return self.factor_cache.factor(self._compute)

    def _compute(self) -> Factors:
        matrix = self.matrix
        dtype = matrix.weight.dtype
        increments_in = matrix.rotation_in.increments(dtype)
        increments_out = matrix.rotation_out.increments(dtype)
        stored = merge_input(matrix.weight, increments_in.cast, matrix.rotation_in.layout.runs)
        stored = merge_output(stored, increments_out.cast, matrix.rotation_out.layout.runs)
        return Factors(matrix.canonical(stored), increments_in, increments_out)

    def skew_grads(self, factors: Factors, grad_weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the two skews for the gradient of the effective weight [out, in] in feature order."""
        matrix = self.matrix
        runs_in, runs_out = matrix.rotation_in.layout.runs, matrix.rotation_out.layout.runs
        dtype = grad_weight.dtype
        grad = matrix.stored(grad_weight)
        weight = matrix.weight.to(dtype)
        grad_in = grad_out = None
        if runs_in:
            rotated = merge_output(weight, [e.to(dtype) for e in factors.increments_out.exact], runs_out)
            grad_in = matrix.rotation_in.skew_grad(factors.increments_in, block_product_grad(grad, rotated, runs_in))
        if runs_out:
            grad_rotated = block_product(grad, [e.to(dtype) for e in factors.increments_in.exact], runs_in) if runs_in else grad
            grad_out = matrix.rotation_out.skew_grad(factors.increments_out, block_product_grad(weight.mT, grad_rotated.mT, runs_out))
        return grad_in, grad_out


class _WeightCentric(torch.autograd.Function):
    """y = x W_eff^T; adds up dW_eff over micro-batches and turns it into skew gradients in the last one."""

    @staticmethod
    def forward(ctx, x: Tensor, skew_in, skew_out, anchor: Tensor, effective: EffectiveWeight, last: bool) -> Tensor:  # type: ignore[no-untyped-def]
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
        grads = effective.skew_grads(ctx.factors, total) if ctx.last else (None, None)
        grad_x = grad_y @ ctx.factors.weight if ctx.needs_input_grad[0] else None
        return grad_x, grads[0], grads[1], None, None, None
