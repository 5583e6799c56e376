"""Lengths of documents: a histogram in steps of half an octave that adds up over parts, its quantiles, and a picture of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

STEPS_PER_OCTAVE = 2
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 720, 320, 60, 46, 34
QUANTILES = (0.1, 0.5, 0.9, 0.99)


def lower_edge(number: int) -> int:
    """Smallest length of bin `number`."""
    return int(np.ceil(2 ** (number / STEPS_PER_OCTAVE)))


class Lengths:
    """Counts of documents by length in tokens."""

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.total = 0
        self.longest = 0
        self.shortest = 0

    def add(self, lengths: npt.NDArray[np.int32]) -> None:
        """Count documents of these lengths (each at least 1)."""
        if not len(lengths):
            return
        edges = np.array([lower_edge(number) for number in range(64)])
        self._add_counts(np.bincount(np.searchsorted(edges, lengths, side="right") - 1))
        self._add_range(int(lengths.min()), int(lengths.max()), int(lengths.sum(dtype=np.int64)))

    def add_dict(self, content: Mapping[str, Any]) -> None:
        """Add what `as_dict` of another one gave."""
        if content["counts"]:
            self._add_counts(np.asarray(content["counts"], np.int64))
            self._add_range(content["shortest"], content["longest"], content["total"])

    def as_dict(self) -> dict[str, Any]:
        """For a manifest: `counts[i]` documents have `edges[i]` to `edges[i + 1] - 1` tokens."""
        documents = int(self.counts.sum())
        return {
            "total": self.total,
            "shortest": self.shortest,
            "longest": self.longest,
            "mean": round(self.total / documents, 2) if documents else 0.0,
            "quantiles": {str(share): self.quantile(share) for share in QUANTILES},
            "edges": [lower_edge(number) for number in range(len(self.counts) + 1)],
            "counts": self.counts.tolist(),
        }

    def quantile(self, share: float) -> int:
        """Lower edge of the bin in which the document at this rank lies."""
        if not len(self.counts):
            return 0
        return lower_edge(int(np.searchsorted(np.cumsum(self.counts), share * self.counts.sum())))

    def _add_counts(self, counts: npt.NDArray[np.int64]) -> None:
        size = max(len(self.counts), len(counts))
        self.counts = np.pad(self.counts, (0, size - len(self.counts))) + np.pad(counts, (0, size - len(counts)))

    def _add_range(self, shortest: int, longest: int, total: int) -> None:
        self.shortest = min(self.shortest, shortest) if self.shortest else shortest
        self.longest = max(self.longest, longest)
        self.total += total


def histogram_svg(lengths: Lengths) -> str:
    """A picture of the histogram."""
    counts = lengths.counts.tolist()
    documents = sum(counts)
    title = f"{documents:,} documents, {lengths.total:,} tokens; median about {lengths.quantile(0.5):,}, longest {lengths.longest:,}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="20">{title}</text>',
        *_bars(counts),
        f'<text x="{(WIDTH + LEFT) // 2}" y="{HEIGHT - 6}" text-anchor="middle">tokens in a document</text>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _bars(counts: Sequence[int]) -> list[str]:
    first = next((number for number, count in enumerate(counts) if count), 0)
    shown = counts[first:]
    if not shown:
        return []
    base, room = HEIGHT - BOTTOM, HEIGHT - BOTTOM - TOP
    step = (WIDTH - LEFT - 12) / len(shown)
    parts = [f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{max(shown):,}</text>']
    for number, count in enumerate(shown):
        height = room * count / max(shown)
        left = LEFT + number * step
        tip = f"<title>{lower_edge(first + number):,} to {lower_edge(first + number + 1) - 1:,}: {count:,}</title>"
        parts.append(
            f'<rect x="{left:.1f}" y="{base - height:.1f}" width="{step * 0.9:.1f}" height="{height:.1f}" fill="#4472a8">{tip}</rect>'
        )
        if (first + number) % STEPS_PER_OCTAVE == 0:
            parts.append(f'<text x="{left:.1f}" y="{base + 16}">{lower_edge(first + number):,}</text>')
    return [*parts, f'<line x1="{LEFT}" y1="{base}" x2="{WIDTH - 12}" y2="{base}" stroke="black"/>']
