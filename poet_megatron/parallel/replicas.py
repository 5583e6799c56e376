"""Finds ranks whose copies of the same tensors have come apart, by comparing fingerprints of their bits.

Ranks that hold the same tensor computed it by the same operations from the same bits, so their copies agree to the last bit: 0.0 and -0.0
are a difference, and so are NaNs with other payloads (training stops at a NaN before it reaches a weight).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from poet_megatron.errors import EXIT_DIVERGED, FaultError

CHUNK = 1 << 20  # elements; of which 32 MB of temporaries
REPORTED = 4  # differences in a message
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ODD = (0x9E3779B97F4A7C15 - (1 << 64), 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))  # splitmix64's, as int64


Shared = tuple[str, Tensor, bool]
"""(name, tensor, whether tensor-parallel ranks hold different parts of it) of what data-parallel ranks have in common."""


class ReplicasDiverged(FaultError):
    """Ranks that must hold the same bits do not."""

    exit_status = EXIT_DIVERGED


def check_replicas(chunks: Sequence[nn.Module], when: str, others: Iterable[Shared] = (), nodes: Sequence[str] = ()) -> None:
    """Compare everything that ranks hold in common. Collective over all ranks.

    Data-parallel ranks share every parameter and permutation; tensor-parallel ranks those that are not split: replicated factors with their
    permutations, norms.

    Args:
        chunks: model chunks of this rank.
        when: for the message.
        others: what else data-parallel ranks share, such as optimizer state that is not sharded; the same names on every rank.
        nodes: the machine of every rank, for the message.

    Raises:
        ReplicasDiverged: on every rank, with the same message, which names tensors, global ranks and machines.
    """
    groups = parallel_state.get_data_parallel_group(), parallel_state.get_tensor_model_parallel_group()
    if all(group.size() == 1 for group in groups):
        return
    named = [*_shared_tensors(chunks), *others]
    fingerprints = [fingerprint(tensor) for _, tensor, _ in named]
    problems = _differences([name for name, _, _ in named], fingerprints, groups[0], nodes)
    whole = [(name, value) for (name, _, split), value in zip(named, fingerprints, strict=True) if not split]
    problems += _differences([name for name, _ in whole], [value for _, value in whole], groups[1], nodes)
    problems = _known_to_all(problems, next(chunks[0].parameters()).device)
    if problems:
        more = f"; {len(problems) - REPORTED} more" if len(problems) > REPORTED else ""
        raise ReplicasDiverged(
            f"{when}, ranks that must hold the same bits do not: {'; '.join(problems[:REPORTED])}{more}. A rank computed something else "
            "(a hardware fault, or kernels that are not deterministic): restart from the last checkpoint; if that is harmless, set "
            "parallel.check_replicas to false"
        )


def fingerprint(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits, int64 [], on its device and without waiting for it.

    The sum over the elements of a 64-bit mix of element and position. Each mix is a bijection of the element, so a change of any single
    element changes the sum for certain; any other change, such as two elements in each other's place, does with probability 1 - 2^-64.
    """
    words = tensor.detach().contiguous().view(-1).view(_WORDS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), CHUNK):
        chunk = words[start : start + CHUNK]
        total += _mixed(chunk, torch.arange(start + 1, start + 1 + chunk.numel(), dtype=torch.int64, device=tensor.device)).sum()
    return total


def _mixed(words: Tensor, positions: Tensor) -> Tensor:
    """Int64 hash of each word [n] at its position [n] (which is overwritten): splitmix64's finalizer on word + position x odd number."""
    mixed = positions.mul_(_ODD[0]).add_(words)
    for shift, odd in zip((30, 27), _ODD[1:], strict=True):
        mixed ^= (mixed >> shift) & ((1 << (64 - shift)) - 1)  # a shift that fills with zeros, not with the sign
        mixed *= odd
    return mixed.bitwise_xor_((mixed >> 31) & ((1 << 33) - 1))


def _shared_tensors(chunks: Sequence[nn.Module]) -> Iterator[Shared]:
    """Parameters and buffers; a buffer is split where its module's parameters are."""
    for index, chunk in enumerate(chunks):
        for module_name, module in chunk.named_modules():
            split = False
            for name, parameter in module.named_parameters(recurse=False):
                own = getattr(parameter, "tensor_model_parallel", False)
                split |= own
                yield f"{index}.{module_name}.{name}", parameter, own
            for name, buffer in module.named_buffers(recurse=False):
                yield f"{index}.{module_name}.{name}", buffer, split


def _differences(names: list[str], values: list[Tensor], group: ProcessGroup, nodes: Sequence[str]) -> list[str]:
    """What differs between the ranks of a group, the same list on each of them; waits for the device once."""
    if group.size() == 1 or not names:
        return []
    mine = torch.stack(values)
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(gathered, mine, group=group)
    table = torch.stack(gathered).cpu()
    ranks = dist.get_process_group_ranks(group)
    different = (table != table[0]).any(dim=0).nonzero()[:, 0].tolist()
    return [describe_difference(names[column], dict(zip(ranks, table[:, column].tolist(), strict=True)), nodes) for column in different]


def describe_difference(name: str, values: dict[int, int], nodes: Sequence[str] = ()) -> str:
    """Say which ranks differ in a tensor.

    Args:
        name: of the tensor.
        values: {global rank: fingerprint}, not all equal.
        nodes: the machine of every rank; named where given.

    Returns:
        The ranks outside the majority, if more than half of the ranks agree; otherwise all ranks, by what they hold.
    """
    holders: dict[int, list[int]] = {}
    for rank, value in values.items():
        holders.setdefault(value, []).append(rank)
    largest = max(holders.values(), key=len)
    if 2 * len(largest) > len(values):
        others = [rank for rank in values if rank not in largest]
        return f"{name} on {_ranks(others, nodes)} differs from {_ranks(largest)}"
    return f"{name} differs between {' and '.join(_ranks(same, nodes) for same in holders.values())}"


def _ranks(ranks: list[int], nodes: Sequence[str] = ()) -> str:
    names = [f"{rank} ({nodes[rank]})" if nodes else str(rank) for rank in ranks]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(names)}"


def _known_to_all(problems: list[str], device: torch.device) -> list[str]:
    """The problems of every rank, without repetitions: a rank whose own groups agree must stop with the others."""
    found = torch.tensor(len(problems), device=device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    if not found.item():
        return []
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, problems)
    return list(dict.fromkeys(problem for rank in gathered for problem in rank))
