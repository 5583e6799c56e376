"""Worlds of a few ranks on this machine, forked: torch and megatron-core are imported once, not once per rank."""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

GRACE_SECONDS = 20.0


class WorldFailed(RuntimeError):
    """A rank ended with another status than 0."""


def run_world(ranks: int, work: Callable[[], object], timeout: float) -> None:
    """Run `work` on every rank of a world of `ranks` processes, which it sets up itself (see parallel.context).

    Raises:
        WorldFailed: a rank failed, or `timeout` seconds went by; the others are stopped.
    """
    statuses = exit_statuses(ranks, work, timeout)
    if any(statuses):
        raise WorldFailed(f"exit statuses of {ranks} ranks: {statuses} (negative: ended by that signal)")


def exit_statuses(ranks: int, work: Callable[[], object], timeout: float) -> list[int]:
    """Run `work` on every rank and return their exit statuses.

    After the first failure the others have GRACE_SECONDS to end by themselves; then, or after `timeout` seconds, they are killed (-9).
    """
    port = _free_port()
    fork = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = [fork.Process(target=_rank, args=(rank, ranks, port, work)) for rank in range(ranks)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    running = list(processes)
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
    for process in running:
        process.kill()
    for process in processes:
        process.join()
    return [process.exitcode or 0 for process in processes]


def _rank(rank: int, ranks: int, port: int, work: Callable[[], object]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    work()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
