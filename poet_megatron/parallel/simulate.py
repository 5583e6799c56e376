"""A world of any size inside one process: real process-group bookkeeping, no communication, and tensors that have shapes but no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import ParallelContext
from poet_megatron.parallel.cpu_shim import cuda_names_on_cpu

META = torch.device("meta")


class _FusedRMSNorm(torch.autograd.Function):
    """Keeps for backward what the fused kernel of GPUs keeps: the input and one number per row."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, **_: Any) -> Tensor:
    """Keeps for backward what attention kernels of real devices keep: no attention matrix."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal)[0]


def _fused_rms_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor, eps: float | None = None) -> Tensor:
    return _FusedRMSNorm.apply(x, weight)


class _KeepNumbers(TorchFunctionMode):
    """Tensors made from Python numbers keep their values: they are made on the CPU unless a device is named."""

    def __init__(self, from_numbers: Callable) -> None:
        super().__init__()
        self._from_numbers = from_numbers

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Intercept one torch call."""
        kwargs = kwargs or {}
        if func is self._from_numbers and kwargs.get("device") is None:
            kwargs = {**kwargs, "device": "cpu"}
        return func(*args, **kwargs)


class _NoMessages(TorchDispatchMode):
    """Completes the collectives for which torch's fake process group has no kernel on the meta device: those on several tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Intercept one operator."""
        if func.namespace == "c10d" and "coalesced" in func.overloadpacket.__name__:
            return FakeWork().boxed()
        return func(*args, **(kwargs or {}))


@contextmanager
def simulated_world(config: ParallelConfig, world_size: int, rank: int, fused_norms: bool = True) -> Iterator[ParallelContext]:
    """Be rank `rank` of `world_size`: megatron-core's groups have their sizes and ranks, collectives do nothing.

    Inside, tensors are created on the meta device unless a device is named, CUDA is not used even where it exists, and torch's random
    state is a copy. The groups of 4,096 ranks take 0.3 s.

    Args:
        config: parallel layout; the world size is a multiple of tensor x pipeline parallel sizes (see parallel.layout).
        world_size: number of ranks to simulate.
        rank: the one to be.
        fused_norms: whether RMSNorm is a single kernel, as on GPUs, or several, as on CPUs; matters for what it keeps for backward.

    Raises:
        RuntimeError: torch.distributed is in use in this process.
    """
    if dist.is_initialized():
        raise RuntimeError("a world cannot be simulated in a process that is part of one")
    from_numbers = torch.tensor
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
        stack.enter_context(cuda_names_on_cpu())
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: META))
        # On the meta device torch would compute both step by step, and keep every intermediate result for backward. Patched, not a mode:
        # modes are off in backward passes, where layers may be recomputed.
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _flash_attention))
        if fused_norms:
            stack.enter_context(mock.patch.object(F, "rms_norm", _fused_rms_norm))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        parallel_state.initialize_model_parallel(
            config.tensor_parallel,
            config.pipeline_parallel,
            config.virtual_stages if config.virtual_stages > 1 else None,
            create_gloo_process_groups=False,
        )
        stack.callback(parallel_state.destroy_model_parallel)
        tensor_parallel.model_parallel_cuda_manual_seed(0)
        for mode in (_NoMessages(), META, _KeepNumbers(from_numbers)):
            stack.enter_context(mode)
        data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        yield ParallelContext(rank, world_size, data_rank, data_size, META)
