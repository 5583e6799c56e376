"""Merge-then-reinitialize over a whole model, with everything the optimizer remembers of the merged skews, and its schedule.

Merges are distributed: every data-parallel rank merges its share of the matrices, in fp32 and from their fp32 masters where there are any,
and the working copies are broadcast. Masters therefore cost 4mn / dp bytes per rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from torch import nn
from torch.distributed import ProcessGroup

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.rotation import Rotation
from poet_megatron.optim.build import SKEW_SUFFIX
from poet_megatron.optim.state import AdamState
from poet_megatron.parallel.deal import deal


def rotated_matrices(chunks: Sequence[nn.Module]) -> list[RotatedMatrix]:
    """Every rotated matrix of this rank's model chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, RotatedMatrix)]


def owners(chunks: Sequence[nn.Module], ranks: int) -> dict[RotatedMatrix, int]:
    """The data-parallel rank that merges each matrix (and keeps its master): dealt by size, the same on every rank."""
    matrices = rotated_matrices(chunks)
    return dict(zip(matrices, deal([matrix.weight.numel() for matrix in matrices], ranks), strict=True))


def keep_masters(chunks: Sequence[nn.Module], group: ProcessGroup) -> None:
    """Keep an fp32 master of every rotated matrix from now on, each on one rank of the data-parallel `group`."""
    for matrix, owner in owners(chunks, group.size()).items():
        if owner == group.rank():
            matrix.keep_master()
        else:
            matrix.master_elsewhere = True


def merge_model(chunks: Sequence[nn.Module], states: Mapping[str, AdamState], config: PoetConfig, group: ProcessGroup) -> None:
    """Merge every rotated matrix and reset its skews, their fp32 masters, their moments and Adam's step. Collective over `group`.

    Only the skews are touched: masters and moments of embeddings and norms stay bit-identical (Megatron's reload_model_params would round
    every master to the model's dtype). A merge sends each working weight once, from its owner to the other ranks of `group`, while the
    owner goes on to its next matrix; a group of one sends nothing. Beyond the model it needs the fp32 temporaries of the matrices that
    share an R (of one matrix, where none is shared).

    Args:
        chunks: model chunks of this rank.
        states: Adam's state of (at least) the skews this rank updates.
        config: merge_polish and merge_reset_moments.
        group: data-parallel ranks, which hold the same model.
    """
    owner, exact = owners(chunks, group.size()), config.merge_polish == "exact"
    pending: list[dist.Work] = []
    for first in owner:
        if first is first.sharers[0]:  # all sharers of an R are merged before it is drawn again
            _merge_share(first.sharers, [matrix for matrix in first.sharers if owner[matrix] == group.rank()], exact)
            pending += [work for matrix in first.sharers if (work := _broadcast(matrix, owner[matrix], group))]
    for work in pending:
        work.wait()
    for name, state in states.items():
        if name.endswith(SKEW_SUFFIX):
            state.param.data.zero_()
            if config.merge_reset_moments:
                state.reset_moments()


def broadcast_weights(chunks: Sequence[nn.Module], group: ProcessGroup) -> None:
    """Give every data-parallel rank the working weights of the ranks that own them. Collective over `group`."""
    pending = [_broadcast(matrix, owner, group) for matrix, owner in owners(chunks, group.size()).items()]
    for work in pending:
        if work is not None:
            work.wait()


def _merge_share(sharers: Sequence[RotatedMatrix], mine: Sequence[RotatedMatrix], exact: bool) -> None:
    """Restart the sharers of an R with the merged weights of those that this rank owns; the other weights are stale until they arrive."""
    merged = [matrix.merged(exact) for matrix in mine]
    for matrix in sharers:
        matrix.restart()
    for matrix, weight in zip(mine, merged, strict=True):
        matrix.load_canonical(weight)


def _broadcast(matrix: RotatedMatrix, owner: int, group: ProcessGroup) -> dist.Work | None:
    """Start to send the working weight, in stored order, which is the same on every rank.

    A GPU does this on NCCL's own stream, which waits for what the current stream has queued so far; the host waits for neither.
    """
    if group.size() == 1:
        return None
    return dist.broadcast(matrix.weight.data, src=dist.get_global_rank(group, owner), group=group, async_op=True)


def set_merge_index(chunks: Sequence[nn.Module], merge_index: int) -> None:
    """Draw the permutations of `merge_index` in every rotated matrix (before loading a checkpoint)."""
    for matrix in rotated_matrices(chunks):
        matrix.set_merge_index(merge_index)


def rotation_health(chunks: Sequence[nn.Module], group: ProcessGroup) -> tuple[float, float]:
    """(e_orth = |G G^T - I|_F / |I|_F over all blocks, largest |Q|_2) of the model that the ranks of `group` make up. Collective."""
    rotations = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Rotation)]
    device = next(chunks[0].parameters()).device
    found = torch.stack(
        [
            torch.zeros(3, dtype=torch.float64, device=device),
            *(r.diagnostics() for r in rotations if r.skew is not None and param_is_not_tensor_parallel_duplicate(r.skew)),
        ]
    )
    sums, norm = found[:, :2].sum(dim=0), found[:, 2:].amax(dim=0)
    dist.all_reduce(sums, group=group)
    dist.all_reduce(norm, op=dist.ReduceOp.MAX, group=group)
    defect, size, largest = torch.cat([sums, norm]).tolist()  # the only time that the host waits for the device
    return (defect / size) ** 0.5 if size else 0.0, largest


def clip_threshold(step: int, last_merge: int, clip_grad: float, config: PoetConfig) -> float:
    """Gradient clipping threshold of `step` (from 1): ramps from merge_clip_scale x clip_grad back to clip_grad after a merge.

    The i-th step after a merge (i = 1 .. merge_clip_warmup) uses clip_grad x (s + (1 - s)(i - 1) / merge_clip_warmup).

    Args:
        step: the step about to be taken.
        last_merge: step after which the last merge happened; 0 before the first.
        clip_grad: the full threshold.
        config: merge_clip_warmup and merge_clip_scale s.
    """
    since = step - last_merge
    if last_merge == 0 or since > config.merge_clip_warmup:
        return clip_grad
    start = config.merge_clip_scale
    return clip_grad * (start + (1.0 - start) * (since - 1) / config.merge_clip_warmup)
