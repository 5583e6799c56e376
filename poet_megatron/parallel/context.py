"""Process groups of a run: torch.distributed (NCCL on GPUs, gloo on CPUs), megatron-core's groups, the RNG tracker."""

from __future__ import annotations

import functools
import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch.distributed.rendezvous import rendezvous

from poet_megatron.errors import UserError
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.cpu_shim import cuda_names_on_cpu

FLIGHT_RECORDER_ENTRIES = "2000"
"""Collectives that torch's flight recorder remembers of each rank, for guard.watchdog."""
_worlds = itertools.count()


@dataclass(frozen=True)
class ParallelContext:
    """Where this process stands.

    Attributes:
        rank: global rank.
        world_size: processes in all.
        data_rank: rank among data-parallel replicas.
        data_size: data-parallel replicas.
        device: this process's device.
        nodes: name of the machine of every rank; empty where nobody asked.
    """

    rank: int
    world_size: int
    data_rank: int
    data_size: int
    device: torch.device
    nodes: tuple[str, ...] = ()

    @property
    def is_main(self) -> bool:
        """Whether this process reports and writes files."""
        return self.rank == 0

    def name(self, rank: int) -> str:
        """A rank for messages: with its machine, where there are several."""
        return f"{rank} ({self.nodes[rank]})" if len(set(self.nodes)) > 1 else str(rank)


def node_name() -> str:
    """Name of this machine: Slurm's for the node if it started this process, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def launched_ranks() -> int:
    """Processes that torchrun (or whoever set the environment) started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def parallel_context(config: ParallelConfig, seed: int) -> Iterator[ParallelContext]:
    """Set up every process group of a run, and tear it down; a process may do so several times, with different layouts.

    Under torchrun the environment gives rank and world size; otherwise the run is a single process. An error inside closes this rank's
    connections without waiting for the others, whose collectives then fail instead of waiting for a rank that is gone.

    Args:
        config: parallel layout.
        seed: seeds torch and Megatron's RNG tracker.

    Raises:
        UserError: the world size is not a multiple of tensor x pipeline parallel sizes.
    """
    world_size, model_size = launched_ranks(), config.tensor_parallel * config.pipeline_parallel
    if world_size % model_size:
        raise UserError(
            f"{world_size} processes cannot be split into groups of tensor x pipeline parallel = {model_size}: launch a multiple of it"
        )
    if config.tensor_parallel > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # kernels start in the order of their launch, so that collectives overlap
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", FLIGHT_RECORDER_ENTRIES)  # older releases call it TORCH_NCCL_TRACE_BUFFER_SIZE
    device = _device()
    _init_distributed(device, timedelta(minutes=config.timeout_minutes))
    try:
        with cuda_names_on_cpu():
            parallel_state.initialize_model_parallel(
                config.tensor_parallel,
                config.pipeline_parallel,
                config.virtual_stages if config.virtual_stages > 1 else None,
                distributed_timeout_minutes=config.timeout_minutes,
            )
            seed_rng(seed)
            data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
            yield ParallelContext(dist.get_rank(), dist.get_world_size(), data_rank, data_size, device, _nodes())
            dist.barrier()  # nobody closes a connection that another rank still reads from
    except BaseException:
        _leave(device, failed=True)
        raise
    _leave(device, failed=False)


def seed_rng(seed: int) -> None:
    """Seed torch and Megatron's RNG tracker, inside a parallel context."""
    torch.manual_seed(seed)
    with cuda_names_on_cpu():
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def _nodes() -> tuple[str, ...]:
    """Machine of every rank. Collective."""
    names: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(names, node_name())
    return tuple(names)


def _init_distributed(device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    store = _launcher_store()
    store.set_timeout(timeout)
    store = dist.PrefixStore(f"poet_megatron/{next(_worlds)}", store)  # process groups of a later world are named like those of the first
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=launched_ranks(), timeout=timeout)


@functools.cache
def _launcher_store() -> dist.Store:
    """The key-value store through which the ranks of a launch find each other; it lives as long as the process."""
    return next(iter(rendezvous("env://")))[0]


def _leave(device: torch.device, failed: bool) -> None:
    """Close all process groups. NCCL's orderly way waits for collectives in flight, which other ranks may never join after a failure."""
    parallel_state.destroy_model_parallel()
    if failed and device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()
