"""Settings of the profiler."""

from __future__ import annotations

import re
from dataclasses import dataclass

ALL_RANKS = "all"
_STEPS = re.compile(r"([0-9]+):([0-9]+)")
_RANKS = re.compile(r"[0-9]+(,[0-9]+)*")


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """A trace of a few steps by the torch profiler, written to profile/ in the run directory (docs/profiling.md)."""

    steps: str = ""
    """Steps to profile, first:end with the end left out, as in Python: 10:15 is steps 10 to 14. Empty profiles none, at no cost."""
    ranks: str = "0"
    """Ranks to profile: one, several with commas between (0,8), or all."""
    memory: bool = False
    """Where memory goes: on GPUs a snapshot with the stack of every allocation, on CPUs bytes in the trace and in the table."""
    shapes: bool = False
    """Shapes of the operators' inputs in the trace; it gets larger and the steps slower."""

    def __post_init__(self) -> None:
        if self.steps:
            self._check_steps()
        if self.ranks != ALL_RANKS and not _RANKS.fullmatch(self.ranks):
            raise ValueError(f"profile.ranks is {self.ranks!r}; expected one rank, several with commas between (0,8), or {ALL_RANKS}")

    @property
    def step_range(self) -> range:
        """The steps to profile."""
        first, end = map(int, self.steps.split(":")) if self.steps else (0, 0)
        return range(first, end)

    def check_length(self, total: int) -> None:
        """Raise ValueError for steps beyond the last one."""
        if self.step_range.stop > total + 1:
            raise ValueError(
                f"profile.steps is {self.steps!r}, so it ends with step {self.step_range.stop - 1}; train.steps is {total}: "
                f"name steps up to {total}, such as {max(1, total - 4)}:{total + 1}"
            )

    def check_ranks(self, world_size: int) -> None:
        """Raise ValueError for a rank that a run of this size does not have."""
        missing = [rank for rank in self._named_ranks() if rank >= world_size]
        if missing:
            raise ValueError(
                f"profile.ranks is {self.ranks!r}; this run has {world_size} rank(s), 0 to {world_size - 1}: leave out {missing[0]}"
            )

    def profiles(self, rank: int) -> bool:
        """Whether this rank is to be profiled."""
        return bool(self.steps) and (self.ranks == ALL_RANKS or rank in self._named_ranks())

    def _named_ranks(self) -> list[int]:
        return [] if self.ranks == ALL_RANKS else [int(rank) for rank in self.ranks.split(",")]

    def _check_steps(self) -> None:
        example = "give first:end with the end left out, such as 10:15 for steps 10 to 14, or leave it empty"
        match = _STEPS.fullmatch(self.steps)
        if match is None:
            raise ValueError(f"profile.steps is {self.steps!r}; {example}")
        first, end = map(int, match.groups())
        if first < 1:
            raise ValueError(f"profile.steps is {self.steps!r}; steps are counted from 1: {example}")
        if end <= first:
            raise ValueError(
                f"profile.steps is {self.steps!r}, which is no step; the end is left out, so {first}:{first + 1} is step {first}"
            )
