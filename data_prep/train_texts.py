"""Texts from which a vocabulary is learned: those of any sources that `tokenize` reads, bad records left out and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from data_prep.records import parse
from data_prep.sources import Source


def texts(sources: Sequence[Source], key: str, max_bytes: int, skipped: Counter[str]) -> Iterator[str]:
    """Usable texts in order; `skipped` counts the others by reason."""
    for source in sources:
        for block in source.open(key, max_bytes).blocks():
            found = parse(block, key, max_bytes)
            skipped.update(reason for _, reason in found.skipped)
            yield from found.texts
