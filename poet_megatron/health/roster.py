"""Who takes part: what the launcher told this process, and which rank is on which node."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """What the launcher told this process; cli/ reads it from the environment.

    Attributes:
        rank: global rank.
        size: processes in all.
        local_rank: rank on its node, which is also the number of its GPU.
        node: name of the node.
        address: where rank 0 can be reached.
        port: TCP port of the key-value store there; 0 takes a free one, in a world of one.
        agent_store: the launcher (torchrun) already serves the store; otherwise rank 0 does.
        attempt: tells apart the starts that share one store.
        local_size: ranks per node, 0 if unknown.
        expected_nodes: nodes of the allocation, empty if unknown.
    """

    rank: int
    size: int
    local_rank: int
    node: str
    address: str = "127.0.0.1"
    port: int = 0
    agent_store: bool = False
    attempt: str = "0"
    local_size: int = 0
    expected_nodes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Member:
    """A rank that came, as it describes itself."""

    rank: int
    size: int
    local_rank: int
    node: str


class Roster:
    """All ranks, in order, and their nodes, in the order of their first ranks."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.nodes: dict[str, tuple[int, ...]] = {}
        for member in members:
            self.nodes[member.node] = (*self.nodes.get(member.node, ()), member.rank)

    @property
    def leaders(self) -> dict[str, int]:
        """The first rank of every node, which acts for its node."""
        return {node: ranks[0] for node, ranks in self.nodes.items()}

    def node_of(self, rank: int) -> str:
        """Name of the node that `rank` is on."""
        return self.members[rank].node

    def name(self, ranks: Iterable[int]) -> str:
        """For a reader: "rank 3 on node1", or "ranks 0-1 on node0 and 2-3 on node1"."""
        chosen = sorted(ranks)
        by_node = {node: [rank for rank in chosen if rank in there] for node, there in self.nodes.items()}
        parts = [f"{spans(found)} on {node}" for node, found in by_node.items() if found]
        return f"rank{'s' if len(chosen) > 1 else ''} {and_join(parts)}"


def spans(numbers: Iterable[int]) -> str:
    """Sorted numbers with runs shortened: "0-3,7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def and_join(words: Sequence[str]) -> str:
    """Words joined as in a sentence."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def expand_hostlist(text: str) -> tuple[str, ...]:
    """Names in a Slurm host list: "node[08-10,12],login" is node08, node09, node10, node12, login."""
    names: list[str] = []
    for part in re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text):
        names += _expand(part)
    return tuple(names)


def _expand(part: str) -> list[str]:
    found = re.match(r"([^\[]*)\[([^\]]*)\](.*)", part)
    if found is None:
        return [part]
    before, ranges, after = found.groups()
    numbers = [number for piece in ranges.split(",") for number in _range(piece)]
    return [before + number + rest for number in numbers for rest in _expand(after)]


def _range(piece: str) -> list[str]:
    first, _, last = piece.partition("-")
    if not last:
        return [first]
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
