"""Asking a run to stop: signals and a time limit set a flag, ranks agree on it at the end of a step, the loop saves and leaves."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
OUT_OF_TIME = 1000
"""Beside the numbers of signals: train.exit_minutes are over."""


class StopFlag:
    """Whether this process was asked to stop: by a signal, or because `seconds` have passed since the flag was made."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.signal_number = 0
        self._deadline = time.monotonic() + seconds

    def agreed(self, device: torch.device) -> int:
        """Number of a signal that any rank received, or OUT_OF_TIME, or 0; a collective, the same on every rank."""
        late = time.monotonic() > self._deadline
        flag = torch.tensor([self.signal_number or (OUT_OF_TIME if late else 0)], device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return int(flag.item())


def reason_of(stopped: int) -> str:
    """What `StopFlag.agreed` returned, in words."""
    return "train.exit_minutes" if stopped == OUT_OF_TIME else signal.Signals(stopped).name


@contextmanager
def stop_on_signals(seconds: float = math.inf) -> Iterator[StopFlag]:
    """Catch SIGINT, SIGTERM and SIGUSR1: the first one sets the flag, a second SIGINT interrupts at once.

    Args:
        seconds: after which the flag is set as well.
    """
    flag = StopFlag(seconds)

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
