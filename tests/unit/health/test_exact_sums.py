"""Sums in closed form: exact in every dtype for any number of ranks, and damage leads to the rank that did it."""

from __future__ import annotations

import pytest
import torch
from known_worlds import world

from poet_megatron.health.sums import DTYPES, OWNED, SHARED, _fault, contribution, expected, judge

CPU = torch.device("cpu")


@pytest.mark.parametrize("ranks", [1, 2, 3, 64, 65, 200])
@pytest.mark.parametrize("pattern", [SHARED, OWNED])
def test_contributions_add_up_to_the_closed_form_without_rounding(pattern: str, ranks: int) -> None:
    """Added up in bf16 in the order of the ranks and in the reverse one: a partial sum that rounds would differ from that in int64."""
    size = 613
    parts = [contribution(pattern, rank, ranks, size, torch.bfloat16, CPU) for rank in range(ranks)]
    exact = sum(part.to(torch.int64) for part in parts)
    for order in (parts, parts[::-1]):
        total = torch.zeros(size, dtype=torch.bfloat16)
        for part in order:
            total = total + part
        assert torch.equal(total.to(torch.int64), exact)
    for dtype in DTYPES:
        assert torch.equal(expected(pattern, ranks, size, dtype, CPU).to(torch.int64), exact)


def test_every_rank_contributes() -> None:
    for pattern in (SHARED, OWNED):
        assert all(contribution(pattern, rank, 100, 1023, torch.float32, CPU).any() for rank in range(100))


def faults(pattern: str, members: list[int], damage: dict[int, float]) -> list[dict]:
    right = expected(pattern, len(members), 12, torch.float32, CPU)
    found = right.clone()
    for place, value in damage.items():
        found[place] = value
    fault = _fault(pattern, found, right, members)
    return [{"dtype": "float32", "size": 12, "pattern": pattern, **fault}] if fault else []


def test_right_sums_are_no_fault() -> None:
    assert faults(SHARED, [0, 1, 2], {}) == []
    assert judge("sums", "over all ranks", {0: [], 1: []}, world(a=2)) == []


def test_a_wrong_element_leads_to_its_owner() -> None:
    roster = world(a=2, b=2)
    wrong = faults(OWNED, [0, 1, 2, 3], {2: 99.0, 6: float("nan"), 10: 0.0})
    (found,) = judge("sums", "over all ranks", dict.fromkeys(range(4), wrong), roster)
    assert found.status == "FAIL" and found.ranks == (2,) and found.nodes == ("b",)
    assert "element 2 is 99 instead of 3 (3 wrong)" in found.what and "contribution of rank 2 on b is damaged" in found.what
    assert "seen by all its ranks" in found.what


def test_owners_are_global_ranks_in_a_subgroup() -> None:
    (found,) = judge("inside nodes", "inside b", dict.fromkeys([2, 3], faults(OWNED, [2, 3], {5: 0.0})), world(a=2, b=2))
    assert found.ranks == (3,)


def test_who_alone_receives_wrong_sums_is_to_blame() -> None:
    everything = dict.fromkeys(range(12), 0.0)
    wrong = {0: [], 1: faults(SHARED, [0, 1, 2], everything) + faults(OWNED, [0, 1, 2], everything), 2: []}
    (found,) = judge("sums", "over all ranks", wrong, world(a=1, b=2))
    assert found.ranks == (1,) and "seen by rank 1 on b" in found.what and "contribution" not in found.what


def test_damage_everywhere_names_all() -> None:
    wrong = faults(OWNED, [0, 1], dict.fromkeys(range(12), 0.0))
    (found,) = judge("sums", "over all ranks", {0: wrong, 1: wrong}, world(a=1, b=1))
    assert found.ranks == (0, 1)
