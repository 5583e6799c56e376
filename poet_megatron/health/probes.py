"""What one node does to a folder to learn how good it is; no knowledge of the other nodes."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import shutil
import statistics
import time
from pathlib import Path

MIB = 2**20
FILES = 10
POLL_SECONDS = 0.05


def create(folder: Path, text: str) -> None:
    """A new folder with one file, durable, for the others to see."""
    folder.mkdir()
    _write_durably(folder / "hello", text.encode())


def remove(folder: Path) -> None:
    """Delete what `create` and the others made."""
    shutil.rmtree(folder, ignore_errors=True)


def seconds_until_seen(path: Path, text: str, seconds: float) -> float | None:
    """Wait until `path` can be read and says `text`: how long that took, None if it did not happen within `seconds`."""
    start = time.monotonic()
    while True:
        with contextlib.suppress(OSError):
            if path.read_text() == text:
                return time.monotonic() - start
        if time.monotonic() - start > seconds:
            return None
        time.sleep(POLL_SECONDS)


def latency(folder: Path, name: str) -> float:
    """Median seconds of making a small file durable as checkpoints do it: create, write, fsync, rename, fsync of the folder."""
    seconds = []
    for number in range(FILES):
        start = time.perf_counter()
        partial = folder / f"{name}.partial"
        _write_durably(partial, b"x" * 4096)
        partial.replace(folder / f"{name}.{number}")
        _sync_folder(folder)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def write_rate(path: Path, size: int, seed: int) -> float:
    """Bytes per second of writing `size` bytes of a known pattern, fsync included."""
    start = time.perf_counter()
    with path.open("wb") as file:
        for number, block in _blocks(size, seed):
            file.write(block[number % MIB :] + block[: number % MIB])
        file.flush()
        os.fsync(file.fileno())
    return size / (time.perf_counter() - start)


def read_rate(path: Path, size: int, seed: int) -> float:
    """Bytes per second of reading what `write_rate` wrote, not from this node's cache as far as the kernel obeys.

    Raises:
        ValueError: the content is not what was written.
    """
    with path.open("rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        found = []
        while data := file.read(MIB):
            found.append(data)
        seconds = time.perf_counter() - start
    for (number, block), data in zip(_blocks(size, seed), found, strict=True):
        if data != block[number % MIB :] + block[: number % MIB]:
            raise ValueError(f"{path.name} differs from what was written, in MiB {number}")
    return size / seconds


def take_lock(path: Path) -> int:
    """Lock `path` as a run locks its directory; the open file, which holds the lock until it is closed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def lock_is_refused(path: Path) -> bool:
    """Whether `path`, which another process has locked, cannot be locked from here."""
    try:
        os.close(take_lock(path))
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        raise
    return False


def free_bytes(folder: Path) -> int:
    """Space for this user."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def kind(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """Type of the file system, such as nfs4, lustre or ext4; "unknown" if the system does not tell."""
    try:
        lines = [line.split() for line in mounts.read_text().splitlines()]
    except OSError:
        return "unknown"
    wanted = folder.resolve()
    points = {Path(words[1].replace("\\040", " ")): words[2] for words in lines if len(words) > 2}
    inside = [point for point in points if wanted.is_relative_to(point)]
    return points[max(inside, key=lambda point: len(point.parts))] if inside else "unknown"


def _blocks(size: int, seed: int) -> list[tuple[int, bytes]]:
    """Numbers and contents of the pieces of 1 MiB; write and read turn each by its number, so that no two are alike."""
    block = random.Random(seed).randbytes(MIB)
    return [(number, block) for number in range(size // MIB)]


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
