"""Lets megatron-core run on CPU over gloo: it names CUDA in places that have a CPU meaning. Inactive where CUDA exists.

Entered explicitly by parallel.context; everything it changes is put back on exit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import megatron.core.tensor_parallel.random as mcore_random
import torch
from torch.overrides import TorchFunctionMode

_CUDA, _TYPE = torch.Tensor.cuda, torch.Tensor.type


class CudaNamesOnCpu(TorchFunctionMode):
    """Sends device="cuda" to the CPU, and lets CPU tensors answer `.type()` with the CUDA name that megatron-core compares with."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Intercept one torch call. It runs for every call, so the usual case comes first."""
        if kwargs:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs = {**kwargs, "device": "cpu"}
            return func(*args, **kwargs)
        if func is _CUDA:
            return args[0]
        if func is _TYPE and len(args) == 1:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args)


@contextmanager
def cuda_names_on_cpu() -> Iterator[None]:
    """While active, megatron-core's CUDA-only calls act on the CPU; does nothing where CUDA is available."""
    if torch.cuda.is_available():
        yield
        return

    def get_state(*_: Any, **__: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_: Any, **__: Any) -> None:
        torch.set_rng_state(state)

    replacements: list[tuple[Any, str, Any]] = [
        (torch.cuda, "current_device", lambda: torch.device("cpu")),
        (torch.cuda, "synchronize", lambda *_, **__: None),
        (torch.cuda, "manual_seed", torch.manual_seed),
        (torch.cuda, "get_rng_state", get_state),
        (torch.cuda, "set_rng_state", set_state),
        (mcore_random, "_get_cuda_rng_state", get_state),
        (mcore_random, "_set_cuda_rng_state", set_state),
        (mcore_random, "_lazy_call", lambda call: call()),
    ]
    patches = [mock.patch.object(owner, name, value) for owner, name, value in replacements]
    for patch in patches:
        patch.start()
    try:
        with CudaNamesOnCpu():
            yield
    finally:
        for patch in patches:
            patch.stop()
