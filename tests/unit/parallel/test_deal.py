"""Whole matrices dealt to ranks: largest first to the least loaded, ties to the lowest rank."""

from __future__ import annotations

import random

import pytest

from poet_megatron.parallel.deal import deal


def test_largest_first_to_the_least_loaded() -> None:
    # 9 -> 0, 7 -> 1, 5 -> 1 (7 < 9), 4 -> 0 (9 < 12), 3 -> 1 (12 < 13)
    assert deal([3, 9, 5, 7, 4], 2) == [1, 0, 1, 1, 0]


def test_ties_go_to_the_lowest_rank_in_order() -> None:
    assert deal([2, 2, 2, 2, 2], 3) == [0, 1, 2, 0, 1]


def test_more_ranks_than_items() -> None:
    assert deal([1, 5], 4) == [1, 0]
    assert deal([], 4) == []


def test_loads_stay_within_one_item_of_the_mean() -> None:
    source = random.Random(0)
    sizes = [source.randint(1, 1000) for _ in range(200)]
    for ranks in (1, 3, 8):
        loads = [0] * ranks
        for size, owner in zip(sizes, deal(sizes, ranks), strict=True):
            loads[owner] += size
        assert max(loads) - sum(sizes) / ranks < max(sizes)


def test_no_ranks_is_an_error() -> None:
    with pytest.raises(ValueError, match="to 0 ranks: at least 1"):
        deal([1], 0)
