"""Sources: what becomes one part each. Files by their ending; shards of a Hugging Face dataset are in `data_prep.hub`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.blocks import Block, DamagedInput, line_blocks, text_blocks, too_long
from data_prep.corpus import BYTE_ORDER_MARK, JSON_SUFFIXES, TEXT_SUFFIXES, expand
from data_prep.streams import HashedFile, chunks, unreadable, zstd_library
from poet_megatron.errors import UserError

ZSTD_SUFFIXES = (".jsonl.zst", ".json.zst", ".txt.zst")
PARQUET_SUFFIX = ".parquet"
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, *ZSTD_SUFFIXES, PARQUET_SUFFIX)
PARQUET_ROWS = 512


@dataclass(frozen=True)
class Identity:
    """What was read: bytes and SHA-256 of a file, or of the texts of a dataset's shard."""

    bytes: int
    sha256: str


class Reader(Protocol):
    """One pass over a source."""

    def blocks(self) -> Iterator[Block]:
        """Its records in order."""

    def identity(self) -> Identity:
        """Size and hash; only after all blocks."""


class Source(Protocol):
    """Something that becomes a part."""

    @property
    def name(self) -> str:
        """Path or address."""

    @property
    def bytes(self) -> int:
        """Size as stored; 0 if that is not known before reading."""

    def open(self, key: str, max_bytes: int) -> Reader:
        """A pass over it; texts are in field or column `key`, longer ones than `max_bytes` are not kept."""


@dataclass(frozen=True)
class FileSource:
    """A file on this machine."""

    path: Path
    bytes: int

    @property
    def name(self) -> str:
        """Its absolute path."""
        return str(self.path)

    def open(self, key: str, max_bytes: int) -> Reader:
        """A pass over the file."""
        if self.path.name.endswith(PARQUET_SUFFIX):
            return _ParquetReader(self, key)
        return _FileReader(self, max_bytes)


class _Watch:
    """Whether a file stays as it is while it is read."""

    def __init__(self, source: FileSource):
        self._source = source
        self._before = self._facts()

    def check(self) -> None:
        """The part would be neither the file that was there nor the one that is there now."""
        if (now := self._facts()) != self._before or now[0] != self._source.bytes:
            raise UserError(
                f"{self._source.path} changed while it was read ({self._source.bytes} bytes, now {now[0]}): nothing of it is kept; "
                "run the same command again when nothing writes to it, with another --output if its size is not the same"
            )

    def _facts(self) -> tuple[int, int]:
        try:
            status = self._source.path.stat()
        except OSError as error:
            raise unreadable(self._source.path, error) from error
        return status.st_size, status.st_mtime_ns


def find_files(patterns: Sequence[str]) -> list[FileSource]:
    """Files of paths and globs; one that cannot be read, or whose reader is not installed, is a UserError before any work begins."""
    sources = []
    for path in expand(patterns, SUFFIXES):
        try:
            with path.open("rb"):
                sources.append(FileSource(path, path.stat().st_size))
        except OSError as error:
            raise UserError(f"input {path} cannot be read ({error.strerror}): check its permissions") from error
        if path.suffix == ".zst":
            zstd_library()
        elif path.suffix == PARQUET_SUFFIX:
            parquet_library()
    return sources


class _FileReader:
    """Lines of JSON, or a text file as one record."""

    def __init__(self, source: FileSource, max_bytes: int):
        self._path, self._max_bytes = source.path, max_bytes
        self._watch = _Watch(source)
        self._identity: Identity | None = None

    def blocks(self) -> Iterator[Block]:
        with HashedFile(self._path) as raw:
            if self._path.name.endswith((*TEXT_SUFFIXES, ".txt.zst")):
                yield self._whole(raw)
            else:
                yield from line_blocks(chunks(raw), self._max_bytes, raw.position)
            digest = raw.sha256()
            self._identity = Identity(raw.read_bytes, digest)

    def identity(self) -> Identity:
        assert self._identity is not None
        self._watch.check()
        return self._identity

    def _whole(self, raw: HashedFile) -> Block:
        pieces, size = [], 0
        try:
            for piece in chunks(raw):
                pieces.append(piece)
                size += len(piece)
                if size > self._max_bytes:
                    return Block(1, 1, raw.position(), lost=too_long(self._max_bytes))
        except DamagedInput as error:
            return Block(1, 1, raw.position(), lost=str(error))
        return Block(1, 1, raw.position(), texts=(b"".join(pieces).removeprefix(BYTE_ORDER_MARK),))


def parquet_library() -> Any:
    """pyarrow's reader of Parquet files."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet files needs the pyarrow package: pip install 'poet-megatron[data]'") from error
    return pyarrow.parquet


class _ParquetReader:
    """A column of a Parquet file, some rows at a time."""

    def __init__(self, source: FileSource, key: str):
        self._path, self._bytes, self._key = source.path, source.bytes, key
        self._watch = _Watch(source)

    def blocks(self) -> Iterator[Block]:
        return text_blocks(self._texts())

    def identity(self) -> Identity:
        with HashedFile(self._path) as raw:
            digest = raw.sha256()
        self._watch.check()
        return Identity(raw.read_bytes, digest)

    def _texts(self) -> Iterator[tuple[bytes | None, int]]:
        import pyarrow

        try:
            with parquet_library().ParquetFile(self._path) as file:
                self._check(file.schema_arrow)
                rows, done = file.metadata.num_rows, 0
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[self._key], use_threads=False):
                    for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        done += 1
                        yield text, self._bytes * done // rows
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # the system's; pyarrow's own, about the content, have no number
                raise unreadable(self._path, error) from error
            raise DamagedInput("corrupt parquet") from error

    def _check(self, schema: Any) -> None:
        if self._key not in schema.names:
            raise UserError(f"{self._path} has no column {self._key!r} (it has {', '.join(schema.names)}): set --text-key")
        if (kind := str(schema.field(self._key).type)) not in ("string", "large_string", "binary", "large_binary", "string_view"):
            raise UserError(f"column {self._key!r} of {self._path} holds {kind}, not text: set --text-key")
