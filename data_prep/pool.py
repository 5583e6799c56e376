"""Worker processes that encode blocks in parallel and give results in order, with a bounded number of blocks under way."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType

from data_prep import worker
from data_prep.blocks import BLOCK_BYTES, Block
from data_prep.settings import Settings
from data_prep.worker import Encoded
from poet_megatron.errors import UserError

AHEAD = 2
"""Blocks under way for each worker: one that it encodes, one that waits."""
LARGE = 4 * BLOCK_BYTES
"""A block of this size is encoded while no other is under way, so that memory does not grow with the number of workers."""


class LostWorker(UserError):
    """A worker process ended in the middle of its work."""


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    connection: Connection

    def encode(self, block: Block) -> Encoded:
        try:
            self.connection.send(block)
            answer = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise LostWorker(
                f"worker process {self.process.pid} {_cause(self.process.exitcode)} while it encoded records {block.first} to "
                f"{block.first + block.count - 1}: nothing of this source is kept, finished parts are; run the same command again"
            ) from error
        if isinstance(answer, str):
            raise RuntimeError(f"encoding records {block.first} to {block.first + block.count - 1} failed in a worker process:\n{answer}")
        return answer


def _cause(status: int | None) -> str:
    if status == -signal.SIGKILL:
        return "was killed (SIGKILL, which is also how the kernel ends a process when memory runs out: use fewer --workers)"
    if status is not None and status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


class WorkerPool:
    """`count` worker processes; one thread of this process serves each."""

    def __init__(self, settings: Settings, count: int):
        if count < 1:
            raise UserError(f"--workers is {count}; it must be at least 1")
        context = multiprocessing.get_context("spawn")  # no fork: this process has threads
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._workers: list[_Worker] = []
        self.count = count
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=worker.main, args=(theirs, settings), daemon=True)
            process.start()
            theirs.close()
            self._workers.append(_Worker(process, ours))
            self._idle.put(self._workers[-1])
        self._threads = ThreadPoolExecutor(count, "encode")

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [item.process.pid or 0 for item in self._workers]

    def encode(self, blocks: Iterable[Block]) -> Iterator[Encoded]:
        """Results of the blocks, in their order."""
        pending: deque[Future[Encoded]] = deque()
        for block in blocks:
            large = block.size >= LARGE
            while pending and (large or len(pending) >= AHEAD * self.count or pending[0].done()):
                yield pending.popleft().result()
            pending.append(self._threads.submit(self._encode_one, block))
            if large:
                del block
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    def _encode_one(self, block: Block) -> Encoded:
        chosen = self._idle.get()
        try:
            return chosen.encode(block)
        finally:
            self._idle.put(chosen)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for item in self._workers:
            item.process.kill()  # they hold no state
        self._threads.shutdown(cancel_futures=True)
        for item in self._workers:
            item.process.join()
            item.connection.close()


def available_cpus() -> int:
    """Processors that this process may use; Slurm's limits included."""
    return len(os.sched_getaffinity(0))
