"""What is computed once per optimizer step and shared by its micro-batches: factors on the way forward, their gradients on the way back.

Outside a step every forward pass computes its own factor and every backward pass its own gradient, as any autograd function does.
Inside `begin_step(n)` ... `end_step()` the factor is computed at the first of n forward passes, gradients are added up in fp32, and the
gradient of the skews is computed once, inside the backward pass of the last micro-batch, where the hooks of data parallelism expect it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Factor = TypeVar("Factor")


class FactorCache(Generic[Factor]):
    """A factor and the sum of its gradients over the micro-batches of one step."""

    def __init__(self) -> None:
        self._remaining: int | None = None
        self._factor: Factor | None = None
        self._grads: list[Tensor] | None = None

    def begin_step(self, micro_batches: int) -> None:
        """Start a step of `micro_batches` forward passes with gradient (0: evaluation only)."""
        self._remaining, self._factor, self._grads = micro_batches, None, None

    def end_step(self) -> None:
        """Drop the factor and go back to computing it at every forward pass."""
        self._remaining, self._factor, self._grads = None, None, None

    def factor(self, compute: Callable[[], Factor]) -> Factor:
        """The cached factor, computed by `compute` when there is none (or no step)."""
        if self._remaining is None:
            return compute()
        if self._factor is None:
            self._factor = compute()
        return self._factor

    def is_last(self) -> bool:
        """Count one forward pass; whether its backward pass must deliver the gradient of the skews."""
        if self._remaining is None:
            return True
        if not torch.is_grad_enabled():
            return False
        if self._remaining == 0:
            raise RuntimeError("more forward passes with gradient than micro-batches announced by begin_step")
        self._remaining -= 1
        return self._remaining == 0

    def add(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """Add the factor's gradient of one micro-batch; returns the sum so far."""
        if self._remaining is None:
            return list(grads)
        if self._grads is None:
            self._grads = list(grads)
        else:
            for total, grad in zip(self._grads, grads, strict=True):
                total.add_(grad)
        return self._grads


def factor_caches(module: nn.Module) -> list[FactorCache]:
    """Every factor cache below `module`."""
    return [cache for child in module.modules() if isinstance(cache := getattr(child, "factor_cache", None), FactorCache)]


@contextmanager
def cached_factors(modules: Sequence[nn.Module], micro_batches: int):  # type: ignore[no-untyped-def]
    """Compute the factors of all POET layers below `modules` once for `micro_batches` forward/backward passes (0: evaluation only).

    Skews must not change inside.
    """
    caches = [cache for module in modules for cache in factor_caches(module)]
    for cache in caches:
        cache.begin_step(micro_batches)
    try:
        yield
    finally:
        for cache in caches:
            cache.end_step()
