r"""Megatron's indexed datasets: `<prefix>.bin` holds token ids, `<prefix>.idx` where each document begins.

.idx: b"MMIDIDX\0\0", u64 version 1, u8 dtype code (8 = uint16, 4 = int32), u64 sequences, u64 documents + 1, int32 lengths, int64 byte
pointers, int64 document boundaries. Written here without megatron-core, whose module imports torch (4 s); the tests read it back with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
import numpy.typing as npt

from data_prep.files import publish, temporary_name, write_pieces
from poet_megatron.errors import UserError

HEADER = b"MMIDIDX\x00\x00"
DTYPE_CODES: dict[type[np.integer], int] = {np.uint16: 8, np.int32: 4}
HEADER_BYTES = len(HEADER) + struct.calcsize("<QBQQ")
UINT16_VOCAB = 65500
"""Megatron stores vocabularies below this as uint16."""


def token_dtype(vocab_size: int) -> type[np.integer]:
    """The type in which Megatron stores ids of such a vocabulary."""
    return np.uint16 if vocab_size < UINT16_VOCAB else np.int32


def bin_path(prefix: Path) -> Path:
    """The file of token ids."""
    return prefix.with_name(prefix.name + ".bin")


def idx_path(prefix: Path) -> Path:
    """The file of document boundaries."""
    return prefix.with_name(prefix.name + ".idx")


class IndexedWriter:
    """Writes documents one by one; the files get their names when the `with` block ends without an exception, else they are removed."""

    def __init__(self, prefix: Path, dtype: type[np.integer]):
        self.prefix, self.dtype = prefix, dtype
        self.documents = self.tokens = 0
        self._lengths = array("i")
        self._digest = hashlib.sha256()
        self.index_sha256 = ""
        """Hash of the index, once the `with` block has ended."""
        self._temporary = temporary_name(bin_path(prefix))
        self._bin: IO[bytes] = io.BytesIO()  # until the `with` block begins

    @property
    def sha256(self) -> str:
        """Hash of the token ids written so far."""
        return self._digest.hexdigest()

    def add(self, ids: Sequence[int]) -> None:
        """Append one document, which must have a token."""
        if not ids:
            raise ValueError("a document without tokens cannot be indexed: skip it")
        self.add_batch(np.asarray(ids, dtype=self.dtype), np.array([len(ids)], np.int32))

    def add_batch(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.int32]) -> None:
        """Append documents whose tokens stand end to end in `ids`, in this writer's dtype; each must have a token."""
        if ids.dtype != self.dtype or len(ids) != lengths.sum(dtype=np.int64) or (len(lengths) and lengths.min() < 1):
            raise ValueError(f"{len(ids)} ids of {ids.dtype} do not make documents of {self.dtype.__name__} with the lengths given")
        content = ids.tobytes()
        self._bin.write(content)
        self._digest.update(content)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.documents += len(lengths)
        self.tokens += len(ids)

    def __enter__(self) -> IndexedWriter:
        self._bin = self._temporary.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                publish(self._bin, self._temporary, bin_path(self.prefix))
                self._write_index()
        finally:
            with contextlib.suppress(OSError):  # a full disk, which the exception under way tells of
                self._bin.close()
            self._temporary.unlink(missing_ok=True)

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        pointers = np.zeros(len(lengths), np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * np.dtype(self.dtype).itemsize, out=pointers[1:])
        head = HEADER + struct.pack("<QBQQ", 1, DTYPE_CODES[self.dtype], len(lengths), len(lengths) + 1)
        content = (head, lengths.tobytes(), pointers.tobytes(), np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        self.index_sha256 = write_pieces(idx_path(self.prefix), content)


@dataclass(frozen=True)
class IndexedTokens:
    """Read side: all token ids as one memory map, document i being tokens[starts[i] : starts[i + 1]]."""

    tokens: npt.NDArray[np.integer]
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def document(self, number: int) -> npt.NDArray[np.integer]:
        """Token ids of one document, its end-of-sequence token included."""
        return self.tokens[self.starts[number] : self.starts[number + 1]]


def read_indexed(prefix: Path) -> IndexedTokens:
    """Open a dataset written by `IndexedWriter` (or by Megatron with one sequence per document)."""
    try:
        with idx_path(prefix).open("rb") as stream:
            head = stream.read(HEADER_BYTES)
        size, stored = idx_path(prefix).stat().st_size, bin_path(prefix).stat().st_size
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): run poet-megatron prepare again") from error
    if len(head) < HEADER_BYTES or head[: len(HEADER)] != HEADER:
        raise UserError(f"{idx_path(prefix)} is not a Megatron index (wrong or short header): run poet-megatron prepare again")
    _, code, count, _ = struct.unpack_from("<QBQQ", head, len(HEADER))
    dtypes = {value: key for key, value in DTYPE_CODES.items()}
    if code not in dtypes or size < HEADER_BYTES + 4 * count:
        raise UserError(
            f"{idx_path(prefix)} is damaged (dtype code {code}, {count} sequences, {size} bytes): run poet-megatron prepare again"
        )
    starts = np.zeros(count + 1, np.int64)
    if count:
        np.cumsum(np.memmap(idx_path(prefix), np.int32, "r", HEADER_BYTES, (count,)), out=starts[1:], dtype=np.int64)
    expected = int(starts[-1]) * np.dtype(dtypes[code]).itemsize
    if stored != expected:
        raise UserError(f"{bin_path(prefix)} has {stored} bytes; its index says {expected}: run poet-megatron prepare again")
    tokens: npt.NDArray[np.integer] = np.memmap(bin_path(prefix), dtypes[code], "r") if expected else np.zeros(0, dtypes[code])
    return IndexedTokens(tokens, starts)
