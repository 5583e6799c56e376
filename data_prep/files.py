"""Files that appear complete or not at all, and their hashes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import IO


def temporary_name(path: Path) -> Path:
    """Where a file is written before it gets its name: in the same folder, so that renaming is atomic; another process has another one."""
    return path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")


def publish(stream: IO[bytes], temporary: Path, path: Path) -> None:
    """Flush `stream` to disk, close it and give the file its name."""
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a small file so that a crash leaves either the old one or the new one."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            publish(stream, temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
