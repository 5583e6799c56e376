"""The folder that runs write to, as all nodes see it: shared, fast enough, durable, locked, with room."""

from __future__ import annotations

import os
import secrets
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from poet_megatron.health import probes
from poet_megatron.health.control import Control, Outcome, Step
from poet_megatron.health.outcomes import errors
from poet_megatron.health.report import FAIL, OK, SKIPPED, WARN, Finding, Report
from poet_megatron.health.roster import Roster, and_join

FOLDER, VISIBLE, SPEED, LOCK, SPACE = "folder", "visibility", "file speed", "file lock", "free space"
SIZE = 64 * probes.MIB
SEEN_SECONDS = 20.0
LATE_SECONDS = 5.0
SLOW_LATENCY = 0.25
SLOW_RATE = 50e6
SLOW_OF_MEDIAN = 0.5
LEAST_FREE, LITTLE_FREE = 2**30, 50 * 2**30
GIB = 2**30


class SharedFolder:
    """The steps of this check. Ranks that do not lead a node only keep step.

    Attributes:
        folder: the folder as given.
        own: the subfolder that rank 0 makes in it and removes at the end.
    """

    def __init__(self, control: Control, roster: Roster, folder: Path, name: str) -> None:
        self._control = control
        self._roster = roster
        self._leaders = list(roster.leaders.values())
        self._lock: int | None = None
        self.folder = folder
        self.own = folder / name

    def examine(self, report: Report) -> None:
        """All steps; on rank 0 `report` gets the findings."""
        try:
            if not self._create(report) and not self._see(report):
                self._write(report)
                self._lock_against(report)
        finally:
            if self._control.rank == 0:
                probes.remove(self.own)

    def _step(self, name: str, work: Callable[[int], Any]) -> Step:
        """`work(place)` on the leader of every node, by its place among them; nothing on the other ranks."""
        rank = self._control.rank
        place = self._leaders.index(rank) if rank in self._leaders else None
        return self._control.step(f"folder/{name}", lambda: None if place is None else work(place))

    def _create(self, report: Report) -> bool:
        def work(place: int) -> str:
            if not self.folder.is_dir():
                raise FileNotFoundError(f"{self.folder} is not a folder there")
            if place == 0:
                probes.create(self.own, self.own.name)
            return probes.kind(self.folder)

        step = self._step("create", work)
        fix = "create the folder, or name one on a file system that all nodes share with --folder (the parent of train.run_dir)"
        report.add(*errors(FOLDER, f"using {self.folder}", step.outcomes, self._roster, fix))
        if step.outcomes and not step.failed:
            kinds = {str(step.outcomes[leader].value) for leader in self._leaders}
            report.add(Finding(FOLDER, OK, f"{self.folder} on {and_join(sorted(kinds))}"))
        return step.failed

    def _see(self, report: Report) -> bool:
        """Does every node see what rank 0 wrote? True if not."""
        seconds = min(SEEN_SECONDS, self._control.timeout / 2)

        def work(place: int) -> float:
            found = probes.seconds_until_seen(self.own / "hello", self.own.name, seconds)
            if found is None:
                raise TimeoutError(f"not there after {seconds:.0f} s")
            return found

        step = self._step("see", work)
        where = f"{self.folder} is not shared: a file that {self._node(0)} wrote"
        fix = "name a folder on a file system that all nodes share with --folder; checkpoints and logs of a run must be there"
        found = errors(VISIBLE, where, step.outcomes, self._roster, fix)
        report.add(*(found or self._judge_visibility(step.outcomes)))
        return step.failed

    def _judge_visibility(self, outcomes: Sequence[Outcome]) -> list[Finding]:
        if not outcomes:
            return []
        if len(self._leaders) == 1:
            return [Finding(VISIBLE, SKIPPED, "one node")]
        delays = {self._node(place): outcomes[leader].value for place, leader in enumerate(self._leaders)}
        late = {node: delay for node, delay in delays.items() if delay > LATE_SECONDS}
        fix = "caching of the mount is long (NFS: acregmax, actimeo): a restart may not see the newest checkpoint for that time"
        report = [
            Finding(VISIBLE, WARN, f"{node} sees a new file of {self._node(0)} after {delay:.1f} s", fix, self._roster.nodes[node], (node,))
            for node, delay in late.items()
        ]
        return report or [Finding(VISIBLE, OK, f"every node sees a new file of {self._node(0)} within {max(delays.values()):.1f} s")]

    def _write(self, report: Report) -> None:
        """Latency, rates and space; a node reads what the next one wrote."""
        failed = False
        figures: dict[str, dict[str, float]] = {}
        for name, work in {"latency": self._work_write, "read": self._work_read}.items():
            step = self._step(name, work)
            fix = "is the folder writable there, and is there room within the quota?"
            report.add(*errors(SPEED, f"writing and reading {self.own}", step.outcomes, self._roster, fix))
            failed |= step.failed
            for place, leader in enumerate(self._leaders if step.outcomes else []):
                figures.setdefault(self._node(place), {}).update(step.outcomes[leader].value or {})
            if step.failed:
                break
        report.measured["folder"] = figures
        if figures and not failed:
            report.add(*judge_speed(figures, self._roster), *judge_space(figures, self._roster))

    def _work_write(self, place: int) -> dict[str, float]:
        seconds = probes.latency(self.own, f"small{place}")
        free = probes.free_bytes(self.own)
        return {"seconds": seconds, "write": probes.write_rate(self._large(place), SIZE, place), "free": free}

    def _work_read(self, place: int) -> dict[str, float]:
        other = (place + 1) % len(self._leaders)
        return {"read": probes.read_rate(self._large(other), SIZE, other)}

    def _lock_against(self, report: Report) -> None:
        """One node holds the lock, the others must not get it."""
        path = self.own / "lock"

        def hold(place: int) -> None:
            if place == 0:
                self._lock = probes.take_lock(path)

        def attempt(place: int) -> bool:
            return probes.lock_is_refused(path) if place or len(self._leaders) == 1 else True

        fix = "runs go on, but nothing stops two of them from using one run_dir: take care, or mount with locks (Lustre: -o flock)"
        try:
            for name, work in {"lock": hold, "attempt": attempt}.items():
                step = self._step(name, work)
                unlocked = errors(LOCK, f"locking {path}", step.outcomes, self._roster, fix)
                report.add(*(Finding(LOCK, WARN, one.what, fix, one.ranks, one.nodes) for one in unlocked))
                if step.failed:
                    return
        finally:
            if self._lock is not None:
                os.close(self._lock)
        report.add(*self._judge_lock(step.outcomes, fix))

    def _judge_lock(self, outcomes: Sequence[Outcome], fix: str) -> list[Finding]:
        if not outcomes:
            return []
        got = [self._node(place) for place, leader in enumerate(self._leaders) if not outcomes[leader].value]
        if got:
            what = f"{and_join(got)} got a lock that {self._node(0)} holds"
            return [Finding(LOCK, WARN, what, fix, tuple(self._roster.leaders[node] for node in got), tuple(got))]
        what = "a locked file cannot be locked again" + (" from any other node" if len(self._leaders) > 1 else "")
        return [Finding(LOCK, OK, what)]

    def _node(self, place: int) -> str:
        return self._roster.node_of(self._leaders[place])

    def _large(self, place: int) -> Path:
        return self.own / f"large{place}"


