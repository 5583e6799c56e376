"""Where the time of an input-centric POET layer goes: the pieces of one optimizer step, timed apart from each other and from autograd."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.rotation import Increments, Rotation
from poet_megatron.ops.permuted_product import permuted_block_product, permuted_block_product_grad

T = TypeVar("T")
PARTS = ("product_forward", "product_grad_x", "product_grad_e", "cayley_forward", "cayley_backward", "gemm")


class PartTimer:
    """Runs the operations of `Rotation` and the two GEMMs of one step, in their order, and keeps the seconds of each part.

    Attributes:
        seconds: per call and part. What a whole layer takes beyond their sum is autograd, allocation and adding up gradients.
    """

    def __init__(self, matrix: RotatedMatrix, inputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        """Time `matrix` on one step.

        Args:
            matrix: input-centric, with a block on both sides.
            inputs: micro-batches [tokens, in].
            grads: gradients of the outputs [tokens, out], one per micro-batch.
        """
        self.matrix, self.inputs, self.grads = matrix, inputs, grads
        self.seconds: list[dict[str, float]] = []

    def __call__(self) -> float:
        """One optimizer step; returns its seconds."""
        start = time.perf_counter()
        self._now = dict.fromkeys(PARTS, 0.0)
        with torch.no_grad():
            self._step(self.matrix.rotation_in, self.matrix.rotation_out)
        self.seconds.append(self._now)
        return time.perf_counter() - start

    def _step(self, rotation_in: Rotation, rotation_out: Rotation) -> None:
        dtype = self.matrix.weight.dtype
        factor_in = self._time("cayley_forward", lambda: rotation_in.increments(dtype))
        factor_out = self._time("cayley_forward", lambda: rotation_out.increments(dtype))
        grads_in: list[Tensor] = []
        grads_out: list[Tensor] = []
        for x, grad_y in zip(self.inputs, self.grads, strict=True):
            grads_in, grads_out = self._micro_batch(x, grad_y, factor_in, factor_out)
        self._time("cayley_backward", lambda: rotation_out.skew_grad(factor_out, grads_out))
        self._time("cayley_backward", lambda: rotation_in.skew_grad(factor_in, grads_in))

    def _micro_batch(self, x: Tensor, grad_y: Tensor, factor_in: Increments, factor_out: Increments) -> tuple[list[Tensor], list[Tensor]]:
        rotation_in, rotation_out, weight = self.matrix.rotation_in, self.matrix.rotation_out, self.matrix.weight
        runs_in, runs_out = rotation_in.layout.runs, rotation_out.layout.runs
        cast_in, cast_out = factor_in.cast, factor_out.cast
        rotated = self._time("product_forward", lambda: permuted_block_product(x, rotation_in.perm, cast_in, False, None))
        z = self._time("gemm", lambda: F.linear(rotated, weight))
        self._time("product_forward", lambda: permuted_block_product(z, None, cast_out, False, rotation_out.inverse))

        grads_out = self._time("product_grad_e", lambda: permuted_block_product_grad(z, None, grad_y, rotation_out.perm, runs_out))
        grad_z = self._time("product_grad_x", lambda: permuted_block_product(grad_y, rotation_out.perm, cast_out, True, None))
        grad = self._time("gemm", lambda: grad_z @ weight)
        grads_in = self._time("product_grad_e", lambda: permuted_block_product_grad(x, rotation_in.perm, grad, None, runs_in))
        self._time("product_grad_x", lambda: permuted_block_product(grad, None, cast_in, True, rotation_in.inverse))
        return grads_in, grads_out

    def _time(self, part: str, function: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = function()
        self._now[part] += time.perf_counter() - start
        return result
