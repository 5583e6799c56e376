"""Whether a checkpoint fits on the disk, and what every rank says when one could not be written."""

from __future__ import annotations

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

NAMED = 3  # failures in a message
SMALL_FILES = 1 << 20
"""Room for everything in a checkpoint that is no tensor."""


class CheckpointError(UserError):
    """A checkpoint could not be written; the ones before it are untouched."""


def agree(context: ParallelContext, action: Callable[[], object]) -> None:
    """Do something on this rank; if it fails on any rank, raise the same CheckpointError on all. Collective over all ranks."""
    problem = ""
    try:
        action()
    except (Exception, CheckpointException) as error:  # whatever it is, the other ranks must not wait for this one
        problem = describe(error, context)
    found: list[str] = [""] * context.world_size
    dist.all_gather_object(found, problem)
    if problems := list(dict.fromkeys(text for text in found if text)):
        raise CheckpointError("; ".join(problems[:NAMED]) + (f"; {len(problems) - NAMED} more" if len(problems) > NAMED else ""))


def describe(error: BaseException, context: ParallelContext) -> str:
    """What went wrong and on which rank, in short: on this one, or on the first of those whose errors torch has gathered."""
    rank, failures = context.rank, getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        rank, (error, _) = min(failures.items())
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{os.strerror(error.errno)}" + (f" ({error.filename})" if error.filename else "")
    elif isinstance(error, UserError):
        text = str(error)
    else:
        text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return f"rank {context.name(rank)}: {text}"


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


def check_room(folder: Path, needed: int) -> None:
    """Refuse a disk that is too small for `needed` bytes of tensors and what goes with them."""
    free = shutil.disk_usage(folder).free
    if free < needed + SMALL_FILES:
        raise CheckpointError(
            f"no room for a checkpoint of {megabytes(needed)} in {folder.parent}: {megabytes(free)} are free, "
            f"{megabytes(needed + SMALL_FILES - free)} are missing"
        )


def megabytes(count: int) -> str:
    """For messages."""
    return f"{count / 1e9:.1f} GB" if count >= 1e10 else f"{count / 1e6:.1f} MB"


def _is_first_replica(tensor: ShardedTensor) -> bool:
    replica = tensor.replica_id
    return not any(replica) if isinstance(replica, tuple) else replica == 0
