"""How long a rank works by itself in a step, without waiting for others: which is the slow one, when all steps last equally long."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from poet_megatron.parallel.collectives import KINDS, group_of

POINT_TO_POINT = ("send", "recv_", "recv_any_source_")
COMPUTE = ("forward-compute", "backward-compute")
"""Megatron's names of what a pipeline stage does itself; messages between stages lie outside."""


class OwnTime(TorchDispatchMode):
    """Context manager around a step; also what Megatron's schedules call to time its parts: `timers(name, log_level).start()`, `.stop()`.

    While a forward or backward pass is timed, every collective is preceded by a barrier of its group, whose duration is not counted.
    Messages between pipeline stages are left alone (a barrier there could be waited for for ever). On a GPU every reading of the clock
    waits for the device, so that its queue counts as this rank's own time. Both make the step slower, and change no result.

    Attributes:
        seconds: in forward and backward passes, without waiting for others at collectives.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0
        self.timing = False

    def __call__(self, name: str, log_level: int | None = None) -> _Timer:
        """The timer of a part of the step."""
        return _Timer(self, counts=name in COMPUTE)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Wait before one operator if it is a collective inside a timed part, and run it."""
        name = func.overloadpacket.__name__
        if self.timing and func.namespace == "c10d" and name in KINDS and name not in POINT_TO_POINT:
            group = group_of(args)
            if group.size() > 1:
                self.seconds += device_clock()
                dist.barrier(group=group)
                self.seconds -= device_clock()
        return func(*args, **(kwargs or {}))


class _Timer:
    """Start and stop of one part of the step, by Megatron's names; does nothing for parts that do not count."""

    def __init__(self, owner: OwnTime, counts: bool) -> None:
        self._owner, self._counts = owner, counts

    def start(self, barrier: bool = False) -> None:
        if self._counts:
            self._owner.timing = True
            self._owner.seconds -= device_clock()

    def stop(self, barrier: bool = False) -> None:
        if self._counts:
            self._owner.seconds += device_clock()
            self._owner.timing = False


def device_clock() -> float:
    """Seconds on a clock, read when this rank's device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
