"""Sources: what becomes one part each. Files by their ending; shards of a Hugging Face dataset are in `data_prep.hub`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.blocks import Block, DamagedInput, line_blocks, text_blocks, too_long
from data_prep.corpus import JSON_SUFFIXES, TEXT_SUFFIXES, expand
from data_prep.files import sha256_of
from data_prep.streams import HashedFile, chunks, zstd_library
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
            return _ParquetReader(self.path, key)
        return _FileReader(self.path, max_bytes)


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

    def __init__(self, path: Path, max_bytes: int):
        self._path, self._max_bytes = path, max_bytes
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
        return Block(1, 1, raw.position(), texts=(b"".join(pieces),))


def parquet_library() -> Any:
    """pyarrow's reader of Parquet files."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("reading .parquet files needs the pyarrow package: pip install 'poet-megatron[data]'") from error
    return pyarrow.parquet


class _ParquetReader:
    """A column of a Parquet file, some rows at a time."""

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key

    def blocks(self) -> Iterator[Block]:
        return text_blocks(self._texts())

    def identity(self) -> Identity:
        return Identity(self._path.stat().st_size, sha256_of(self._path))

    def _texts(self) -> Iterator[tuple[bytes | None, int]]:
        import pyarrow

        size = self._path.stat().st_size
        try:
            with parquet_library().ParquetFile(self._path) as file:
                self._check(file.schema_arrow)
                rows, done = file.metadata.num_rows, 0
                for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[self._key], use_threads=False):
                    for text in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                        done += 1
                        yield text, size * done // rows
        except (pyarrow.ArrowException, OSError) as error:
            raise DamagedInput("corrupt parquet") from error

    def _check(self, schema: Any) -> None:
        if self._key not in schema.names:
            raise UserError(f"{self._path} has no column {self._key!r} (it has {', '.join(schema.names)}): set --text-key")
        if (kind := str(schema.field(self._key).type)) not in ("string", "large_string", "binary", "large_binary", "string_view"):
            raise UserError(f"column {self._key!r} of {self._path} holds {kind}, not text: set --text-key")
