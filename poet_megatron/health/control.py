"""All ranks in lock-step through the launcher's key-value store: no collective is needed to learn that a rank is gone or stuck."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

GRACE_SECONDS = 3.0
"""How much longer than the time limit of a step rank 0 waits for answers, and the others for rank 0."""
GOODBYE_SECONDS = 5.0
LONGEST_PAUSE = 0.05


class Silent(Exception):
    """Ranks gave no answer: their processes are gone or stopped. Raised on every rank that is left."""

    def __init__(self, step: str, ranks: Sequence[int]) -> None:
        super().__init__(f"{step}: no answer from {list(ranks)}")
        self.step = step
        self.ranks = tuple(ranks)


@dataclass(frozen=True)
class Outcome:
    """What one rank's part of a step came to.

    Attributes:
        value: plain data.
        error: why there is no value; "" if there is one.
        stuck: the work did not end in time; its thread is still there.
    """

    value: Any = None
    error: str = ""
    stuck: bool = False


@dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        own: this rank's value, None after an error.
        failed: some rank had an error; known to every rank.
        outcomes: by rank; on rank 0 only.
    """

    own: Any
    failed: bool
    outcomes: list[Outcome] = field(default_factory=list)


class Control:
    """Steps that every rank takes at the same time, each bounded by `timeout` seconds.

    Attributes:
        store: the key-value store; asked, never waited on, so that no thread blocks another.
        rank: of this process.
        size: processes in all.
        timeout: seconds that a step may take.
        stuck: some work of this process never ended.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.store = store
        self.rank = rank
        self.size = size
        self.timeout = timeout
        self.stuck = False

    def step(self, name: str, work: Callable[[], Any]) -> Step:
        """Run `work` on every rank, and go on when all have answered.

        Args:
            name: of the step, different from all others.
            work: returns plain data; an exception becomes the outcome's error.

        Raises:
            Silent: a rank gave no answer in time.
        """
        deadline = time.monotonic() + self.timeout + GRACE_SECONDS
        outcome = bounded(work, self.timeout)
        self.stuck |= outcome.stuck
        try:
            self.store.set(f"{name}/{self.rank}", json.dumps(asdict(outcome)))
            return self._follow(name, outcome) if self.rank else self._lead(name, outcome, deadline)
        except RuntimeError as error:  # the store is gone, and with it rank 0
            raise Silent(name, [0]) from error

    def told(self, name: str, value: str = "") -> str:
        """Rank 0's `value`, on every rank.

        Raises:
            Silent: rank 0 did not tell it in time.
        """
        if self.rank == 0:
            self.store.set(f"told/{name}", value)
        elif missing(self.store, [f"told/{name}"], time.monotonic() + self.timeout + 2 * GRACE_SECONDS):
            raise Silent(name, [0])
        return str(self.store.get(f"told/{name}").decode())

    def _lead(self, name: str, own: Outcome, deadline: float) -> Step:
        keys = [f"{name}/{rank}" for rank in range(self.size)]
        silent = missing(self.store, keys, deadline)
        outcomes = [Outcome() if rank in silent else Outcome(**json.loads(self.store.get(key))) for rank, key in enumerate(keys)]
        failed = any(outcome.error for outcome in outcomes)
        self.store.set(f"{name}/done", json.dumps({"failed": failed, "silent": silent}))
        if silent:
            raise Silent(name, silent)
        return Step(own.value, failed, outcomes)

    def _follow(self, name: str, own: Outcome) -> Step:
        if missing(self.store, [f"{name}/done"], time.monotonic() + self.timeout + 2 * GRACE_SECONDS):
            raise Silent(name, [0])
        done = json.loads(self.store.get(f"{name}/done"))
        if done["silent"]:
            raise Silent(name, done["silent"])
        return Step(own.value, done["failed"])


def missing(store: dist.Store, keys: Sequence[str], deadline: float) -> list[int]:
    """Wait until `store` has all keys, at most until `deadline` (time.monotonic); the positions of those that it then lacks."""
    pause = 0.001
    while not store.check(list(keys)):
        if time.monotonic() > deadline:
            return [position for position, key in enumerate(keys) if not store.check([key])]
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    return []


def part(store: dist.Store, rank: int, ranks: Sequence[int]) -> None:
    """The last thing that `ranks` do with `store`: rank 0, which may serve it, waits a little until the others have read what they need."""
    if rank == 0:
        missing(store, [f"bye/{other}" for other in ranks if other], time.monotonic() + GOODBYE_SECONDS)
        return
    with contextlib.suppress(RuntimeError):  # rank 0 has gone
        store.set(f"bye/{rank}", "")


def bounded(work: Callable[[], Any], seconds: float) -> Outcome:
    """Run `work` in a thread of its own for at most `seconds`. What hangs in a driver, a network or a file system is left behind."""
    found: list[Outcome] = []

    def target() -> None:
        try:
            found.append(Outcome(work()))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            found.append(Outcome(error=f"{type(error).__name__}: {lines[0]}"))

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Outcome(error=f"did not finish within {seconds:.0f} s", stuck=True)
