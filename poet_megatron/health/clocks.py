"""Clocks, power, temperature and memory errors of the GPUs, read while they multiply matrices."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict

import torch

from poet_megatron.health.control import Outcome
from poet_megatron.health.gpu_state import IDLE, POWER_CAP, REASONS, GpuState, NotReadable, read
from poet_megatron.health.outcomes import errors, nodes_of
from poet_megatron.health.report import FAIL, OK, SKIPPED, WARN, Finding
from poet_megatron.health.roster import Roster, and_join

CLOCKS, MEMORY = "clocks", "gpu memory"
WARM_UP_SECONDS = 2.0
WIDTH = 8192
SLOW_OF_MEDIAN = 0.9
SLOW_OF_MAX = 0.5
HOT_C = 85
HUNG = "did not answer"


def read_under_load(uuid: str, device: torch.device) -> dict[str, object]:
    """State of this rank's GPU after two seconds of work, as plain data; {"unreadable": why} if nothing can tell it."""
    try:
        with load(device):
            time.sleep(WARM_UP_SECONDS if device.type == "cuda" else 0)
            return asdict(read(uuid))
    except NotReadable as error:
        return {"unreadable": str(error)}


@contextmanager
def load(device: torch.device) -> Iterator[None]:
    """Keep a GPU busy with products of bf16 matrices; nothing on a CPU. An error of the GPU is raised at the end."""
    if device.type != "cuda":
        yield
        return
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(_multiply, device, stop)
        try:
            yield
        finally:
            stop.set()
        working.result()


