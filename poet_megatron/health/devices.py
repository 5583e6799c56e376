"""Does every rank see a GPU of its own, and are they all alike?"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from poet_megatron.health.outcomes import nodes_of
from poet_megatron.health.report import FAIL, OK, SKIPPED, WARN, Finding
from poet_megatron.health.roster import Roster, and_join

CHECK = "gpus"
GIB = 2**30
MEMORY_TOLERANCE = 0.01
"""Drivers of one version reserve a little more or less; ECC or MIG change far more than this."""


@dataclass(frozen=True)
class Devices:
    """What one rank sees.

    Attributes:
        built_for: CUDA version that torch was built for, None for a CPU build.
        count: GPUs that torch sees.
        name: of the GPU with the number of the local rank; "" without one.
        uuid: of that GPU, as nvidia-smi writes it.
        memory: of that GPU, in bytes.
        error: why torch cannot use CUDA although it sees a reason to try.
    """

    built_for: str | None
    count: int = 0
    name: str = ""
    uuid: str = ""
    memory: int = 0
    error: str = ""


def read(local_rank: int) -> Devices:
    """Look at the GPU that training would use on this rank."""
    built_for = torch.version.cuda
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count <= local_rank:
        return Devices(built_for, count, error=str(caught[0].message).splitlines()[0] if caught and not count else "")
    try:
        found = torch.cuda.get_device_properties(local_rank)
        torch.zeros(1, device=torch.device("cuda", local_rank))  # a GPU that is listed need not work
    except RuntimeError as error:
        return Devices(built_for, count, error=str(error).splitlines()[0])
    uuid = str(getattr(found, "uuid", ""))
    uuid = uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return Devices(built_for, count, found.name, uuid, found.total_memory)


def usable(devices: Sequence[Devices], roster: Roster) -> bool:
    """Whether NCCL can run: every rank has a GPU that no other rank of its node has."""
    return all(found.name for found in devices) and not _shared(devices, roster)


def judge(devices: Sequence[Devices], roster: Roster, granted: str) -> list[Finding]:
    """Compare what the ranks see.

    Args:
        devices: by rank.
        roster: names the ranks.
        granted: how the environment says that the allocation has GPUs, such as "CUDA_VISIBLE_DEVICES=0,1"; "" if it does not.
    """
    if not any(found.count for found in devices):
        return [_none_at_all(devices, granted)]
    found = [*_without(devices, roster), *_shared(devices, roster), *_unlike(devices, roster)]
    if not any(finding.status == FAIL for finding in found):
        kinds = Counter((one.name, round(one.memory / GIB)) for one in devices)
        text = ", ".join(f"{count} x {name}, {memory} GiB" for (name, memory), count in kinds.items())
        found.insert(0, Finding(CHECK, OK, f"{text}; each rank has its own"))
    return found


def _none_at_all(devices: Sequence[Devices], granted: str) -> Finding:
    cpu_build = all(found.built_for is None for found in devices)
    why = "torch is built for CPUs" if cpu_build else next((found.error for found in devices if found.error), "") or "torch finds no GPU"
    if not granted:
        return Finding(CHECK, SKIPPED, f"no rank sees a GPU ({why}) and the environment promises none; training would run on CPUs")
    what = f"no rank sees a GPU ({why}) although the environment promises some ({granted})"
    if cpu_build:
        return Finding(CHECK, WARN, f"{what}; training would run on CPUs", "install a CUDA build of torch (docs/install.md)")
    return Finding(CHECK, FAIL, what, "does nvidia-smi work on the nodes, and is the driver new enough for torch's CUDA?")


def _without(devices: Sequence[Devices], roster: Roster) -> list[Finding]:
    """Ranks that have no GPU of their number, or one that does not work."""
    found = []
    for node, ranks in roster.nodes.items():
        lacking = [rank for rank in ranks if not devices[rank].name and not devices[rank].error]
        if lacking:
            local = and_join([str(roster.members[rank].local_rank) for rank in lacking])
            what = f"{roster.name(lacking)} (LOCAL_RANK {local}): torch sees only {devices[lacking[0]].count} GPU(s)"
            fix = (
                "start as many ranks per node as it has GPUs, and let every task see all GPUs of its node "
                "(--gpus-per-node, not --gpus-per-task or --gpu-bind)"
            )
            found.append(Finding(CHECK, FAIL, what, fix, tuple(lacking), (node,)))
        for rank in (rank for rank in ranks if devices[rank].error):
            what = f"{roster.name([rank])}: the GPU cannot be used: {devices[rank].error}"
            found.append(Finding(CHECK, FAIL, what, f"look at nvidia-smi and dmesg (Xid) on {node}; drain the node", (rank,), (node,)))
    return found


def _shared(devices: Sequence[Devices], roster: Roster) -> list[Finding]:
    found = []
    for node, ranks in roster.nodes.items():
        by_uuid: dict[str, list[int]] = {}
        for rank in ranks:
            if devices[rank].uuid:
                by_uuid.setdefault(devices[rank].uuid, []).append(rank)
        for uuid, users in by_uuid.items():
            if len(users) > 1:
                what = f"{roster.name(users)} use the same GPU {uuid}"
                fix = "LOCAL_RANK must count the ranks of a node from 0; CUDA_VISIBLE_DEVICES must be the same for all of them"
                found.append(Finding(CHECK, FAIL, what, fix, tuple(users), (node,)))
    return found


def _unlike(devices: Sequence[Devices], roster: Roster) -> list[Finding]:
    """GPUs of another name or size of memory than most."""
    there = {rank: found for rank, found in enumerate(devices) if found.name}
    if not there:
        return []
    usual = Counter((found.name, found.memory) for found in there.values()).most_common(1)[0][0]
    unlike: dict[str, list[int]] = {}
    for rank, found in there.items():
        if found.name != usual[0] or abs(found.memory - usual[1]) > MEMORY_TOLERANCE * usual[1]:
            unlike.setdefault(f"{found.name} with {found.memory / GIB:.1f} GiB", []).append(rank)
    return [
        Finding(
            CHECK,
            WARN,
            f"{roster.name(ranks)}: {kind}, most have {usual[0]} with {usual[1] / GIB:.1f} GiB",
            "the slowest and smallest GPU sets the pace: ask for one type (--constraint or --gres=gpu:TYPE:N)",
            tuple(ranks),
            nodes_of(ranks, roster),
        )
        for kind, ranks in unlike.items()
    ]
