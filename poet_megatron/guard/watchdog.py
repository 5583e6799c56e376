"""A thread that ends a run which stands still, and leaves behind what is needed to find out why."""

from __future__ import annotations

import faulthandler
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from poet_megatron.errors import EXIT_HANG
from poet_megatron.guard.hang import RankReport, all_stacks, blame, collectives_issued, main_frame, place_of, place_of_error

GRACE_SECONDS = 60.0
"""How long ranks wait for each other's reports; directories of network file systems are cached for some seconds."""
LOOK_SECONDS = 5.0
"""Between looks for a report of another rank."""
POLL_SECONDS = 0.1
VERDICT = "verdict.txt"
STDERR = 2


class Watchdog:
    """Ends the process with status EXIT_HANG if `beat` is not called for `seconds`; used as a context manager around training.

    First every rank writes `rank-N.json` (where it stands) and `rank-N.stacks.txt` into `folder`, which is on a file system that all ranks
    share, and torch's flight recorder as `nccl_trace_rank_N`; then the lowest rank that is able to says in `verdict.txt`, and on stderr,
    which rank is to blame. A rank that is stuck without giving up Python's lock cannot do that; it is ended by a timer in C that needs no
    lock, with its stacks on stderr. A rank that sees a report of another one reports too: it may have made progress for a while longer, as
    evaluations on different data do.
    """

    def __init__(self, seconds: float, folder: Path, rank: int = 0, world_size: int = 1, node: str = "") -> None:
        self.seconds, self.folder, self.rank, self.world_size, self.node = seconds, folder, rank, world_size, node
        self._phase = "start"
        self._since = time.monotonic()
        self._stopped = threading.Event()
        self._fired = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, phase: str) -> None:
        """Say that this rank makes progress, and what it does next."""
        self._phase, self._since = phase, time.monotonic()

    def __enter__(self) -> Watchdog:
        """Start watching; with an infinite limit there is nothing to watch for."""
        self.beat(self._phase)
        if math.isfinite(self.seconds):
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop watching. While a hang is being reported (others may have ended, and cut this rank's connections) wait for its end."""
        if error is not None and self._thread.is_alive() and self.folder.exists():
            traceback.print_exception(error)  # the process ends before anyone else could
            self._error = error
        if self._fired.is_set() or self._error is not None:
            self._thread.join()
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        tick = min(1.0, self.seconds / 10)
        ticks_between_looks = max(1, round(LOOK_SECONDS / tick))
        before, ticks = time.monotonic(), 0
        while not self._stopped.wait(tick):
            faulthandler.dump_traceback_later(2 * self.seconds + GRACE_SECONDS, exit=True, file=STDERR)
            now = time.monotonic()
            if now - before > 5 * tick + 1:  # this process was suspended, as by `scontrol suspend`
                self._since += now - before
            before, ticks = now, ticks + 1
            others = ticks % ticks_between_looks == 0 and self.folder.exists()
            if others or self._error is not None or now - self._since > self.seconds:
                self._fired.set()
                self._end()
                break

    def _end(self) -> None:
        """Report, whatever that is worth, and end the process."""
        try:
            self._report()
        except BaseException:
            text = f"error: hang in {self._phase}, and it cannot be reported in {self.folder}:\n{traceback.format_exc()}\n{all_stacks()}"
            print(text, file=sys.stderr, flush=True)
        finally:
            os._exit(EXIT_HANG)

    def _report(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        place, waiting = place_of(main_frame()) if self._error is None else place_of_error(self._error)
        seconds = time.monotonic() - self._since
        report = RankReport(self.rank, self.node, os.getpid(), self._phase, seconds, waiting, place, collectives_issued())
        (self.folder / f"rank-{self.rank}.stacks.txt").write_text(all_stacks(), encoding="utf-8")
        _write_whole(self.folder / f"rank-{self.rank}.json", json.dumps(asdict(report), indent=1))
        with suppress(RuntimeError, OSError):  # it asks the driver, which may be what is stuck
            if (recorded := flight_recorder()) is not None:
                (self.folder / f"nccl_trace_rank_{self.rank}").write_bytes(recorded)
        reports = self._reports()
        if min(report.rank for report in reports) == self.rank:
            text = f"hang: {blame(reports, self.world_size)}; stacks of every rank are in {self.folder}"
            _write_whole(self.folder / VERDICT, text + "\n")
            print(f"error: {text}", file=sys.stderr, flush=True)
            time.sleep(2 * POLL_SECONDS)  # others see it before this process, and what depends on it, is gone
        else:
            _wait(lambda: (self.folder / VERDICT).exists(), GRACE_SECONDS)

    def _reports(self) -> list[RankReport]:
        """Reports of all ranks, or of those that have answered in time."""
        _wait(lambda: len(list(self.folder.glob("rank-*.json"))) == self.world_size, GRACE_SECONDS)
        return [RankReport(**json.loads(path.read_text(encoding="utf-8"))) for path in self.folder.glob("rank-*.json")]


def flight_recorder() -> bytes | None:
    """The last collectives of this rank as torch recorded them (a pickle; `torchfrtrace` reads NCCL's), or None without a recorder."""
    bindings: Any = torch._C._distributed_c10d
    for name in ("_dump_nccl_trace", "_dump_fr_trace"):  # of NCCL's groups, where there is NCCL; of gloo's
        if (dump := getattr(bindings, name, None)) is not None:
            return bytes(dump())
    return None


def _wait(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
