"""Names of ranks and nodes as readers see them, and Slurm's host lists."""

from __future__ import annotations

import pytest
from known_worlds import world

from poet_megatron.health.roster import and_join, expand_hostlist, spans


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2], "0-2"), ([7, 0, 1, 3, 3], "0-1,3,7"), ([0, 2], "0,2"), ([9, 10], "9-10")]
)
def test_runs_of_numbers_are_short(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


def test_ranks_are_named_with_their_nodes() -> None:
    roster = world(a=2, b=3)
    assert roster.name([3]) == "rank 3 on b"
    assert roster.name([4, 1, 0, 2]) == "ranks 0-1 on a and 2,4 on b"
    assert roster.leaders == {"a": 0, "b": 2}
    assert roster.node_of(1) == "a"


def test_words_are_joined() -> None:
    assert [and_join(words) for words in ([], ["a"], ["a", "b"], ["a", "b", "c"])] == ["", "a", "a and b", "a, b and c"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", []),
        ("login", ["login"]),
        ("node[0-1]", ["node0", "node1"]),
        ("node[08-10,12],login", ["node08", "node09", "node10", "node12", "login"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("a[099-101]-ib", ["a099-ib", "a100-ib", "a101-ib"]),
    ],
)
def test_host_lists_of_slurm(text: str, names: list[str]) -> None:
    assert list(expand_hostlist(text)) == names
