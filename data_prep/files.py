"""Files that appear complete or not at all, and their hashes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO

NO_LINKS = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
"""How a file system says that it has no hard links."""


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name: in the same folder, so that renaming is atomic; another process has another one."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def publish(stream: IO[bytes], temporary: Path, path: Path) -> None:
    """Flush `stream` to disk, close it and give the file its name."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    temporary.replace(path)
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Make the names in a folder survive a crash of the machine."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_pieces(path: Path, pieces: Iterable[bytes]) -> str:
    """Write a file piece by piece, so that a crash leaves either the old one or the new one; returns its hash."""
    temporary, digest = temporary_name(path), hashlib.sha256()
    try:
        with temporary.open("wb") as stream:
            for piece in pieces:
                stream.write(piece)
                digest.update(piece)
            publish(stream, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves either the old one or the new one."""
    write_pieces(path, [content])


def create_atomically(path: Path, content: bytes) -> bool:
    """Write a small file unless there is one; False if there is. Of several processes one succeeds."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if path.exists():
            return False
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return True


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
