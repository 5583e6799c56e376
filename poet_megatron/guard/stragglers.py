"""Which rank is slow: in some steps every rank measures its own time, and the slowest is compared with the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from poet_megatron.engine.base import Engine
from poet_megatron.guard.config import GuardConfig
from poet_megatron.parallel.own_time import OwnTime, device_clock

T = TypeVar("T")
R = TypeVar("R")
PARTS = ("loading data", "forward and backward")


@dataclass(frozen=True)
class OwnTimes:
    """A measured step; the same on every rank.

    Attributes:
        step: its number.
        by_rank: own seconds of every rank by part, (loading data, forward and backward).
        stages: pipeline stage of every rank. Stages have different work, so ranks are compared within one, where it has several.
    """

    step: int
    by_rank: tuple[tuple[float, float], ...]
    stages: tuple[int, ...]

    @property
    def totals(self) -> list[float]:
        """Seconds of every rank."""
        return [sum(parts) for parts in self.by_rank]

    def peers(self, rank: int) -> list[int]:
        """The ranks that a rank is compared with."""
        others = [number for number in range(len(self.stages)) if number != rank]
        return [number for number in others if self.stages[number] == self.stages[rank]] or others

    def peers_median(self, rank: int) -> float:
        """Median of their seconds."""
        return median(self.totals[number] for number in self.peers(rank))

    def ratio(self, rank: int) -> float:
        """A rank's seconds over that median."""
        return self.totals[rank] / max(self.peers_median(rank), 1e-9)

    @property
    def slowest(self) -> int:
        """The rank that takes longest beside its peers."""
        return max(range(len(self.totals)), key=self.ratio)


class StragglerMeter:
    """Measures every guard.straggler_interval-th step, and names a rank that was too slow in two measurements in a row."""

    def __init__(self, engine: Engine, config: GuardConfig) -> None:
        self.engine, self.config = engine, config
        self.last: OwnTimes | None = None
        self._suspect: int | None = None

    def due(self, step: int) -> bool:
        """Whether `step` is measured: never in a world of one, nor the first step of a run, which warms up."""
        interval = self.config.straggler_interval
        return interval > 0 and step > 1 and step % interval == 0 and self.engine.context.world_size > 1

    def measure(self, step: int, load: Callable[[], T], work: Callable[[T], R]) -> R:
        """Do the two parts of a step that ranks do by themselves, and measure them. Collective.

        Args:
            step: its number.
            load: gives this rank's micro-batches.
            work: forward and backward passes over them.

        Returns:
            What `work` returns; `last` is what was measured.
        """
        started, own, config = device_clock(), OwnTime(), self.engine.config
        loaded = load()
        loading = device_clock() - started
        config.timers = own
        try:
            with own:
                result = work(loaded)
        finally:
            config.timers = None
        self.last = self._gathered(step, loading, own.seconds)
        return result

    def report(self) -> str:
        """A line on the straggler of the last measurement, or nothing."""
        found = self.last
        if found is None or found.ratio(found.slowest) < self.config.straggler_ratio:
            self._suspect = None
            return ""
        again, self._suspect = self._suspect == found.slowest, found.slowest
        return describe(found, self.engine.context.nodes) if again else ""

    def _gathered(self, step: int, loading: float, seconds: float) -> OwnTimes:
        context = self.engine.context
        stage = parallel_state.get_pipeline_model_parallel_rank()
        mine = torch.tensor([loading, seconds, stage], dtype=torch.float64, device=context.device)
        gathered = [torch.empty_like(mine) for _ in range(context.world_size)]
        dist.all_gather(gathered, mine)
        rows = torch.stack(gathered).tolist()
        return OwnTimes(step, tuple((row[0], row[1]) for row in rows), tuple(int(row[2]) for row in rows))


def describe(found: OwnTimes, nodes: Sequence[str]) -> str:
    """The line that names the slowest rank, its machine, and in which part of the step it loses time."""
    rank = found.slowest
    peers = [found.by_rank[number] for number in found.peers(rank)]
    excess = [mine - median(parts[i] for parts in peers) for i, mine in enumerate(found.by_rank[rank])]
    part = PARTS[excess.index(max(excess))]
    node = f" ({nodes[rank]})" if nodes else ""
    return (
        f"straggler: rank {rank}{node} took {found.totals[rank]:.3f} s of its own in step {found.step}, {found.ratio(rank):.2f} times the "
        f"median of its peers ({found.peers_median(rank):.3f} s), mostly in {part}; every step waits for it"
    )
