"""Lets megatron-core run on CPU over gloo: it names CUDA in places that have a CPU meaning. Inactive where CUDA exists.

Entered explicitly by parallel.context; everything it changes is put back on exit. Single functions are replaced, not every torch call
intercepted: a TorchFunctionMode cost a third of the time of a small model's step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import megatron.core.optimizer.clip_grads as clip_grads
import megatron.core.optimizer.optimizer as mcore_optimizer
import megatron.core.tensor_parallel.random as mcore_random
import megatron.core.utils as mcore_utils
import torch
from torch import Tensor

FACTORIES = ("arange", "empty", "empty_like", "full", "ones", "tensor", "zeros")
"""Functions of torch that megatron-core calls with device="cuda"."""


@contextmanager
def cuda_names_on_cpu() -> Iterator[None]:
    """While active, megatron-core's CUDA-only calls act on the CPU; does nothing where CUDA is available.

    device="cuda" means torch.cuda.current_device(), which is the CPU unless replaced in turn; `Tensor.type()` answers with the CUDA name
    that megatron-core compares with.
    """
    if torch.cuda.is_available():
        yield
        return
    with torch.device("cpu"):
        torch.empty(0)  # torch lists the functions that such a context applies to at its first use: these, not their replacements
    with ExitStack() as stack:
        for owner, name, value in _replacements():
            stack.enter_context(mock.patch.object(owner, name, value))
        yield


def _replacements() -> list[tuple[Any, str, Any]]:
    """(owner, name, value) of everything that is replaced."""
    tensor_type = Tensor.type

    def get_state(*_: Any, **__: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    def type_name(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(self, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.") if isinstance(answer, str) else answer

    return [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_state),
        (torch.cuda, "set_rng_state", set_state),
        (mcore_random, "_get_cuda_rng_state", get_state),
        (mcore_random, "_set_cuda_rng_state", set_state),
        (mcore_random, "_lazy_call", lambda call: call()),
        (Tensor, "cuda", lambda self, *_, **__: self),
        (Tensor, "type", type_name),
        *_loops_for_multi_tensor_kernels(),
        *((torch, name, _on_current_device(getattr(torch, name))) for name in FACTORIES),
    ]


def _loops_for_multi_tensor_kernels() -> list[tuple[Any, str, Any]]:
    """Megatron's loops over tensors in place of the CUDA kernels of Apex or TransformerEngine, which may be installed without a GPU."""
    users = (clip_grads, mcore_optimizer)
    applier = [(user, "multi_tensor_applier", mcore_utils.local_multi_tensor_applier) for user in users]
    scale = [(user, "multi_tensor_scale_impl", mcore_utils.local_multi_tensor_scale) for user in users]
    return [*applier, *scale, (clip_grads, "l2_norm_impl", mcore_utils.local_multi_tensor_l2_norm)]


def _on_current_device(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`factory` with device="cuda" replaced."""

    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = torch.cuda.current_device()
        return factory(*args, **kwargs)

    return create
