"""Collectives: are their sums right, and how fast are they over all ranks, inside each node, and between each two nodes?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from poet_megatron.health import pairs, sums
from poet_megatron.health.control import Control, Outcome, Step
from poet_megatron.health.outcomes import errors
from poet_megatron.health.report import OK, SKIPPED, WARN, Finding, Report
from poet_megatron.health.roster import Roster

CONNECT, SUMS, WORLD, INSIDE = "connect", "sums", "all ranks", "inside nodes"
BYTES = {"cuda": 128 * 2**20, "cpu": 4 * 2**20}
REPEATS = 5
MARGIN_SECONDS = 30
"""How much later than the step torch itself gives up: its own way out is to end the process."""
FIX = {
    "nccl": "run again with NCCL_DEBUG=INFO: which interface does it take (NCCL_SOCKET_IFNAME, NCCL_IB_HCA), and can these nodes reach it?",
    "gloo": "is the interface of the host name reachable from the other nodes? set GLOO_SOCKET_IFNAME to one that is",
}


@dataclass(frozen=True)
class Network:
    """What the steps below need.

    Attributes:
        control: lock-step.
        roster: who is there.
        backend: nccl or gloo.
        device: of this rank's tensors.
        store: key-value store for process groups.
    """

    control: Control
    roster: Roster
    backend: str
    device: torch.device
    store: dist.Store


def examine(network: Network, report: Report) -> None:
    """Connect, check, measure; on rank 0 `report` gets the findings. After an error the steps that are left are skipped."""
    steps = [_connect, _sums, _inside, _pairs]
    names = [CONNECT, SUMS, INSIDE, pairs.CHECK]
    for number, step in enumerate(steps):
        if step(network, report):
            rest = [Finding(name, SKIPPED, f"not tried after the failure of: {names[number]}") for name in names[number + 1 :]]
            report.add(*rest)
            return


def leave(device: torch.device, stuck: bool) -> None:
    """Close the process groups, without waiting for a collective that hangs."""
    if not dist.is_initialized() or stuck:
        return
    if device.type == "cuda":
        dist.distributed_c10d._abort_process_group()
    else:
        dist.destroy_process_group()


def _connect(network: Network, report: Report) -> bool:
    control, timeout = network.control, timedelta(seconds=network.control.timeout + MARGIN_SECONDS)

    def work() -> float:
        start = time.perf_counter()
        if network.device.type == "cuda":
            torch.cuda.set_device(network.device)
        dist.init_process_group(network.backend, store=network.store, rank=control.rank, world_size=control.size, timeout=timeout)
        dist.all_reduce(torch.ones(1, device=network.device))
        _synchronize(network.device)
        return time.perf_counter() - start

    step = control.step("network/connect", work)
    report.add(*errors(CONNECT, f"first {network.backend} collective", step.outcomes, network.roster, FIX[network.backend]))
    if step.outcomes and not step.failed:
        slowest = max(outcome.value for outcome in step.outcomes)
        report.add(Finding(CONNECT, OK, f"{network.backend} over {network.device.type.upper()} tensors, up in {slowest:.1f} s"))
    return step.failed


def _sums(network: Network, report: Report) -> bool:
    """Exact sums and bandwidth over all ranks."""
    roster, everyone = network.roster, list(range(network.control.size))
    sizes = sums.SIZES + (sums.LARGER_ON_GPU if network.device.type == "cuda" else ())
    step = network.control.step("network/all", _measuring(network, everyone, None, sizes))
    found = errors(SUMS, "all-reduce over all ranks", step.outcomes, roster, FIX[network.backend])
    found += sums.judge(SUMS, "over all ranks", sums.outcomes_by_rank(step.outcomes, _present(everyone, step), "wrong"), roster)
    report.add(*(found or [Finding(SUMS, OK, sums.describe(network.control.size))] if step.outcomes else []))
    rate = _rate(network, everyone, step)
    if rate and len(everyone) > 1:
        report.measured["all_ranks"] = rate
        speeds = f"{rate['bus_GBps']:.2f} GB/s bus bandwidth, {rate['algorithm_GBps']:.2f} GB/s algorithm bandwidth"
        text = f"{speeds}, all-reduce of {BYTES[network.device.type] // 2**20} MiB"
        report.add(Finding(WORLD, OK, text))
    elif step.outcomes and not step.failed:
        report.add(Finding(WORLD, SKIPPED, "one rank has nobody to talk to"))
    return step.failed


def _inside(network: Network, report: Report) -> bool:
    """The same inside every node, all nodes at once."""
    roster, rank = network.roster, network.control.rank
    several = {node: ranks for node, ranks in roster.nodes.items() if len(ranks) > 1}
    if not several:
        report.add(Finding(INSIDE, SKIPPED, "every node has one rank"))
        return False
    own = several.get(roster.node_of(rank), ())
    step = network.control.step("network/inside", _in_group(network, own))
    found = errors(INSIDE, "all-reduce inside nodes", step.outcomes, roster, FIX[network.backend])
    rates: dict[str, dict[str, float]] = {}
    for node, ranks in several.items():
        found += sums.judge(INSIDE, f"inside {node}", sums.outcomes_by_rank(step.outcomes, _present(ranks, step), "wrong"), roster)
        rates |= {node: rate} if (rate := _rate(network, ranks, step)) else {}
    report.measured["inside_nodes"] = rates
    report.add(*(found or _judge_inside({node: rate["bus_GBps"] for node, rate in rates.items()}, roster)))
    return step.failed


def _judge_inside(rates: dict[str, float], roster: Roster) -> list[Finding]:
    """Warn of nodes below half of the median node."""
    if not rates:
        return []
    median = statistics.median(rates.values())
    slow = [node for node, rate in rates.items() if rate < pairs.SLOW * median]
    fix = "look at NVLink (nvidia-smi nvlink -s), and whether something else runs on it"
    if slow:
        return [
            Finding(INSIDE, WARN, f"{node}: {rates[node]:.2f} GB/s, the median node has {median:.2f}", fix, roster.nodes[node], (node,))
            for node in slow
        ]
    spread = f"{min(rates.values()):.2f} to {max(rates.values()):.2f}" if len(rates) > 1 else f"{median:.2f}"
    return [Finding(INSIDE, OK, f"{spread} GB/s bus bandwidth")]


def _pairs(network: Network, report: Report) -> bool:
    """The same between each two nodes, in rounds of pairs that have no node in common."""
    roster, nodes = network.roster, list(network.roster.nodes)
    if len(nodes) == 1:
        report.add(Finding(pairs.CHECK, SKIPPED, "one node"))
        return False
    rates: dict[tuple[str, str], float] = {}
    found: list[Finding] = []
    for number, meeting in enumerate(pairs.rounds(len(nodes))):
        groups = {(nodes[first], nodes[second]): _ranks_of(roster, nodes[first], nodes[second]) for first, second in meeting}
        own = next((ranks for ranks in groups.values() if network.control.rank in ranks), ())
        step = network.control.step(f"network/pairs/{number}", _in_group(network, own))
        for pair, ranks in groups.items():
            found += _judge_pair(network, pair, ranks, step)
            rates |= {pair: rate["bus_GBps"]} if (rate := _rate(network, ranks, step)) else {}
        if step.failed:
            break
    report.measured["node_pairs"] = [{"nodes": pair, "bus_GBps": rate} for pair, rate in rates.items()]
    speeds = pairs.judge(rates, roster)
    report.add(*found, *(finding for finding in speeds if finding.status != OK or not found))
    return step.failed


def _judge_pair(network: Network, pair: tuple[str, str], ranks: Sequence[int], step: Step) -> list[Finding]:
    """Errors and wrong sums of one pair; both nodes are named."""
    where = f"between {pair[0]} and {pair[1]}"
    outcomes = [outcome if rank in ranks else Outcome() for rank, outcome in enumerate(step.outcomes)]
    found = errors(pairs.CHECK, f"all-reduce {where}", outcomes, network.roster, FIX[network.backend])
    return found + sums.judge(pairs.CHECK, where, sums.outcomes_by_rank(step.outcomes, _present(ranks, step), "wrong"), network.roster)


def _ranks_of(roster: Roster, first: str, second: str) -> tuple[int, ...]:
    return tuple(sorted((*roster.nodes[first], *roster.nodes[second])))


def _in_group(network: Network, ranks: Sequence[int]) -> Callable[[], Any]:
    """Work of a rank that belongs to a group of `ranks`, which is made for it and closed again; no work outside of it."""

    def work() -> Any:
        if network.device.type == "cuda":
            torch.cuda.set_device(network.device)
        timeout = timedelta(seconds=network.control.timeout + MARGIN_SECONDS)
        group = dist.new_group(list(ranks), timeout=timeout, backend=network.backend, use_local_synchronization=True)
        found = _measuring(network, ranks, group, sums.SHORT)()
        dist.destroy_process_group(group)
        return found

    return work if ranks else lambda: None


def _measuring(network: Network, members: Sequence[int], group: dist.ProcessGroup | None, sizes: Sequence[int]) -> Callable[[], Any]:
    """Work of one rank: check sums, then time all-reduces."""

    def work() -> dict[str, Any]:
        if network.device.type == "cuda":
            torch.cuda.set_device(network.device)
        wrong = sums.check_sums(list(members), network.control.rank, group, network.device, sizes)
        return {"wrong": wrong, "seconds": seconds_of_all_reduce(group, network.device, members)}

    return work


def seconds_of_all_reduce(group: dist.ProcessGroup | None, device: torch.device, members: Sequence[int]) -> float:
    """Median of a few all-reduces of BYTES bytes, after one that is not counted.

    Args:
        group: the process group; None for all ranks.
        device: of the tensor.
        members: global ranks of the group.
    """
    if len(members) == 1:
        return 0.0
    data = torch.zeros(BYTES[device.type] // 4, device=device)
    seconds = []
    for _ in range(1 + REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        dist.all_reduce(data, group=group)
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def _rate(network: Network, ranks: Sequence[int], step: Step) -> dict[str, float]:
    """Bandwidths of a group, by its slowest rank; {} if a rank has no figure.

    Algorithm bandwidth is the size of the tensor over the time. A ring sends 2 (n - 1)/n times the tensor over every link: that is the bus
    bandwidth, which can be compared between groups of different sizes and with what the hardware can do.
    """
    present = sums.outcomes_by_rank(step.outcomes, _present(ranks, step), "seconds")
    slowest = max(present.values(), default=0.0)
    if len(present) < len(ranks) or not slowest:
        return {}
    algorithm = BYTES[network.device.type] / slowest / 1e9
    return {"algorithm_GBps": algorithm, "bus_GBps": algorithm * 2 * (len(ranks) - 1) / len(ranks)}


def _present(ranks: Sequence[int], step: Step) -> list[int]:
    """`ranks` on rank 0, which has the outcomes; nobody elsewhere."""
    return list(ranks) if step.outcomes else []


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
