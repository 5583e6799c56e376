"""Blocks: consecutive records of one source, cut at record boundaries without parsing them, in bounded memory.

Cutting is all that has to happen in order and in one process; parsing, checking and encoding a block can then happen anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

BLOCK_BYTES = 1 << 20
"""Text that travels to a worker at once; a longer record is a block of its own."""
BLOCK_RECORDS = 4096


class DamagedInput(Exception):
    """The rest of a source cannot be read; `args[0]` is the reason that the manifest gives."""


@dataclass(frozen=True)
class Block:
    """Records `first` to `first + count - 1` of a source (numbered from 1): JSON lines, or texts, or one that is lost."""

    first: int
    count: int
    position: int
    """Bytes of the source read so far, for progress."""
    lines: bytes | None = None
    """Whole lines of JSON."""
    texts: tuple[bytes | None, ...] = ()
    """UTF-8 texts; None stands for a record without one."""
    lost: str = ""
    """Why the record of this block cannot be had."""

    @property
    def size(self) -> int:
        """Bytes of its records."""
        return len(self.lines) if self.lines is not None else sum(len(text) for text in self.texts if text)


def too_long(max_bytes: int) -> str:
    """The reason for leaving out a record of more than `max_bytes`."""
    return f"longer than {max_bytes} bytes"


class LineCutter:
    """Cuts a stream of bytes into blocks of whole lines; holds at most a block and one line of up to `max_bytes`."""

    def __init__(self, max_bytes: int, position: Callable[[], int], block_bytes: int = BLOCK_BYTES):
        self.max_bytes, self.block_bytes, self._position = max_bytes, block_bytes, position
        self._next = 1
        self._lines: list[bytes] = []
        self._lines_size = 0
        self._partial: list[bytes] = []
        self._partial_size = 0
        self._dropping = False

    def feed(self, chunk: bytes) -> Iterator[Block]:
        """Blocks that are complete with the next bytes of the stream."""
        for start in range(0, len(chunk), self.block_bytes):
            yield from self._feed(chunk[start : start + self.block_bytes])

    def finish(self, damage: str = "") -> Iterator[Block]:
        """The last blocks; after `damage` the line that it cut is one lost record."""
        if damage:
            yield from self._flush()
            yield self._lost(damage)
        elif self._partial:
            self._take([*self._partial, b"\n"], self._partial_size + 1)
            yield from self._flush()
        else:
            yield from self._flush()
        if self._next == 1:
            yield self._lost("no records in the file")

    def _feed(self, piece: bytes) -> Iterator[Block]:
        if self._dropping:
            end = piece.find(b"\n")
            if end < 0:
                return
            piece, self._dropping = piece[end + 1 :], False
        end = piece.rfind(b"\n") + 1
        if end:
            self._take([*self._partial, piece[:end]], self._partial_size + end)
            self._partial, self._partial_size = [], 0
            if self._lines_size >= self.block_bytes:
                yield from self._flush()
        if end < len(piece):
            self._partial.append(piece[end:])
            self._partial_size += len(piece) - end
        if self._partial_size > self.max_bytes:
            yield from self._flush()
            yield self._lost(too_long(self.max_bytes))
            self._partial, self._partial_size, self._dropping = [], 0, True

    def _take(self, pieces: list[bytes], size: int) -> None:
        self._lines += pieces
        self._lines_size += size

    def _flush(self) -> Iterator[Block]:
        if self._lines:
            lines = b"".join(self._lines)
            self._lines, self._lines_size = [], 0
            count = lines.count(b"\n")
            yield Block(self._advance(count), count, self._position(), lines=lines)

    def _lost(self, reason: str) -> Block:
        return Block(self._advance(1), 1, self._position(), lost=reason)

    def _advance(self, count: int) -> int:
        first, self._next = self._next, self._next + count
        return first


def line_blocks(chunks: Iterable[bytes], max_bytes: int, position: Callable[[], int]) -> Iterator[Block]:
    """Blocks of a stream of bytes; a `DamagedInput` of the stream becomes a lost record at its end."""
    cutter = LineCutter(max_bytes, position)
    damage = ""
    try:
        for chunk in chunks:
            yield from cutter.feed(chunk)
    except DamagedInput as error:
        damage = str(error)
    yield from cutter.finish(damage)


def text_blocks(texts: Iterable[tuple[bytes | None, int]]) -> Iterator[Block]:
    """Blocks of texts, each with the position of its source after it; `DamagedInput` becomes a lost record at the end."""
    batch: list[bytes | None] = []
    first, size, place, damage = 1, 0, 0, ""
    try:
        for text, place in texts:
            length = len(text or b"")
            if batch and (size + length > BLOCK_BYTES or len(batch) == BLOCK_RECORDS):
                yield Block(first, len(batch), place, texts=tuple(batch))
                first, batch, size = first + len(batch), [], 0
            batch.append(text)
            size += length
    except DamagedInput as error:
        damage = str(error)
    if batch:
        yield Block(first, len(batch), place, texts=tuple(batch))
        first += len(batch)
    if damage or first == 1:
        yield Block(first, 1, place, lost=damage or "no records in the file")
