"""Which nodes talk to which, in what order, and which pairs of them are slow."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from poet_megatron.health.report import OK, WARN, Finding
from poet_megatron.health.roster import Roster, and_join

CHECK = "node pairs"
ONE_AT_A_TIME = 8
"""Up to so many nodes a pair has the network for itself; beyond, disjoint pairs run at once."""
SLOW = 0.5
Pair = tuple[int, int]


def rounds(nodes: int) -> list[list[Pair]]:
    """Every pair of `nodes` nodes once: one pair per round up to 8 nodes, else a tournament of at most `nodes` rounds of disjoint pairs.

    The tournament is the circle method: one stays, the others move on by one seat per round, and those who face each other meet. With an
    odd number one of them faces an empty seat.
    """
    if nodes <= ONE_AT_A_TIME:
        return [[(first, second)] for second in range(nodes) for first in range(second)]
    seats = list(range(nodes + nodes % 2))
    found = []
    for _ in range(len(seats) - 1):
        facing = zip(seats[: len(seats) // 2], reversed(seats[len(seats) // 2 :]), strict=True)
        found.append([(min(pair), max(pair)) for pair in facing if max(pair) < nodes])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def judge(rates: Mapping[tuple[str, str], float], roster: Roster) -> list[Finding]:
    """Warn of pairs below half of the median, and of nodes none of whose pairs reaches half of the best.

    The second rule is for few nodes: of three, a slow one is in two of the three pairs, and the median is slow itself.

    Args:
        rates: bus bandwidth in GB/s by pair of nodes.
        roster: names the ranks of a node.
    """
    if not rates:
        return []
    median, best = statistics.median(rates.values()), max(rates.values())
    found = [_slow_node(node, best, rates, roster) for node in slow_nodes(rates)]
    named = {node for finding in found for node in finding.nodes}
    slow = [pair for pair, rate in sorted(rates.items(), key=lambda item: item[1]) if rate < SLOW * median and not named & set(pair)]
    found += [_slow_pair(pair, rates[pair], median, roster) for pair in slow]
    if found:
        return found
    spread = f"{min(rates.values()):.2f} to {best:.2f}, median {median:.2f}" if len(rates) > 1 else f"{best:.2f}"
    return [Finding(CHECK, OK, f"{len(rates)} pair{'s' if len(rates) > 1 else ''} of nodes: {spread} GB/s bus bandwidth")]


def slow_nodes(rates: Mapping[tuple[str, str], float]) -> list[str]:
    """Nodes whose best pair is below half of the best of all, if at least two others are not."""
    nodes = list(dict.fromkeys(node for pair in rates for node in pair))
    best_of = {node: max(rate for pair, rate in rates.items() if node in pair) for node in nodes}
    slow = [node for node in nodes if best_of[node] < SLOW * max(best_of.values())]
    return slow if len(nodes) - len(slow) >= 2 else []


def _slow_node(node: str, best: float, rates: Mapping[tuple[str, str], float], roster: Roster) -> Finding:
    own = [rate for pair, rate in rates.items() if node in pair]
    what = f"{node}: {max(own):.2f} GB/s at most with any other node, other nodes reach {best:.2f}"
    return Finding(CHECK, WARN, what, _fix([node]), roster.nodes[node], (node,))


def _slow_pair(pair: tuple[str, str], rate: float, median: float, roster: Roster) -> Finding:
    what = f"{pair[0]} and {pair[1]}: {rate:.2f} GB/s between them, the median of the pairs is {median:.2f}"
    return Finding(CHECK, WARN, what, _fix(pair), (*roster.nodes[pair[0]], *roster.nodes[pair[1]]), pair)


def _fix(nodes: Sequence[str]) -> str:
    return f"look at adapters and cables of {and_join(nodes)} (ibstat; NCCL_DEBUG=INFO names the interface), or leave them out (--exclude)"
