"""Bytes of source files: hashed while they are read, decompressed piece by piece, damage told apart from the end."""

from __future__ import annotations

import contextlib
import hashlib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from data_prep.blocks import DamagedInput
from poet_megatron.errors import UserError

PLAIN_STEP = 1 << 20
GZIP_STEP = 1 << 16
"""Compressed bytes at a time: deflate grows them to at most a thousand times as much."""
ZSTD_STEP = 1 << 12
"""zstd can grow them thirty thousand times."""


class HashedFile:
    """A file read from front to end, with its SHA-256. That it cannot be read is a UserError."""

    def __init__(self, path: Path):
        self.path = path
        self.read_bytes = 0
        self._digest = hashlib.sha256()
        try:
            self._stream = path.open("rb")
        except OSError as error:
            raise unreadable(path, error) from error

    def read(self, count: int) -> bytes:
        """The next bytes, empty at the end."""
        try:
            data = self._stream.read(count)
        except OSError as error:
            raise unreadable(self.path, error) from error
        self._digest.update(data)
        self.read_bytes += len(data)
        return data

    def sha256(self) -> str:
        """Hash of the whole file, what was not read so far included."""
        while self.read(PLAIN_STEP):
            pass
        return self._digest.hexdigest()

    def position(self) -> int:
        """Bytes read so far."""
        return self.read_bytes

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._stream.close()


def unreadable(path: Path, error: OSError) -> UserError:
    """The error for a source that the system does not give."""
    return UserError(f"input {path} cannot be read ({error.strerror or error}): finished parts are kept; run the same command again later")


class _Decoder(Protocol):
    """What zlib and zstandard have in common."""

    @property
    def eof(self) -> bool:
        """Whether the frame is complete."""

    @property
    def unused_data(self) -> bytes:
        """Input after the end of the frame."""

    def decompress(self, data: bytes, /) -> bytes:
        """Output for the next input."""


def chunks(raw: HashedFile) -> Iterator[bytes]:
    """Decompressed content of a file by its ending; raises DamagedInput where it stops making sense."""
    if raw.path.suffix == ".gz":
        return _frames(raw, "gzip", lambda: zlib.decompressobj(wbits=31), zlib.error, GZIP_STEP)
    if raw.path.suffix == ".zst":
        library = zstd_library()
        return _frames(raw, "zstd", lambda: library.ZstdDecompressor().decompressobj(), library.ZstdError, ZSTD_STEP)
    return iter(lambda: raw.read(PLAIN_STEP), b"")


def zstd_library() -> Any:
    """The zstandard package."""
    try:
        import zstandard
    except ImportError as error:
        raise UserError(
            "reading .zst files needs the zstandard package: pip install 'poet-megatron[data]', or decompress them with zstd -d"
        ) from error
    return zstandard


def _frames(raw: HashedFile, name: str, new_decoder: Callable[[], _Decoder], error_type: type[Exception], step: int) -> Iterator[bytes]:
    """Content of concatenated compressed frames (gzip members); zero bytes after the last one are padding."""
    decoder, started, frames = new_decoder(), False, 0
    while data := raw.read(step):
        while data:
            if frames and not started and not (data := data.lstrip(b"\0")):
                break
            before = decoder.copy() if hasattr(decoder, "copy") else None
            try:
                output = decoder.decompress(data)
            except error_type as error:
                if before is not None:
                    yield _until_damage(before, data, error_type)
                raise DamagedInput(f"corrupt {name}") from error
            started, data = True, b""
            if output:
                yield output
            if decoder.eof:
                data, decoder, started, frames = decoder.unused_data, new_decoder(), False, frames + 1
    if started:
        raise DamagedInput(f"truncated {name}")


def _until_damage(decoder: _Decoder, data: bytes, error_type: type[Exception]) -> bytes:
    """What `data` gives before the byte at which decoding fails: of a call that fails the library returns nothing."""
    output = bytearray()
    with contextlib.suppress(error_type):
        for place in range(len(data)):
            output += decoder.decompress(data[place : place + 1])
    return bytes(output)
