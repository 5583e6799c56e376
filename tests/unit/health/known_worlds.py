"""Worlds without processes: rosters, and what healthy ranks and GPUs answer."""

from __future__ import annotations

from typing import Any

from poet_megatron.health.affinity import Affinity
from poet_megatron.health.control import Outcome
from poet_megatron.health.devices import Devices
from poet_megatron.health.gpu_state import GpuState
from poet_megatron.health.report import Finding
from poet_megatron.health.roster import Member, Roster

GIB = 2**30


def world(**ranks_of: int) -> Roster:
    """world(a=2, b=1): ranks 0 and 1 on node a, rank 2 on node b."""
    places = [(node, local) for node, count in ranks_of.items() for local in range(count)]
    return Roster([Member(rank, len(places), local, node) for rank, (node, local) in enumerate(places)])


def gpu(rank: int, **changes: Any) -> Devices:
    return Devices(**{"built_for": "12.8", "count": 2, "name": "H100", "uuid": f"GPU-{rank}", "memory": 80 * GIB} | changes)


def state(**changes: Any) -> GpuState:
    healthy = {
        "sm_mhz": 1755.0,
        "max_sm_mhz": 1980.0,
        "reasons": 0x4,
        "power_w": 690.0,
        "power_limit_w": 700.0,
        "power_default_w": 700.0,
        "temperature_c": 61.0,
        "ecc_on": True,
        "uncorrectable": 0,
        "uncorrectable_ever": 0,
        "pending": False,
        "remap_failed": False,
    }
    return GpuState("a test", **healthy | changes)


def cpu(*cores: int, **changes: Any) -> Affinity:
    return Affinity(**{"cores": cores, "numa": (0,), "numa_nodes": 1, "threads": 1, "memory": 64 * GIB, "shared": 8 * GIB} | changes)


def values(*found: Any) -> list[Outcome]:
    return [Outcome(value) for value in found]


def only(findings: list[Finding], status: str) -> Finding:
    """The one finding of this status."""
    (found,) = [finding for finding in findings if finding.status == status]
    return found


def statuses(findings: list[Finding]) -> list[str]:
    return [finding.status for finding in findings]
