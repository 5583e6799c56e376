"""Which pairs of nodes meet when, and which are called slow."""

from __future__ import annotations

from itertools import combinations

import pytest
from known_worlds import only, statuses, world

from poet_megatron.health.pairs import ONE_AT_A_TIME, judge, rounds, slow_nodes


@pytest.mark.parametrize("nodes", [1, 2, 3, 7, 8, 9, 10, 15, 16, 33])
def test_every_pair_meets_once_and_nobody_twice_in_a_round(nodes: int) -> None:
    found = rounds(nodes)
    assert sorted(pair for meeting in found for pair in meeting) == sorted(combinations(range(nodes), 2))
    for meeting in found:
        busy = [node for pair in meeting for node in pair]
        assert len(busy) == len(set(busy))


def test_few_nodes_have_the_network_for_themselves() -> None:
    assert all(len(meeting) == 1 for meeting in rounds(ONE_AT_A_TIME))


@pytest.mark.parametrize("nodes", [9, 16, 33, 64])
def test_many_nodes_take_no_more_rounds_than_nodes(nodes: int) -> None:
    assert len(rounds(nodes)) <= nodes


def rates(nodes: str, **slow: float) -> dict[tuple[str, str], float]:
    """10 GB/s between all nodes (one letter each), but for slow pairs: ab=1.0."""
    return {(first, second): slow.get(first + second, 10.0) for first, second in combinations(nodes, 2)}


def test_equal_pairs_are_one_line() -> None:
    (found,) = judge(rates("abc", ab=9.0), world(a=1, b=1, c=1))
    assert found.status == "ok" and "3 pairs of nodes: 9.00 to 10.00, median 10.00" in found.what


def test_a_pair_below_half_of_the_median_is_named() -> None:
    found = only(judge(rates("abcd", bd=4.9), world(a=2, b=1, c=1, d=1)), "warn")
    assert (
        found.nodes == ("b", "d") and found.ranks == (2, 4) and "4.90 GB/s" in found.what and "median of the pairs is 10.00" in found.what
    )


def test_half_of_the_median_is_still_fine() -> None:
    assert statuses(judge(rates("abcd", bd=5.0), world(a=1, b=1, c=1, d=1))) == ["ok"]


def test_a_slow_node_of_three_is_named_although_the_median_is_slow() -> None:
    found = only(judge(rates("abcd", ad=1.0, bd=1.2, cd=1.1), world(a=1, b=1, c=1, d=1)), "warn")
    assert found.nodes == ("d",) and "1.20 GB/s at most" in found.what and "reach 10.00" in found.what
    assert only(judge(rates("abc", ac=1.0, bc=1.0), world(a=1, b=1, c=1)), "warn").nodes == ("c",)


def test_a_slow_node_hides_no_other_pair() -> None:
    found = judge(rates("abcde", ae=1.0, be=1.0, ce=1.0, de=1.0, ab=3.0), world(a=1, b=1, c=1, d=1, e=1))
    assert [one.nodes for one in found] == [("e",), ("a", "b")]


def test_one_pair_cannot_be_compared() -> None:
    assert statuses(judge(rates("ab", ab=0.1), world(a=1, b=1))) == ["ok"]
    assert slow_nodes(rates("ab", ab=0.1)) == []
    assert judge({}, world(a=1)) == []
