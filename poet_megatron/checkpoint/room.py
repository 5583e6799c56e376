"""Whether a checkpoint fits on the disk, and what every rank says when one could not be written."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._pytree import tree_leaves

from poet_megatron.errors import UserError
from poet_megatron.parallel.context import ParallelContext

RESERVE_BYTES = 4 << 20
"""Held while tensors are written, so that the small files after them, which a single rank writes, find room."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(UserError):
    """A checkpoint could not be written; the ones before it are untouched."""


def agree(context: ParallelContext, action: Callable[[], object]) -> None:
    """Do something on this rank; if it fails on any rank, raise the same CheckpointError on all. Collective over all ranks."""
    problem = ""
    try:
        action()
    except (Exception, CheckpointException) as error:  # whatever it is, the other ranks must not wait for this one
        problem = f"rank {context.name(context.rank)}: {describe(error)}"
    found: list[str] = [""] * context.world_size
    dist.all_gather_object(found, problem)
    if problems := list(dict.fromkeys(text for text in found if text)):
        raise CheckpointError("; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else ""))


def describe(error: BaseException) -> str:
    """What went wrong, in short; of errors that torch gathered from several ranks, the first."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error, OSError) and error.errno is not None:
        return f"{os.strerror(error.errno)}" + (f" ({error.filename})" if error.filename else "")
    if isinstance(error, UserError):
        return str(error)
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def bytes_to_write(state: dict[str, Any], device: torch.device) -> int:
    """Bytes of a sharded state over all ranks, each tensor once. Collective over all ranks."""
    mine = sum(
        leaf.data.numel() * leaf.data.element_size()
        for leaf in tree_leaves(state)
        if isinstance(leaf, ShardedTensor) and leaf.data is not None and _is_first_replica(leaf)
    )
    total = torch.tensor(mine, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total.item())


def prepare_room(reserve: Path, needed: int) -> None:
    """Refuse a disk that is too small for `needed` bytes beside the reserve; write the file `reserve`."""
    free = shutil.disk_usage(reserve.parent).free
    if free < needed + RESERVE_BYTES:
        raise CheckpointError(
            f"no room for a checkpoint of {megabytes(needed)} in {reserve.parent}: {megabytes(free)} are free, "
            f"{megabytes(needed + RESERVE_BYTES - free)} are missing"
        )
    with reserve.open("wb") as file:
        file.write(bytes(RESERVE_BYTES))
        file.flush()
        os.fsync(file.fileno())


def megabytes(count: int) -> str:
    """For messages."""
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e6:.1f} MB"


def _is_first_replica(tensor: ShardedTensor) -> bool:
    replica = tensor.replica_id
    return not any(replica) if isinstance(replica, tuple) else replica == 0