def examine(control: Control, roster: Roster, folder: Path, report: Report) -> None:
    """Look at `folder` from all nodes; on rank 0 `report` gets the findings."""
    name = control.told("folder", f".poet-megatron-doctor-{secrets.token_hex(4)}")
    SharedFolder(control, roster, folder, name).examine(report)


def judge_speed(figures: dict[str, dict[str, float]], roster: Roster) -> list[Finding]:
    """Warn of slow nodes: in themselves, or against the others."""
    found = []
    for node, figure in figures.items():
        slow = [f"{1e3 * figure['seconds']:.0f} ms to make a small file durable"] if figure["seconds"] > SLOW_LATENCY else []
        for way in ("write", "read"):
            median = statistics.median(other[way] for other in figures.values())
            if figure[way] < max(SLOW_RATE, SLOW_OF_MEDIAN * median if len(figures) > 2 else 0):
                slow.append(f"{way} {figure[way] / 1e6:.0f} MB/s" + (f" (median node {median / 1e6:.0f})" if len(figures) > 2 else ""))
        if slow:
            fix = "checkpoints will take long: ask which file system is meant for them, or make checkpoint.interval longer"
            found.append(Finding(SPEED, WARN, f"{node}: {', '.join(slow)}", fix, roster.nodes[node], (node,)))
    if found:
        return found
    slowest = {key: min(figure[key] for figure in figures.values()) for key in ("write", "read")}
    latency = max(figure["seconds"] for figure in figures.values())
    what = f"{1e3 * latency:.1f} ms to make a small file durable, {SIZE // probes.MIB} MiB per node at once: "
    return [Finding(SPEED, OK, f"{what}write {slowest['write'] / 1e6:.0f}, read {slowest['read'] / 1e6:.0f} MB/s on the slowest node")]


def judge_space(figures: dict[str, dict[str, float]], roster: Roster) -> list[Finding]:
    """The node that sees the least."""
    node = min(figures, key=lambda node: figures[node]["free"])
    free = figures[node]["free"]
    if free >= LITTLE_FREE:
        return [Finding(SPACE, OK, f"{free / GIB:.0f} GiB")]
    status = FAIL if free < LEAST_FREE else WARN
    what = f"{free / GIB:.1f} GiB, seen from {node}"
    fix = "a checkpoint has 12 to 16 bytes per trained parameter (poet-megatron estimate): remove old runs or choose another folder"
    return [Finding(SPACE, status, what, fix, roster.nodes[node], (node,))]
