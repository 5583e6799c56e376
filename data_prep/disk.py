"""Room on disk: how much the tokens will take, and what to say when there is not enough."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path

from data_prep.sources import PARQUET_SUFFIX
from poet_megatron.errors import UserError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
UNWRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EIO, errno.ESTALE})
BYTES_PER_TOKEN = 4.0
"""Of English text, with a vocabulary of 32,000."""
EXPANSION = 2.6
"""Text that a compressed byte stands for; C4's gzip: 800 GB from 305 GB."""


class DiskFullError(UserError):
    """There is no room for the tokens; what is finished is kept."""


def free_bytes(folder: Path) -> int:
    """Room for this user on the file system of `folder`."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def estimate(sources: Iterable[tuple[str, int]], token_bytes: int) -> int:
    """Bytes of tokens that sources (name and size) are likely to give."""
    text = sum(size * (EXPANSION if name.endswith((".gz", ".zst", PARQUET_SUFFIX)) else 1.0) for name, size in sources)
    return int(text / BYTES_PER_TOKEN * token_bytes)


def megabytes(count: float) -> str:
    """For messages."""
    return f"{count / 1e6:,.1f} MB"


def check_room(folder: Path, needed: int, what: str, hint: str = "") -> None:
    """Refuse to begin what will not fit; `hint` is one more way out."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"{folder} has {megabytes(free)} free, {what} takes about {megabytes(needed)}: "
            f"{megabytes(needed - free)} are missing; free them, or choose another --output{hint}"
        )


def unwritable(error: OSError, folder: Path) -> Exception:
    """The error for an output that the system refuses to write for another reason than want of room; others stay what they are."""
    if error.errno not in UNWRITABLE:
        return error
    reason = "permission denied" if isinstance(error, PermissionError) else error.strerror or str(error)
    return UserError(f"{error.filename or folder} cannot be written ({reason}): choose another --output, or change its owner")


def is_full(error: OSError) -> bool:
    """Whether writing failed for want of room (disk, quota or limit of file size)."""
    return error.errno in FULL
