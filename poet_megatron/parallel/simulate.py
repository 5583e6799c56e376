"""A world of any size inside one process: real process-group bookkeeping, no communication, and tensors that have shapes but no data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state, tensor_parallel
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import ParallelContext
from poet_megatron.parallel.cpu_shim import cuda_names_on_cpu

META = torch.device("meta")


class _NoData(TorchFunctionMode):
    """Sends device="cuda" to the meta device, and attention to a kernel that does not store the attention matrix (as GPUs and CPUs do)."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Intercept one torch call."""
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs = {**kwargs, "device": META}
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3], 0.0, kwargs["is_causal"])[0]
        return func(*args, **kwargs)


@contextmanager
def simulated_world(config: ParallelConfig, world_size: int, rank: int) -> Iterator[ParallelContext]:
    """Be rank `rank` of `world_size`: megatron-core's groups have their sizes and ranks, collectives do nothing.

    Inside, tensors are created on the meta device unless a device is named, CUDA is not used even where it exists, and torch's random state is
    a copy. Groups of 4,096 ranks take 0.3 s.

    Args:
        config: parallel layout; the world size is a multiple of tensor x pipeline parallel sizes (see parallel.layout).
        world_size: number of ranks to simulate.
        rank: the one to be.

    Raises:
        RuntimeError: torch.distributed is in use in this process.
    """
    if dist.is_initialized():
        raise RuntimeError("a world cannot be simulated in a process that is part of one")
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: False))
        stack.enter_context(cuda_names_on_cpu())
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: META))
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
        stack.enter_context(_NoData())
        stack.enter_context(META)
        data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        yield ParallelContext(rank, world_size, data_rank, data_size, META)
