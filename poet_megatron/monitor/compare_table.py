"""The comparison of several runs as a table of text, and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from poet_megatron.monitor.compare import Point, Run, best_run, differing_settings, ranked, remarks, short_names
from poet_megatron.monitor.console import format_rate

BEST_MARK = "*"
MISSING = "-"
LONGEST_VALUE = 32
LARGEST_PLAIN_PPL = 1e5


def to_text(runs: Sequence[Run]) -> str:
    """One line per run, best first: its name, the settings that differ, and what it reached."""
    keys = differing_settings(runs)
    names = short_names(keys)
    header = ["", "run", *names.values(), "done", "valid loss", "valid ppl", "best loss", "best ppl", "train loss", "tok/s", "mem GiB"]
    best = best_run(runs)
    rows = [_row(run, keys, run is best) for run in ranked(runs)]
    text = _aligned([[*header, "state"], *rows], left=(0, 1, len(header)))
    lines = [line.rstrip() for line in text]
    if best is not None:
        lines.append(f"{BEST_MARK} lowest validation loss at the end of a run")
    if not keys and len(runs) > 1:
        lines.append("the runs have the same settings")
    return "\n".join(lines)


def to_data(runs: Sequence[Run]) -> dict[str, Any]:
    """The same as plain data for JSON; what is missing or not finite is None."""
    keys, best = differing_settings(runs), best_run(runs)
    return {
        "best": None if best is None else best.name,
        "settings": keys,
        "runs": [_data(run, keys) for run in ranked(runs)],
        "remarks": remarks(runs),
    }


def value_text(run: Run, key: str) -> str:
    """A setting of a run as its YAML would have it; `-` where it has no meaning for the run, `?` where it is not known."""
    if not run.settings:
        return "?"
    text = _plain(run.settings.get(key, MISSING))
    return text if len(text) <= LONGEST_VALUE else f"...{text[3 - LONGEST_VALUE :]}"


def loss_text(loss: float) -> str:
    """Four decimals; `nan` if it is not finite."""
    return f"{loss:.4f}" if math.isfinite(loss) else "nan"


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) or "''"


def _row(run: Run, keys: Sequence[str], is_best: bool) -> list[str]:
    total = "?" if run.steps_total is None else run.steps_total
    return [
        BEST_MARK if is_best else "",
        run.name,
        *(value_text(run, key) for key in keys),
        f"{run.steps_done}/{total}",
        *_loss_columns(run.final),
        *_loss_columns(run.best),
        loss_text(run.last_train_loss) if run.train else MISSING,
        format_rate(run.tokens_per_s).strip() if math.isfinite(run.tokens_per_s) else MISSING,
        f"{run.peak_gib:.2f}" if math.isfinite(run.peak_gib) else MISSING,
        run.state,
    ]


def _loss_columns(point: Point | None) -> list[str]:
    if point is None:
        return [MISSING, MISSING]
    ppl = perplexity(point.loss)
    return [loss_text(point.loss), f"{ppl:.2f}" if ppl < LARGEST_PLAIN_PPL else f"{ppl:.2e}"]


def perplexity(loss: float) -> float:
    """exp(loss), inf where that is too large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = list(enumerate(widths))
    return ["  ".join(f"{row[i]:<{width}}" if i in left else f"{row[i]:>{width}}" for i, width in columns) for row in rows]


def _data(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    return {
        "run": run.name,
        "path": str(run.path),
        "state": run.state,
        "settings": {key: run.settings.get(key) for key in keys},
        "steps_done": run.steps_done,
        "steps_total": run.steps_total,
        "final": _point_data(run.final),
        "best": _point_data(run.best),
        "train_loss": _finite(run.last_train_loss),
        "tokens_per_s": _finite(run.tokens_per_s),
        "peak_gib": _finite(run.peak_gib),
    }


def _point_data(point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    return {"step": point.step, "loss": _finite(point.loss), "ppl": _finite(perplexity(point.loss))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
