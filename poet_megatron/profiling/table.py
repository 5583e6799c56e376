"""The short table of a profile: the parts of a step, and the operators that take most of it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

TOP = 12
LONGEST_NAME = 48
MIB = 2**20
MICROSECONDS = 1e3  # in a millisecond
NUMBER = re.compile(r"[0-9]+")
INTERNAL = ("Optimizer.", "autograd::", "ProfilerStep", "##", "Activity Buffer")
"""How names of parts begin that torch itself writes."""


def operator_table(averages: Iterable[Any], steps: int, on_gpu: bool) -> str:
    """Parts and operators, by time per step.

    Args:
        averages: torch.profiler's key_averages().
        steps: steps that were recorded.
        on_gpu: whether operators are ranked by their time on the GPU instead of the CPU.
    """
    events = list(averages)
    parts = _parts(events, steps)
    return "\n".join([*parts, *([""] if parts else []), *_operators(events, steps, on_gpu)])


def _parts(events: Sequence[Any], steps: int) -> list[str]:
    """Time that the CPU spends in each named part, the numbers in names left out (`step 12` and `step 13` are `step N`)."""
    totals: dict[str, float] = defaultdict(float)
    for event in events:
        if _is_part(event) and event.cpu_time_total:
            totals[NUMBER.sub("N", event.key)] += event.cpu_time_total
    rows = [[name, _milliseconds(total, steps)] for name, total in sorted(totals.items(), key=lambda item: -item[1])]
    return _aligned([["part of a step", "ms per step on the CPU"], *rows]) if rows else []


def _operators(events: Sequence[Any], steps: int, on_gpu: bool) -> list[str]:
    def time(event: Any) -> float:
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    operators = sorted((event for event in events if not _is_part(event)), key=time, reverse=True)
    whole = sum(map(time, operators)) or 1.0
    with_memory = any(event.self_cpu_memory_usage for event in operators)
    rows = [["operator", "calls", f"ms per step on the {'GPU' if on_gpu else 'CPU'}", "share", *(["net MiB"] if with_memory else [])]]
    for event in operators[:TOP]:
        memory = [f"{round(event.self_cpu_memory_usage / MIB / steps, 1) + 0.0:.1f}"] if with_memory else []
        name = event.key if len(event.key) <= LONGEST_NAME else f"{event.key[: LONGEST_NAME - 3]}..."
        rows.append([name, f"{event.count / steps:g}", _milliseconds(time(event), steps), f"{100 * time(event) / whole:.1f}%", *memory])
    return _aligned(rows)


def _is_part(event: Any) -> bool:
    return bool(event.is_user_annotation) and not event.key.startswith(INTERNAL)


def _milliseconds(total: float, steps: int) -> str:
    return f"{total / MICROSECONDS / steps:.3f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
