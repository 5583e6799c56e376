"""The torch profiler around chosen steps of a run: a trace of each chosen rank, a table of operators, and where memory goes.

The training loop calls `step_begin` and `step_end`; outside the chosen steps both return at once. Parts of a step that are inside a
`torch.profiler.record_function` have their names in the trace and in the table.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from poet_megatron.profiling.config import ALL_RANKS, ProfileConfig
from poet_megatron.profiling.table import operator_table

FOLDER = "profile"
MOST_ALLOCATIONS = 200_000
"""Allocations that a memory snapshot holds; the oldest are dropped. Several kB each."""
logger = logging.getLogger(__name__)


class StepProfiler:
    """Profiles the steps that the settings name, on the ranks that they name.

    Use it in a `with` block: what is under way at its end is written if the block ends well and dropped otherwise, but for the memory
    snapshot of a GPU that ran out of memory.

    Attributes:
        steps: the steps still to be profiled by this start of the run; empty on ranks that are not.
    """

    def __init__(
        self, settings: ProfileConfig, run_dir: Path, rank: int, world_size: int, device: torch.device, note: Callable[[str], None]
    ) -> None:
        """No files and no profiler yet.

        Args:
            settings: what to profile.
            run_dir: the run directory.
            rank: of this process.
            world_size: number of ranks.
            device: of this process.
            note: prints a line of its own, on rank 0 only.

        Raises:
            ValueError: the settings name a rank that does not exist.
        """
        settings.check_ranks(world_size)
        self.steps = settings.step_range if settings.profiles(rank) else range(0)
        self._settings, self._rank, self._device, self._note = settings, rank, device, note
        self._snapshots = settings.memory and device.type == "cuda"
        self._folder = run_dir / FOLDER
        self._profile: profile | None = None
        self._first: int | None = None
        self._recorded = 0

    @classmethod
    def off(cls) -> StepProfiler:
        """One that profiles nothing."""
        return cls(ProfileConfig(), Path(), 0, 1, torch.device("cpu"), lambda text: None)

    def announce(self, step: int) -> None:
        """Say what will be profiled by a start of the run that has `step` steps behind it."""
        wanted = self._settings.step_range
        if not wanted:
            return
        if step + 1 >= wanted.stop:
            self._note(f"profile.steps {self._settings.steps} is over: the run continues from step {step}")
            return
        ranks = "all ranks" if self._settings.ranks == ALL_RANKS else f"rank {self._settings.ranks}"
        self._note(f"the profiler will trace steps {max(wanted.start, step + 1)} to {wanted.stop - 1} of {ranks} into {self._folder}")

    def step_begin(self, step: int) -> None:
        """Before anything of step `step`, counted from 1."""
        if step in self.steps:
            if self._first is None:
                self._start(step)
        elif step + 1 in self.steps and self._profile is None:
            self._prepare()  # so that setting up the profiler is not part of the first step it records

    def step_end(self, step: int) -> None:
        """After everything that belongs to step `step`."""
        if self._first is None:
            return
        self._recorded = step
        if step + 1 not in self.steps:
            self._finish()

    def __enter__(self) -> StepProfiler:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._first is not None and kind is None and self._recorded:
            self._finish()
        elif self._profile is not None:
            if self._snapshots and kind is not None and issubclass(kind, torch.OutOfMemoryError):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._write_snapshot()
            with suppress(RuntimeError):  # the error that ends the block is the one to report
                if self._first is None:
                    self._profile.start_trace()  # one that is set up has to run before it can be stopped
                self._profile.stop_trace()
            self._forget()

    def _prepare(self) -> None:
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        bytes_in_trace = self._settings.memory and not self._snapshots
        self._profile = profile(activities=activities, record_shapes=self._settings.shapes, profile_memory=bytes_in_trace, acc_events=True)
        self._profile.prepare_trace()

    def _start(self, step: int) -> None:
        if self._profile is None:
            self._prepare()
        assert self._profile is not None
        if self._snapshots:
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MOST_ALLOCATIONS)
        self._first = step
        self._profile.start_trace()

    def _forget(self) -> None:
        if self._snapshots and self._first is not None:
            torch.cuda.memory._record_memory_history(enabled=None)
        self._profile, self._first, self.steps = None, None, range(0)

    def _finish(self) -> None:
        """Write the trace and print the table. A disk that is full is no reason to end a run."""
        assert self._profile is not None
        self._profile.stop_trace()
        try:
            self._write(self._profile)
        except (OSError, RuntimeError) as error:
            logger.warning("rank %d: the profile could not be written into %s: %s", self._rank, self._folder, error)
        self._forget()

    def _write(self, recorded: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"step-{self._first}-rank-{self._rank}.json.gz"
        partial = trace.with_name(f"partial-{trace.name}")
        recorded.export_chrome_trace(str(partial))
        partial.replace(trace)
        steps = f"step {self._first}" if self._first == self._recorded else f"steps {self._first} to {self._recorded}"
        self._note(f"profile of {steps}: {trace} (open it at ui.perfetto.dev, or chrome://tracing)")
        if self._snapshots:
            self._write_snapshot()
        count = self._recorded - (self._first or 0) + 1
        self._note(operator_table(recorded.key_averages(), count, on_gpu=self._device.type == "cuda"))

    def _write_snapshot(self) -> None:
        snapshot = self._folder / f"step-{self._first}-rank-{self._rank}-memory.pickle"
        torch.cuda.memory._dump_snapshot(str(snapshot))
        self._note(f"memory snapshot: {snapshot} (open it at pytorch.org/memory_viz)")
