"""Counts the collectives that a piece of code issues, with their bytes, whichever function or module issues them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_coalesced_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "alltoall_": "all_to_all",
    "alltoall_base_": "all_to_all",
    "broadcast_": "broadcast",
    "reduce_": "reduce",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
    "recv_": "recv",
    "recv_any_source_": "recv",
}


@dataclass(frozen=True)
class Collective:
    """One collective as this rank issued it.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter, all_to_all, broadcast, reduce, gather, scatter, send or recv.
        ranks: global ranks of its group, in order.
        bytes: size of the whole tensor: of the output of an all_gather, of the input of a reduce_scatter, of the tensor otherwise.
    """

    kind: str
    ranks: tuple[int, ...]
    bytes: int


class CollectiveCounter(TorchDispatchMode):
    """Context manager that records every collective issued inside, forward and backward.

    It sits below torch.distributed's functions, at the c10d operators, so functions bound by name elsewhere are seen as well. Barriers
    carry no data and are left out.

    Attributes:
        records: the collectives in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Record one operator if it is a collective, and run it."""
        kind = KINDS.get(func.overloadpacket.__name__) if func.namespace == "c10d" else None
        if kind is not None:
            self.records.append(
                Collective(kind, tuple(dist.get_process_group_ranks(group_of(args))), max(_bytes(argument) for argument in args))
            )
        return func(*args, **(kwargs or {}))

    def calls(self, *ranks: int) -> dict[str, int]:
        """Number of collectives by kind, in the group of these global ranks (in any group if none are given)."""
        return self._totals(ranks, lambda record: 1)

    def bytes(self, *ranks: int) -> dict[str, int]:
        """Bytes by kind, as `calls`."""
        return self._totals(ranks, lambda record: record.bytes)

    def _totals(self, ranks: tuple[int, ...], size: Callable[[Collective], int]) -> dict[str, int]:
        totals: Counter[str] = Counter()
        for record in self.records:
            if not ranks or record.ranks == ranks:
                totals[record.kind] += size(record)
        return dict(totals)


def group_of(args: tuple) -> dist.ProcessGroup:
    """The process group among the arguments of a c10d operator."""
    (group,) = (dist.ProcessGroup.unbox(argument) for argument in args if _is_group(argument))
    return group


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in argument._type().name()  # type: ignore[attr-defined]


def _bytes(argument: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(argument) if isinstance(leaf, Tensor))
