"""All-reduces whose result is known in closed form, exactly, in every dtype of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poet_megatron.health.control import Outcome
from poet_megatron.health.outcomes import nodes_of
from poet_megatron.health.report import FAIL, Finding
from poet_megatron.health.roster import Roster

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIZES = (1, 7, 1023, 65_537, 1_000_003)
"""Elements: odd ones, so that no size is a multiple of the ranks, of a vector or of a chunk; the last ones take other algorithms."""
LARGER_ON_GPU = (33_554_433,)
SHORT = (65_537,)
CONTRIBUTING, VALUES = 64, 251
"""Bounds that keep every sum at most 251, so that bf16, whose integers are exact up to 256, adds without rounding in any order."""
SHARED, OWNED = "shared", "owned"


def contribution(pattern: str, rank: int, ranks: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `rank` of `ranks` puts in.

    "shared": up to 64 ranks contribute 1, 2 or 3 to each element, all equally. "owned": element i belongs to rank i % ranks alone, so that
    a wrong sum tells whose contribution was damaged.
    """
    index = torch.arange(size, device=device)
    if pattern == SHARED:
        return torch.where((index + rank) % ranks < CONTRIBUTING, 1 + index % 3, 0).to(dtype)
    return torch.where(index % ranks == rank, 1 + index % VALUES, 0).to(dtype)


def expected(pattern: str, ranks: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The sum of all contributions."""
    index = torch.arange(size, device=device)
    return (min(ranks, CONTRIBUTING) * (1 + index % 3) if pattern == SHARED else 1 + index % VALUES).to(dtype)


def check_sums(
    members: Sequence[int], rank: int, group: dist.ProcessGroup | None, device: torch.device, sizes: Sequence[int]
) -> list[dict[str, Any]]:
    """All-reduce both patterns in every dtype and size; what came out wrong on this rank, as plain data.

    Args:
        members: global ranks of the group, in order.
        rank: global rank of this process.
        group: the process group; None for all ranks.
        device: of the tensors.
        sizes: numbers of elements.
    """
    wrong = []
    place, ranks = members.index(rank), len(members)
    for dtype in DTYPES:
        for size in sizes:
            for pattern in (SHARED, OWNED):
                found = contribution(pattern, place, ranks, size, dtype, device)
                dist.all_reduce(found, group=group)
                fault = _fault(pattern, found, expected(pattern, ranks, size, dtype, device), members)
                if fault:
                    wrong.append({"dtype": str(dtype).removeprefix("torch."), "size": size, "pattern": pattern, **fault})
    return wrong


def _fault(pattern: str, found: Tensor, right: Tensor, members: Sequence[int]) -> dict[str, Any]:
    places = (found != right).nonzero().flatten()  # NaN differs from everything
    if not len(places):
        return {}
    first = int(places[0])
    owners = sorted({members[place] for place in (places % len(members)).unique().tolist()}) if pattern == OWNED else []
    return {"wrong": len(places), "first": first, "found": float(found[first]), "right": float(right[first]), "owners": owners}


def judge(check: str, where: str, wrong: dict[int, list[dict[str, Any]]], roster: Roster) -> list[Finding]:
    """One FAIL for a group whose sums are wrong: an example, who saw it, and whose contributions were damaged if that is a part of them.

    Args:
        check: name of the check.
        where: which group.
        wrong: what `check_sums` returned, by rank.
        roster: names the ranks.
    """
    seen = {rank: faults for rank, faults in wrong.items() if faults}
    if not seen:
        return []
    rank, example = next((rank, faults[0]) for rank, faults in seen.items())
    blamed = _damaged(seen, list(wrong))
    source = f"; the contribution of {roster.name(blamed)} is damaged" if blamed else ""
    everyone = len(seen) == len(wrong)
    to_blame = blamed or ([] if everyone else sorted(seen))
    what = (
        f"wrong sum {where}: {example['dtype']}, {example['size']} elements: element {example['first']} is {example['found']:g} instead of "
        f"{example['right']:g} ({example['wrong']} wrong); seen by {'all its ranks' if everyone else roster.name(seen)}{source}"
    )
    fix = "results of training would be wrong: leave these nodes out (sbatch --exclude) and have GPU, NVLink and network adapter tested"
    return [Finding(check, FAIL, what, fix, tuple(to_blame or sorted(seen)), nodes_of(to_blame or sorted(seen), roster))]


def _damaged(seen: dict[int, list[dict[str, Any]]], members: Sequence[int]) -> list[int]:
    """Owners of wrong elements; none if that is everybody, which tells nothing."""
    owners = sorted({owner for faults in seen.values() for fault in faults for owner in fault["owners"]})
    return owners if len(owners) < len(members) else []


def outcomes_by_rank(outcomes: Sequence[Outcome], ranks: Sequence[int], key: str) -> dict[int, Any]:
    """{rank: value[key]} of those ranks that have a value."""
    return {rank: outcomes[rank].value[key] for rank in ranks if outcomes[rank].value}


def describe(ranks: int) -> str:
    """What was checked, for a reader."""
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return f"all-reduces over {ranks} rank{'s' if ranks > 1 else ''} are exact: {dtypes}, 1 to {max(SIZES):,} elements"
