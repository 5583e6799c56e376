"""How far the nodes' clocks are apart, from round trips over the key-value store."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from poet_megatron.health.control import Outcome
from poet_megatron.health.outcomes import errors
from poet_megatron.health.report import OK, SKIPPED, WARN, Finding
from poet_megatron.health.roster import Roster

CHECK = "time"
ROUNDS = 8
BOUND_SECONDS = 1.0
PAUSE = 0.0005
Clock = Callable[[], float]


def measure(store: dist.Store, rank: int, leaders: Sequence[int], seconds: float, clock: Clock = time.time) -> list[float] | None:
    """Rank 0 answers, the leaders of the other nodes ask.

    With t1 when the question leaves, t2 on rank 0's clock and t3 when the answer is there, rank 0 is ahead by t2 - (t1 + t3)/2, and the
    error of that is at most (t3 - t1)/2, however the way there and back share the time. The shortest of a few round trips counts.

    Args:
        store: the key-value store.
        rank: of this process.
        leaders: the first rank of every node, rank 0 first.
        seconds: time limit.
        clock: of this node.

    Returns:
        This node's clock minus rank 0's and the bound on its error, in seconds; None on ranks that do not take part.
    """
    deadline = time.monotonic() + seconds
    others = [leader for leader in leaders if leader != leaders[0]]
    if rank == leaders[0]:
        for number in range(ROUNDS):
            _answer(store, number, others, deadline, clock)
        return [0.0, 0.0]
    if rank not in others:
        return None
    trips = []
    for number in range(ROUNDS):
        key = f"time/{rank}/{number}"
        start = clock()
        store.set(key, "")
        _await(store, f"{key}/answer", deadline)
        end = clock()
        trips.append((end - start, (start + end) / 2 - float(store.get(f"{key}/answer"))))
    shortest = min(trips)
    return [shortest[1], shortest[0] / 2]


def _answer(store: dist.Store, number: int, others: Sequence[int], deadline: float, clock: Clock) -> None:
    for other in others:
        key = f"time/{other}/{number}"
        _await(store, key, deadline)
        store.set(f"{key}/answer", repr(clock()))


def _await(store: dist.Store, key: str, deadline: float) -> None:
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise TimeoutError("no answer over the key-value store")
        time.sleep(PAUSE)


def judge(outcomes: Sequence[Outcome], roster: Roster) -> list[Finding]:
    """Warn of clocks that are more than a second apart, uncertainty included."""
    if len(roster.nodes) == 1:
        return [Finding(CHECK, SKIPPED, "one node, one clock")]
    found = errors(CHECK, "asking for the time", outcomes, roster, "is the network between these nodes up?")
    answers = {node: outcomes[rank].value for node, rank in roster.leaders.items() if outcomes[rank].value}
    for node, (offset, uncertainty) in answers.items():
        reference = _reference({other: answer[0] for other, answer in answers.items()})
        apart = offset - answers[reference][0]
        if abs(apart) - uncertainty > BOUND_SECONDS:
            what = f"the clock of {node} is {abs(apart):.1f} s {'ahead of' if apart > 0 else 'behind'} that of {reference}"
            what += f" (give or take {uncertainty:.3f} s)"
            fix = f"have time synchronization (chrony, ntpd) mended on {node}: logs, file times and job credentials rely on it"
            found.append(Finding(CHECK, WARN, what, fix, roster.nodes[node], (node,)))
        elif uncertainty > BOUND_SECONDS:
            what = f"{node}: round trips over the key-value store take {2 * uncertainty:.1f} s, too long to compare clocks"
            found.append(Finding(CHECK, WARN, what, "is the network of these nodes busy or broken?", roster.nodes[node], (node,)))
    if found:
        return found
    widest = max(answers.values(), key=lambda pair: abs(pair[0]))
    first = next(iter(answers))
    return [Finding(CHECK, OK, f"clocks are within {abs(widest[0]):.4f} s of that of {first} (give or take {widest[1]:.4f} s)")]


def _reference(offsets: dict[str, float]) -> str:
    """The node that others are compared with: the first of two, the median of more, so that a wrong clock on the first node is its own."""
    if len(offsets) < 3:
        return next(iter(offsets))
    middle = statistics.median_low(offsets.values())
    return next(node for node, offset in offsets.items() if offset == middle)
