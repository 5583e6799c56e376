"""How whole matrices are dealt to data-parallel ranks (fp32 masters of W0 and the merge work that goes with them)."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(sizes: Sequence[int], ranks: int) -> list[int]:
    """Deal items to ranks greedily: largest first, each to the rank with the smallest load so far; ties go to the lowest rank.

    Items of equal size keep their order, so every process gets the same answer from the same sizes. The largest load exceeds
    the mean by less than the largest item (Graham's bound).

    Args:
        sizes: size of every item, in any unit (elements of a matrix, say).
        ranks: number of ranks, at least 1.

    Returns:
        The owner of every item, in the order of `sizes`.

    Raises:
        ValueError: fewer than one rank.
    """
    if ranks < 1:
        raise ValueError(f"cannot deal {len(sizes)} items to {ranks} ranks: at least 1 is needed")
    owners = [0] * len(sizes)
    loads = [(0, rank) for rank in range(ranks)]
    for item in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        load, rank = heapq.heappop(loads)
        owners[item] = rank
        heapq.heappush(loads, (load + sizes[item], rank))
    return owners
