"""Texts from which a vocabulary is learned: those of any sources that `tokenize` reads, bad records left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from data_prep.records import parse
from data_prep.sources import Source


def texts(sources: Sequence[Source], key: str, max_bytes: int) -> Iterator[str]:
    """Usable texts in order."""
    for source in sources:
        for block in source.open(key, max_bytes).blocks():
            yield from parse(block, key, max_bytes).texts
