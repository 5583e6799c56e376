"""Finds ranks whose copies of the same tensors have come apart, by comparing fingerprints of their bits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed import ProcessGroup

CHUNK = 1 << 20
MULTIPLIER = 0x9E3779B1  # odd, so that every bit of a word moves the sum
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicasDiverged(RuntimeError):
    """Ranks that must hold the same bits do not."""


def check_replicas(chunks: Sequence[nn.Module], when: str) -> None:
    """Compare everything that ranks hold in common. Collective over tensor- and data-parallel groups.

    Data-parallel ranks share every parameter and permutation; tensor-parallel ranks those that are not split: replicated factors with their
    permutations, norms.

    Args:
        chunks: model chunks of this rank.
        when: for the message.

    Raises:
        ReplicasDiverged: on every rank of a group that differs, naming the tensors and the ranks in the minority.
    """
    named = list(_shared_tensors(chunks))
    fingerprints = [fingerprint(tensor) for _, tensor, _ in named]
    problems = []
    for kind, group, mine in (
        ("data-parallel", parallel_state.get_data_parallel_group(), [True] * len(named)),
        ("tensor-parallel", parallel_state.get_tensor_model_parallel_group(), [not split for _, _, split in named]),
    ):
        names = [name for (name, _, _), keep in zip(named, mine, strict=True) if keep]
        values = [value for value, keep in zip(fingerprints, mine, strict=True) if keep]
        problems += [f"{problem} among {kind} ranks" for problem in _differences(names, values, group)]
    if problems:
        raise ReplicasDiverged(
            f"{when}: {'; '.join(problems[:4])}. A rank computed something else (a hardware fault, or nondeterministic kernels): "
            "restart from the last checkpoint"
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit position-dependent sum of the bits of a tensor, int64 [], on its device; differs if any single element does."""
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK):
        chunk = words[start : start + CHUNK].to(torch.int64)
        weights = torch.arange(start, start + chunk.numel(), dtype=torch.int64, device=tensor.device) * 2 + MULTIPLIER
        total += (chunk * weights).sum()
    return total


def _shared_tensors(chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether tensor-parallel ranks hold different parts of it)."""
    for index, chunk in enumerate(chunks):
        for module_name, module in chunk.named_modules():
            parameters = dict(module.named_parameters(recurse=False))
            split = any(getattr(parameter, "tensor_model_parallel", False) for parameter in parameters.values())
            for name, tensor in [*parameters.items(), *module.named_buffers(recurse=False)]:
                own = getattr(tensor, "tensor_model_parallel", split)
                yield f"{index}.{module_name}.{name}", tensor, own


def _differences(names: list[str], values: list[Tensor], group: ProcessGroup) -> list[str]:
    """What differs between the ranks of a group."""
    if group.size() == 1 or not names:
        return []
    mine = torch.stack(values)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    table = torch.stack(gathered).cpu()
    majority = table.mode(dim=0).values
    ranks = dist.get_process_group_ranks(group)
    return [
        f"{names[column]} differs on rank {', '.join(str(ranks[row]) for row in (table[:, column] != majority[column]).nonzero()[:, 0].tolist())}"
        for column in (table != majority).any(dim=0).nonzero()[:, 0].tolist()
    ]
