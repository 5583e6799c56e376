"""All checks in order: what needs no collective first, the network last."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from poet_megatron.health import affinity, clocks, devices, filesystem, network, time_skew, versions
from poet_megatron.health.control import Control, Silent, Step, missing, part
from poet_megatron.health.outcomes import errors
from poet_megatron.health.report import FAIL, Finding, Report
from poet_megatron.health.roll_call import NotAllCame, open_stores, roll_call
from poet_megatron.health.roster import Launch, Roster

FACTS = "facts"


@dataclass(frozen=True)
class Options:
    """What to check with.

    Attributes:
        folder: that runs write to.
        timeout: seconds that a step may take.
        environment: variables that matter to a run.
        granted: how the environment says that the allocation has GPUs; "" if it does not.
    """

    folder: Path
    timeout: float
    environment: Mapping[str, str]
    granted: str = ""


@dataclass(frozen=True)
class Verdict:
    """The end of the checks on one rank.

    Attributes:
        exit_status: 0 or 1, the same on all ranks that could be told.
        stuck: this process cannot end in an orderly way: a thread hangs in a collective, a driver or a file system, or process groups are
            open whose other ranks have gone.
    """

    exit_status: int
    stuck: bool = False


def examine(launch: Launch, options: Options, show: Callable[[Report], None]) -> Verdict:
    """Run all checks on this rank.

    Args:
        launch: where this process stands.
        options: what to check with.
        show: called with the report where there is one, before any rank learns the exit status: a launcher that sees one rank fail may end
            the others.

    Raises:
        UserError: rank 0 cannot serve the key-value store.
    """
    start = time.monotonic()
    report = Report(launch.size)
    try:
        store, collectives = open_stores(launch, options.timeout)
        roster, found = roll_call(store, launch, options.timeout)
    except NotAllCame as error:
        report.nodes, report.seconds = error.nodes, time.monotonic() - start
        report.add(error.finding)
        if launch.rank == 0 or not error.nodes:
            show(report)
        if error.nodes:
            part(store, launch.rank, [rank for ranks in error.nodes.values() for rank in ranks])
        return Verdict(1)
    report.nodes = roster.nodes
    report.add(*found)
    control = Control(store, launch.rank, launch.size, options.timeout)
    gone: tuple[int, ...] = ()
    try:
        _checks(control, collectives, roster, options, report)
    except Silent as silent:
        gone = silent.ranks
        report.add(_silent(silent, roster))
    report.seconds = time.monotonic() - start
    if launch.rank == 0 or 0 in gone:
        show(report)
    status = 1 if 0 in gone else _agree(control, report, gone)
    return Verdict(status, control.stuck or dist.is_initialized())


def _checks(control: Control, collectives: dist.Store, roster: Roster, options: Options, report: Report) -> None:
    local_rank = roster.members[control.rank].local_rank
    facts = control.step("facts", lambda: _facts(local_rank, options))
    report.backend = control.told("backend", _judge_facts(facts, roster, options, report))
    uuid = facts.own["devices"]["uuid"] if facts.own else ""
    device = torch.device("cuda", local_rank) if uuid else torch.device("cpu")
    readings = control.step("clocks", lambda: clocks.read_under_load(uuid, device) if uuid else None)
    leaders = list(roster.leaders.values())
    skew = control.step("time", lambda: time_skew.measure(control.store, control.rank, leaders, control.timeout))
    if control.rank == 0:
        report.add(*clocks.judge(readings.outcomes, roster), *time_skew.judge(skew.outcomes, roster))
    filesystem.examine(control, roster, options.folder, report)
    device = device if report.backend == "nccl" else torch.device("cpu")
    network.examine(network.Network(control, roster, report.backend, device, collectives), report)
    network.leave(device, control.stuck)


def _facts(local_rank: int, options: Options) -> dict[str, object]:
    return {
        "devices": asdict(devices.read(local_rank)),
        "versions": versions.read(options.environment),
        "affinity": asdict(affinity.read()),
    }


def _judge_facts(step: Step, roster: Roster, options: Options, report: Report) -> str:
    """Findings about what is installed, and the backend that all ranks can use; "" on ranks other than 0."""
    if not step.outcomes:
        return ""
    report.add(*errors(FACTS, "looking at devices and versions", step.outcomes, roster, "run poet-megatron doctor there"))
    if step.failed:
        return "gloo"
    seen = [devices.Devices(**outcome.value["devices"]) for outcome in step.outcomes]
    cores = [affinity.Affinity(**outcome.value["affinity"]) for outcome in step.outcomes]
    report.add(*devices.judge(seen, roster, options.granted))
    report.add(*versions.judge([outcome.value["versions"] for outcome in step.outcomes], roster))
    report.add(*affinity.judge(cores, roster))
    report.measured["ranks"] = [{"rank": rank, "node": roster.node_of(rank), **one.value} for rank, one in enumerate(step.outcomes)]
    return "nccl" if devices.usable(seen, roster) and dist.is_nccl_available() else "gloo"


def _silent(silent: Silent, roster: Roster) -> Finding:
    nodes = tuple(dict.fromkeys(roster.node_of(rank) for rank in silent.ranks))
    return Finding(
        "ranks",
        FAIL,
        f"no answer from {roster.name(silent.ranks)} in step {silent.step}; the checks that were left did not run",
        "these processes ended or hang: read their output, and look at the node (dmesg, out of memory, a hanging file system or GPU)",
        silent.ranks,
        nodes,
    )


def _agree(control: Control, report: Report, gone: tuple[int, ...]) -> int:
    """The exit status, as rank 0 tells it."""
    if control.rank == 0:
        control.store.set("status", str(report.exit_status))
        status = report.exit_status
    else:
        try:
            status = 1 if missing(control.store, ["status"], time.monotonic() + control.timeout) else int(control.store.get("status"))
        except RuntimeError:  # rank 0 has gone
            return 1
    part(control.store, control.rank, [rank for rank in range(control.size) if rank not in gone])
    return status


def end_now(status: int) -> None:
    """End this process although a thread of it hangs; what was printed must have been flushed."""
    os._exit(status)