def _multiply(device: torch.device, stop: threading.Event) -> None:
    a, b = (torch.randn(WIDTH, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    while not stop.is_set():
        for _ in range(20):
            torch.mm(a, b, out=product)
        torch.cuda.synchronize(device)


def judge(outcomes: Sequence[Outcome], roster: Roster) -> list[Finding]:
    """Compare the readings of all ranks that have a GPU (the others' value is None)."""
    answers = {rank: outcome.value for rank, outcome in enumerate(outcomes) if outcome.value}
    failed = errors(CLOCKS, "reading the GPU while it works", outcomes, roster, "look at nvidia-smi and dmesg (Xid) there; drain the node")
    if not answers:
        return failed or [Finding(check, SKIPPED, "no rank has a GPU") for check in (CLOCKS, MEMORY)]
    unreadable = {rank: answer["unreadable"] for rank, answer in answers.items() if "unreadable" in answer}
    states = {rank: GpuState(**answer) for rank, answer in answers.items() if rank not in unreadable}
    if not states and not failed and not any(HUNG in why for why in unreadable.values()):
        why = f"the driver cannot be asked: {next(iter(unreadable.values()))}"
        return [Finding(check, SKIPPED, f"{why} (pip install nvidia-ml-py)") for check in (CLOCKS, MEMORY)]
    found = failed + [_unreadable(rank, why, roster) for rank, why in unreadable.items()]
    return found + _clocks(states, roster) + _memory(states, roster)


def _unreadable(rank: int, why: str, roster: Roster) -> Finding:
    return Finding(
        CLOCKS,
        FAIL if HUNG in why else WARN,
        f"{roster.name([rank])}: {why}",
        f"run nvidia-smi on {roster.node_of(rank)}; if it hangs or does not list the GPU, drain the node",
        (rank,),
        (roster.node_of(rank),),
    )


def _clocks(states: dict[int, GpuState], roster: Roster) -> list[Finding]:
    if not states:
        return []
    clocks = {rank: state.sm_mhz for rank, state in states.items() if state.sm_mhz}
    median = statistics.median(clocks.values()) if clocks else 0.0
    found = _alike(states, roster, lambda state: _why_slow(state, median))
    if found:
        return found
    some = next(iter(states.values()))
    low, high = (f"{bound(clocks.values()):.0f}" if clocks else "?" for bound in (min, max))
    top = f" of {some.max_sm_mhz:.0f}" if some.max_sm_mhz else ""
    hottest = max((state.temperature_c for state in states.values() if state.temperature_c is not None), default=None)
    heat = f", at most {hottest:.0f} C" if hottest is not None else ""
    held = {name for state in states.values() for bit, name in REASONS.items() if (state.reasons or 0) & bit}
    return [
        Finding(
            CLOCKS,
            OK,
            f"{low} to {high}{top} MHz under load{heat}, held by {and_join(sorted(held)) or 'nothing'} (read by {some.source})",
        )
    ]


def _why_slow(state: GpuState, median: float) -> str:
    """What is wrong with the clocks of a GPU; "" if nothing. Running into the power cap is normal for large products."""
    reasons = [name for bit, name in REASONS.items() if (state.reasons or 0) & bit and bit not in (IDLE, POWER_CAP)]
    why = [f"held down by {and_join(reasons)}"] if reasons else []
    if state.sm_mhz is not None and state.sm_mhz < SLOW_OF_MEDIAN * median:
        why.append(f"{state.sm_mhz:.0f} MHz under load, the median is {median:.0f}")
    elif state.sm_mhz is not None and state.max_sm_mhz and state.sm_mhz < SLOW_OF_MAX * state.max_sm_mhz:
        why.append(f"{state.sm_mhz:.0f} of {state.max_sm_mhz:.0f} MHz under load")
    if state.power_limit_w and state.power_default_w and state.power_limit_w < state.power_default_w - 1:
        why.append(f"power cap {state.power_limit_w:.0f} W instead of {state.power_default_w:.0f} W")
    if state.temperature_c is not None and state.temperature_c >= HOT_C:
        why.append(f"{state.temperature_c:.0f} C")
    return ", ".join(why)


def _alike(states: dict[int, GpuState], roster: Roster, why: Callable[[GpuState], str]) -> list[Finding]:
    """One warning per different complaint."""
    by_complaint: dict[str, list[int]] = {}
    for rank, state in states.items():
        complaint = why(state)
        if complaint:
            by_complaint.setdefault(complaint, []).append(rank)
    fix = "the slowest GPU sets the pace: have cooling, power and clock settings (nvidia-smi -q -d CLOCK,POWER,PERFORMANCE) looked at"
    return [
        Finding(CLOCKS, WARN, f"{roster.name(ranks)}: {complaint}", fix, tuple(ranks), nodes_of(ranks, roster))
        for complaint, ranks in by_complaint.items()
    ]


def _memory(states: dict[int, GpuState], roster: Roster) -> list[Finding]:
    found = [finding for rank, state in states.items() for finding in _errors(rank, state, roster)]
    if found or not states:
        return found
    known = [state for state in states.values() if state.uncorrectable is not None]
    if not known:
        return [Finding(MEMORY, SKIPPED, "these GPUs do not count memory errors (no ECC)")]
    return [Finding(MEMORY, OK, f"ECC on, no uncorrectable errors, no row or page to replace ({len(known)} GPUs)")]


def _errors(rank: int, state: GpuState, roster: Roster) -> list[Finding]:
    node = roster.node_of(rank)
    reset = f"drain {node} and have the GPU reset; a GPU that fails again must be replaced"
    cases = [
        (bool(state.uncorrectable), FAIL, f"{state.uncorrectable} uncorrectable memory error(s) since the driver was loaded", reset),
        (bool(state.pending), FAIL, "a memory row or page waits to be replaced at the next reset", reset),
        (bool(state.remap_failed), FAIL, "a memory row could not be replaced: no spare rows", f"drain {node} and have the GPU replaced"),
        (
            bool(state.uncorrectable_ever) and not state.uncorrectable,
            WARN,
            f"{state.uncorrectable_ever} uncorrectable memory error(s) in its life, none since the driver was loaded",
            "watch it: repeated errors mean that the GPU must be replaced",
        ),
        (
            state.ecc_on is False,
            WARN,
            "ECC is off: bit flips in its memory are not seen",
            "have it switched on (nvidia-smi -e 1, then a reset)",
        ),
    ]
    return [Finding(MEMORY, status, f"{roster.name([rank])}: {what}", fix, (rank,), (node,)) for holds, status, what, fix in cases if holds]
