"""Asking a run to stop: signals set a flag, ranks agree on it at the end of a step, the loop saves and leaves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopFlag:
    """Whether this process was asked to stop."""

    def __init__(self) -> None:
        self.signal_number = 0

    def agreed(self, device: torch.device) -> int:
        """Signal number that any rank received, or 0; a collective, the same on every rank."""
        flag = torch.tensor([self.signal_number], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Catch SIGINT, SIGTERM and SIGUSR1: the first one sets the flag, a second SIGINT interrupts at once."""
    flag = StopFlag()

    def handle(number: int, frame: FrameType | None) -> None:
        if flag.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        flag.signal_number = number

    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
