"""Interleaved timing: every run of a case stands between two runs of the baseline, and is compared with those two only.

Drift of the clock, of the memory system or of other processes then hits both sides of a ratio; what is left shows in its range.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from poet_megatron.monitor.eta import format_duration

Run = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """Median and range of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Samples:
    """Measurements of one case.

    Attributes:
        seconds: of every run.
        ratios: every run divided by the mean of the two baseline runs around it.
    """

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def add(self, before: float, seconds: float, after: float) -> None:
        """Add a run that stood between two baseline runs."""
        self.seconds.append(seconds)
        self.ratios.append(2.0 * seconds / (before + after))


def stopwatch(function: Callable[[], object]) -> Run:
    """A run of `function` that returns its wall-clock seconds."""

    def run() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return run


def interleave(
    baseline: Run, cases: Mapping[str, Run], repeats: int, tick: Callable[[str], None] = lambda name: None
) -> tuple[Samples, dict[str, Samples]]:
    """Run baseline, case, baseline, case, ..., baseline: every case once per repeat, after one unmeasured run of each.

    Args:
        baseline: returns its seconds.
        cases: each returns its seconds.
        repeats: at least 1.
        tick: called with the name of every case after it ran, and after its unmeasured run.

    Returns:
        The baseline, compared with the baseline runs before and after (the noise of the ratios; no ratios where it ran only
        twice), and every case.
    """
    baseline()
    for name, case in cases.items():
        case()
        tick(name)
    samples: dict[str, Samples] = {name: Samples() for name in cases}
    runs = [baseline()]
    for _ in range(repeats):
        for name, case in cases.items():
            seconds = case()
            runs.append(baseline())
            samples[name].add(runs[-2], seconds, runs[-1])
            tick(name)
    own = Samples()
    own.seconds = runs
    own.ratios = [2.0 * run / (before + after) for before, run, after in zip(runs, runs[1:], runs[2:], strict=False)]
    return own, samples


class Progress:
    """A progress line with the time left: rewritten in place on a terminal, otherwise one line per tenth of the work."""

    def __init__(self, total: float, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
            total: work to do, in any unit that is proportional to time.
            stream: stderr by default.
            clock: monotonic seconds.
        """
        self.total, self.done = total, 0.0
        self._stream, self._clock, self._start, self._tenths = stream or sys.stderr, clock, clock(), 0

    def advance(self, work: float, what: str) -> None:
        """Add finished work and say what was finished."""
        self.done += work
        terminal = self._stream.isatty()
        tenths = int(10 * self.done / self.total + 1e-9)
        if not terminal and tenths == self._tenths:
            return
        self._tenths = tenths
        elapsed = self._clock() - self._start
        left = elapsed * max(self.total - self.done, 0.0) / self.done
        line = f"{100 * self.done / self.total:3.0f}%  elapsed {format_duration(elapsed)}  left {format_duration(left)}  {what}"
        self._stream.write(f"\r{line}\033[K" if terminal else f"{line}\n")
        self._stream.flush()

    def close(self) -> None:
        """End the line on a terminal."""
        if self._stream.isatty():
            self._stream.write("\n")
