"""The picture of several runs: training losses, smoothed over what was logged, validation points, and a legend of what differs.

matplotlib is used without pyplot, so that no display and no global state are needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from poet_megatron.monitor.compare import Point, Run, differing_settings, ranked, short_names
from poet_megatron.monitor.compare_table import MISSING, loss_text, value_text

Style = Literal["-", "--"]
Look = tuple[str, Style]
FORMATS = ("svg", "png")
NAMED = 20
"""Runs that get a colour and a line of the legend; further ones are grey: more could not be told apart."""
MOST_KEYS = 6
"""Settings that fit beside the picture; runs that differ in more are called by their names."""
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#a6761d", "#7570b3", "#000000", "#e6ab02", "#e7298a")
STYLES: tuple[Style, ...] = ("-", "--")
GREY = "#b0b0b0"
SMOOTHED_PART = 0.04
"""Share of a run's points in the window of the moving mean."""
DRAWN_POINTS = 1000
"""Points drawn of a moving mean: as many as a picture has columns."""
EARLY_PART, HIGH_PART = 0.1, 0.1
"""Share of the steps, at the start, and of the losses after it, the highest, that may leave the picture: what matters is at the bottom."""
CIRCLE: Any = {"markerfacecolor": "white", "markersize": 4.5, "markeredgewidth": 1.2, "zorder": 3}
SETTINGS_OF_FILES: Any = {"svg.hashsalt": "poet-megatron", "svg.fonttype": "path", "path.simplify": True}


def draw(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write compare.svg and compare.png into `folder`; nothing, and an empty list, if no run has a finite loss to draw."""
    drawn = [run for run in ranked(runs) if any(math.isfinite(point.loss) for point in (*run.train, *run.valid))]
    if not drawn:
        return []
    paths = [folder / f"compare.{kind}" for kind in FORMATS]
    with matplotlib.rc_context(SETTINGS_OF_FILES):
        figure = make_figure(drawn)
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else None  # the same runs give the same file
            figure.savefig(path, dpi=150, bbox_inches="tight", metadata=metadata)
    return paths


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean over a window of 4 % of the points around each one, of those that are finite; nan where the loss itself is not."""
    half = max(1, round(SMOOTHED_PART * len(losses))) // 2
    finite = np.isfinite(losses)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, losses, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(len(losses))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(losses))
    means = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, means, np.nan)


def loss_range(runs: Sequence[Run]) -> tuple[float, float]:
    """Losses to show: everything but the first tenth of the steps and the highest tenth of what follows, but most last validations."""
    early = EARLY_PART * max(run.steps_done for run in runs)
    curves = [(_steps(points), smoothed(_losses(points))) for run in runs for points in (run.train, run.valid)]
    late = np.concatenate([losses[steps >= early] for steps, losses in curves])
    everything = np.concatenate([losses for _, losses in curves])
    values = late[np.isfinite(late)] if np.isfinite(late).any() else everything[np.isfinite(everything)]
    finals = [run.final.loss for run in runs if run.final and math.isfinite(run.final.loss)]
    low, high = float(values.min()), float(np.quantile(values, 1 - HIGH_PART))
    high = max(high, float(np.median(finals))) if finals else high
    margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-3)
    return low - margin, high + margin


def make_figure(runs: Sequence[Run]) -> Figure:
    """The picture of runs that each have something to draw, best first."""
    named = runs[:NAMED]
    raw = len(named) <= len(COLORS)
    figure = Figure(figsize=(9.0, 5.5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run in runs[NAMED:]:
        axes.plot(_steps(run.train), smoothed(_losses(run.train)), color=GREY, linewidth=0.8, rasterized=True)
    looks = [(color, style) for style, color in itertools.islice(itertools.product(STYLES, COLORS), len(named))]
    for run, look in reversed(list(zip(named, looks, strict=True))):  # the best one on top
        _curve(axes, run, look, raw=raw)
    axes.set_ylim(*loss_range(runs))
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    lines = "thin: training loss as logged    thick: its moving mean" if raw else "lines: moving mean of the training loss"
    axes.set_title(f"{lines}    circles: validation", fontsize=9, color="#555555")
    axes.grid(True, color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    _legend(axes, named, looks, len(runs) - len(named))
    return figure


def _curve(axes: Axes, run: Run, look: Look, raw: bool) -> None:
    (color, style), steps, losses = look, _steps(run.train), _losses(run.train)
    if raw:  # in the SVG an image, whatever the number of points
        axes.plot(steps, losses, color=color, linewidth=0.6, alpha=0.25, rasterized=True)
    drawn = np.unique(np.linspace(0, len(losses) - 1, min(len(losses), DRAWN_POINTS)).astype(int))
    mark = "." if np.isfinite(losses).sum() == 1 else None
    axes.plot(steps[drawn], smoothed(losses)[drawn], color=color, linestyle=style, linewidth=1.6, marker=mark)
    axes.plot(_steps(run.valid), _losses(run.valid), "o", color=color, **CIRCLE)


def _legend(axes: Axes, runs: Sequence[Run], looks: Sequence[Look], others: int) -> None:
    """A table beside the picture: what differs, in columns under a header, and the last validation loss."""
    labels = legend_rows(runs)
    handles = [Line2D([], [], linestyle="none")]
    handles += [Line2D([], [], color=color, linestyle=style, linewidth=1.8) for color, style in looks]
    if others:
        handles.append(Line2D([], [], color=GREY, linewidth=0.8))
        labels.append(f" {others} more: see the table")
    legend = axes.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, handlelength=2.6, borderaxespad=0.0)
    for text in legend.get_texts():
        text.set(family="DejaVu Sans Mono", fontsize=9.0, parse_math=False)  # names may hold a dollar sign


def legend_rows(runs: Sequence[Run]) -> list[str]:
    """Header and one aligned row per run: what tells it from the others, and its last validation loss."""
    keys = differing_settings(runs)
    settings = [[value_text(run, key) for key in keys] for run in runs]
    header = list(short_names(keys).values())
    if not keys or len(keys) > MOST_KEYS:
        header, settings = ["run"], [[run.name] for run in runs]
    elif len({tuple(values) for values in settings}) < len(runs):  # the same settings twice
        header, settings = ["run", *header], [[run.name, *values] for run, values in zip(runs, settings, strict=True)]
    losses = [loss_text(run.final.loss) if run.final else MISSING for run in runs]
    rows = [[*header, "valid"], *([*values, loss] for values, loss in zip(settings, losses, strict=True))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [" " + "  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _steps(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.step for point in points], dtype=float)


def _losses(points: Sequence[Point]) -> np.ndarray:
    return np.array([point.loss for point in points], dtype=float)
