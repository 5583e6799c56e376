"""Errors of a step as findings: the same error on many ranks is one line."""

from __future__ import annotations

from collections.abc import Sequence

from poet_megatron.health.control import Outcome
from poet_megatron.health.report import FAIL, Finding
from poet_megatron.health.roster import Roster


def errors(check: str, what: str, outcomes: Sequence[Outcome], roster: Roster, fix: str) -> list[Finding]:
    """One FAIL per different error, those that say more than "did not finish" first.

    Args:
        check: name of the check.
        what: what was being done, the beginning of the line.
        outcomes: by rank.
        roster: names the ranks.
        fix: what to do.
    """
    by_error: dict[tuple[bool, str], list[int]] = {}
    for rank, outcome in enumerate(outcomes):
        if outcome.error:
            by_error.setdefault((outcome.stuck, outcome.error), []).append(rank)
    return [
        Finding(check, FAIL, f"{what}: {error} on {roster.name(ranks)}", fix, tuple(ranks), nodes_of(ranks, roster))
        for (_, error), ranks in sorted(by_error.items())
    ]


def nodes_of(ranks: Sequence[int], roster: Roster) -> tuple[str, ...]:
    """Nodes of these ranks, each once, in order."""
    return tuple(dict.fromkeys(roster.node_of(rank) for rank in ranks))
