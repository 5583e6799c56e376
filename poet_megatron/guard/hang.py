"""Which rank a hang is to be blamed on, from what every rank says of itself."""

from __future__ import annotations

import linecache
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

WAITING = re.compile(r"\bwait\(|synchronize\(|\.item\(|\.tolist\(|\.cpu\(|\bbarrier\(")
"""Source lines in which a rank waits for others, or for its GPU, which may wait for others."""
LOST = re.compile(r"[Cc]onnection|gloo|NCCL|[Tt]imed out")
"""Errors of a rank whose connections to others broke."""
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class RankReport:
    """Where a rank stands.

    Attributes:
        rank: global rank.
        node: its machine.
        pid: its process.
        phase: part of the step that it is in.
        seconds: how long already.
        waiting: whether its main thread waits for other ranks.
        place: innermost line of its main thread, `file:line in function`, and from which line of ours it was called.
        collectives: {ranks of a group, as "0,1": number of collectives that this rank has issued in it}.
    """

    rank: int
    node: str
    pid: int
    phase: str
    seconds: float
    waiting: bool
    place: str
    collectives: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The rank for messages."""
        return f"rank {self.rank} ({self.node}, pid {self.pid})"


def blame(reports: Sequence[RankReport], world_size: int) -> str:
    """One sentence that names the rank to blame, as far as the reports tell.

    In this order: ranks without a report; ranks that have issued fewer collectives than others in some group and more in none (others
    wait for them; a rank that is behind in one group and ahead in another waits itself); ranks that do not wait while others do.
    """
    missing = sorted(set(range(world_size)) - {report.rank for report in reports})
    if missing:
        return f"{_ranks(missing)} did not answer: gone, or stuck outside of Python"
    behind, ahead = _positions(reports)
    late = [report for report in reports if report.rank in behind - ahead]
    if late := [report for report in late if not report.waiting] or late:  # a pipeline stage may wait for a message from another
        return "; ".join(f"{report.name} {_where(report)}, and others wait for it in a collective" for report in late)
    busy = [report for report in reports if not report.waiting]
    if busy and len(busy) < len(reports):
        return "; ".join(f"{report.name} {_where(report)} while the others wait" for report in busy)
    if len(reports) == 1:
        return f"{reports[0].name} {_where(reports[0])}"
    return "no rank is behind the others or does something else than wait: see their stacks, and the flight recorder for a GPU's queue"


def _positions(reports: Sequence[RankReport]) -> tuple[set[int], set[int]]:
    """Ranks that are behind in some group, and ranks that are ahead of somebody in some group."""
    behind: set[int] = set()
    ahead: set[int] = set()
    for group in {name for report in reports for name in report.collectives}:
        counts = {report.rank: report.collectives[group] for report in reports if group in report.collectives}
        least, most = min(counts.values()), max(counts.values())
        behind |= {rank for rank, count in counts.items() if count < most}
        ahead |= {rank for rank, count in counts.items() if count > least}
    return behind, ahead


def _where(report: RankReport) -> str:
    return f"has been in {report.phase} for {report.seconds:.0f} s, at {report.place}"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def main_frame() -> FrameType | None:
    """Innermost frame of the main thread."""
    return sys._current_frames().get(threading.main_thread().ident or 0)


def place_of(frame: FrameType | None) -> tuple[str, bool]:
    """(`file:line in function`, whether it waits there) of a frame."""
    if frame is None:
        return "unknown", False
    file, line = frame.f_code.co_filename, frame.f_lineno
    waits = "torch/distributed/" in file or bool(WAITING.search(linecache.getline(file, line)))
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(PACKAGE):
        ours = ours.f_back
    caller = f", called by {_line(ours)}" if ours is not None and ours is not frame else ""
    return _line(frame) + caller, waits


def place_of_error(error: BaseException) -> tuple[str, bool]:
    """The same of an error that ended training. A rank that lost its connections had waited for others."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place, waits = place_of(None if trace is None else trace.tb_frame)
    text = f"{type(error).__name__}: {error}".strip()
    return f"{place}, where it ended with {text.splitlines()[0]}", waits or bool(LOST.search(text))


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def all_stacks() -> str:
    """Stacks of all threads, innermost line last."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(number, number)}\n{''.join(traceback.format_stack(frame))}" for number, frame in sys._current_frames().items()
    ]
    return "\n".join(parts)


def collectives_issued() -> dict[str, int]:
    """Number of collectives that this rank has issued in each of its process groups; groups that do not count are left out."""
    counts: dict[str, int] = {}
    groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
    for group in groups:
        try:
            ranks = dist.get_process_group_ranks(group)
            if len(ranks) > 1:
                key = f"{group.group_desc} {','.join(map(str, ranks))}"
                counts[key] = counts.get(key, 0) + group._get_sequence_number_for_group()
        except (RuntimeError, ValueError, AttributeError):  # a backend without numbers
            continue
    return counts
