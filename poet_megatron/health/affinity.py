"""Processor cores and memory that each rank may use."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from poet_megatron.health.report import OK, SKIPPED, WARN, Finding
from poet_megatron.health.roster import Roster, and_join

CORES, MEMORY = "cpu cores", "host memory"
GIB = 2**30
LEAST_MEMORY = 4 * GIB
LEAST_SHARED = GIB
NUMA_FOLDER, SHARED_MEMORY, CGROUPS = Path("/sys/devices/system/node"), Path("/dev/shm"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Affinity:
    """What one rank may use.

    Attributes:
        cores: numbers of the processors that it may run on; empty if the system does not tell.
        numa: NUMA nodes of these cores; empty if the system does not tell.
        numa_nodes: NUMA nodes of the machine.
        threads: that torch uses.
        memory: bytes that are free for this rank's control group or the whole node, whichever is less.
        shared: bytes free in /dev/shm; None without one.
    """

    cores: tuple[int, ...]
    numa: tuple[int, ...]
    numa_nodes: int
    threads: int
    memory: int
    shared: int | None


def read() -> Affinity:
    """Look at this process."""
    cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    shared = os.statvfs(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    return Affinity(
        cores,
        numa_nodes(cores, NUMA_FOLDER),
        len(list(NUMA_FOLDER.glob("node[0-9]*"))),
        torch.get_num_threads(),
        min(psutil.virtual_memory().available, *_cgroup_memory(Path("/proc/self/cgroup"), CGROUPS)),
        shared.f_bavail * shared.f_frsize if shared is not None else None,
    )


def numa_nodes(cores: Sequence[int], folder: Path) -> tuple[int, ...]:
    """NUMA nodes that have some of `cores`, from the kernel's node*/cpulist."""
    found = []
    for path in folder.glob("node[0-9]*/cpulist"):
        if set(cores) & set(_numbers(path.read_text())):
            found.append(int(path.parent.name.removeprefix("node")))
    return tuple(sorted(found))


def _numbers(text: str) -> list[int]:
    """Numbers in a kernel list such as "0-3,8"."""
    pieces = [piece.partition("-") for piece in text.strip().split(",") if piece]
    return [number for first, _, last in pieces for number in range(int(first), int(last or first) + 1)]


def _cgroup_memory(membership: Path, root: Path) -> list[int]:
    """What the limits of this process's control groups (version 2) and of those above leave free; [a huge number] without limits."""
    left = [2**62]
    try:
        own = membership.read_text().partition("0::")[2].strip().lstrip("/")
        folders = [root / own, *(root / own).parents] if own else [root]
    except OSError:
        return left
    for folder in folders:
        try:
            left.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
        except (OSError, ValueError):  # no such group, or "max"
            continue
    return left


def judge(ranks: Sequence[Affinity], roster: Roster) -> list[Finding]:
    """Compare the ranks of every node."""
    return _cores(ranks, roster) + _memory(ranks, roster)


def _cores(ranks: Sequence[Affinity], roster: Roster) -> list[Finding]:
    """Nodes with the same complaint are one line."""
    if not all(one.cores for one in ranks):
        return [Finding(CORES, SKIPPED, "this system does not tell which cores a process may use")]
    complaints: dict[tuple[str, str], list[str]] = {}
    for node, there in roster.nodes.items():
        for complaint in (*_sharing([ranks[rank] for rank in there]), *_crowding([ranks[rank] for rank in there])):
            complaints.setdefault(complaint, []).append(node)
    if complaints:
        return [
            Finding(
                CORES, WARN, f"{what} on {and_join(nodes)}", fix, tuple(rank for node in nodes for rank in roster.nodes[node]), tuple(nodes)
            )
            for (what, fix), nodes in complaints.items()
        ]
    counts = sorted({len(one.cores) for one in ranks})
    inside = ", each rank inside one NUMA node" if all(len(one.numa) == 1 < one.numa_nodes for one in ranks) else ""
    return [Finding(CORES, OK, f"{and_join([str(count) for count in counts])} per rank{inside}")]


def _sharing(ranks: Sequence[Affinity]) -> list[tuple[str, str]]:
    """Cores that ranks of one node share. Ranks that are bound to a NUMA node may share that one: it is next to their GPUs."""
    bound = all(len(one.numa) == 1 < one.numa_nodes for one in ranks)
    users = Counter(core for one in ranks for core in one.cores)
    shared = [core for core, using in users.items() if using > 1]
    if bound or not shared:
        return []
    what = f"{len(shared)} of {len(users)} cores are shared by several of the {len(ranks)} ranks"
    return [(what, "bind ranks to cores or NUMA nodes: srun --cpus-per-task=N --cpu-bind=cores, or numactl; torchrun does not bind")]


def _crowding(ranks: Sequence[Affinity]) -> list[tuple[str, str]]:
    """More threads of torch than cores on a node."""
    cores = {core for one in ranks for core in one.cores}
    threads = sum(one.threads for one in ranks)
    if threads <= len(cores):
        return []
    share = len(cores) // len(ranks)
    fix = f"set OMP_NUM_THREADS to {share}" if share else "start fewer ranks per node, or ask for more cores (--cpus-per-task)"
    return [(f"{threads} threads of torch in {len(ranks)} ranks for {len(cores)} cores", fix)]


def _memory(ranks: Sequence[Affinity], roster: Roster) -> list[Finding]:
    found = []
    for node, there in roster.nodes.items():
        per_rank = min(ranks[rank].memory for rank in there) / len(there)
        if per_rank < LEAST_MEMORY:
            what = f"{node} has {per_rank / GIB:.1f} GiB free per rank"
            found.append(Finding(MEMORY, WARN, what, "ask for more (--mem), or look at what else runs there", tuple(there), (node,)))
        shared = min((size for rank in there if (size := ranks[rank].shared) is not None), default=None)
        if shared is not None and shared < LEAST_SHARED:
            what = f"{node} has {shared / GIB:.2f} GiB free in /dev/shm, which NCCL and data loaders use"
            fix = "remove what was left there; in a container give it more (docker: --shm-size, --ipc=host)"
            found.append(Finding(MEMORY, WARN, what, fix, tuple(there), (node,)))
    least = min(one.memory for one in ranks)
    return found or [Finding(MEMORY, OK, f"at least {least / GIB:.1f} GiB free on every node")]
