"""What was found, as text to read and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from poet_megatron.health.roster import spans

OK, WARN, FAIL, SKIPPED = "ok", "warn", "FAIL", "skipped"
WIDTH = 132
MANY_NODES = 8
"""Up to this number nodes are listed by name in the first line."""
MANY_LINES = 6
"""Of one check and status; the others are counted, and in the JSON."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        status: OK, WARN, FAIL or SKIPPED.
        what: the fact, with the rank and the node that are to blame; for SKIPPED the reason.
        fix: what to do about it.
        ranks: ranks to blame.
        nodes: nodes to blame.
    """

    check: str
    status: str
    what: str
    fix: str = ""
    ranks: tuple[int, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass
class Report:
    """Everything that rank 0 knows at the end.

    Attributes:
        world_size: processes in all.
        nodes: ranks by node, of those that came.
        backend: of the collectives, "" if none were tried.
        findings: in the order of the checks.
        measured: figures by check, for scripts.
        seconds: how long it took.
    """

    world_size: int
    nodes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    backend: str = ""
    findings: list[Finding] = field(default_factory=list)
    measured: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def exit_status(self) -> int:
        """0 without a FAIL, else 1."""
        return int(any(finding.status == FAIL for finding in self.findings))

    def add(self, *findings: Finding) -> None:
        """Add lines."""
        self.findings.extend(findings)


def to_json(report: Report) -> str:
    """One JSON object; `ok` is whether the exit status is 0."""
    return json.dumps({"ok": not report.exit_status, **asdict(report)}, indent=2)


def to_text(report: Report) -> str:
    """One line per finding, what to do about it below, and the sum at the end."""
    width = max((len(finding.check) for finding in report.findings), default=0)
    lines = [*_wrap(_world(report), "", "  "), ""]
    for finding in _shortened(report.findings):
        start = f"{finding.status:<8} {finding.check:<{width}}  "
        lines += _wrap(finding.what, start, " " * len(start))
        if finding.fix:
            lines += _wrap(finding.fix, " " * len(start) + "-> ", " " * (len(start) + 3))
    return "\n".join([*lines, "", _sum(report)])


def _shortened(findings: Sequence[Finding]) -> list[Finding]:
    """The first lines of every check and status; of the rest one that says which ranks they are about."""
    seen: Counter[tuple[str, str]] = Counter()
    shown = []
    for finding in findings:
        kind = (finding.check, finding.status)
        seen[kind] += 1
        if seen[kind] <= MANY_LINES:
            shown.append(finding)
        elif seen[kind] == MANY_LINES + 1:
            rest = [other for other in findings if (other.check, other.status) == kind][MANY_LINES:]
            ranks = spans(rank for other in rest for rank in other.ranks)
            shown.append(Finding(*kind, f"{len(rest)} more lines like these, about ranks {ranks or '?'} (--json has all)"))
    return shown


def _world(report: Report) -> str:
    came = sum(map(len, report.nodes.values()))
    names = "; ".join(f"{node}: {spans(ranks)}" for node, ranks in list(report.nodes.items())[:MANY_NODES])
    more = f"; and {len(report.nodes) - MANY_NODES} more" if len(report.nodes) > MANY_NODES else ""
    ranks = f"{report.world_size} rank{'s' if report.world_size > 1 else ''}" + (f", {came} came," if came < report.world_size else "")
    backend = f", {report.backend}" if report.backend else ""
    return f"{ranks} on {len(report.nodes)} node{'s' if len(report.nodes) > 1 else ''} ({names}{more}){backend}, {report.seconds:.0f} s"


def _sum(report: Report) -> str:
    counts = Counter(finding.status for finding in report.findings)
    verdict = "nothing speaks against training"
    if report.exit_status:
        verdict = "do not train on this allocation before the FAIL lines are mended"
    elif counts[WARN]:
        verdict = "training can run; the warn lines say what may be slow or fragile"
    return f"{counts[FAIL]} FAIL, {counts[WARN]} warn, {counts[OK]} ok, {counts[SKIPPED]} skipped: {verdict} (docs/health.md)"


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False)
