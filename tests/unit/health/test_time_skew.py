"""Offsets of clocks by round trips, with clocks and delays that the test sets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch.distributed as dist
from known_worlds import only, statuses, values, world

from poet_megatron.health.control import Outcome
from poet_megatron.health.time_skew import judge, measure


class Clocks:
    """One true time for all, which only the test moves; every reading takes a little."""

    def __init__(self) -> None:
        self.now = 1000.0

    def of(self, ahead: float, takes: float = 0.001) -> Callable[[], float]:
        def read() -> float:
            self.now += takes
            return self.now + ahead

        return read


def measured(*ahead: float) -> list[list[float] | None]:
    """Every rank is a thread, and a node of its own; the clock of rank r is ahead by ahead[r]."""
    store, clocks = dist.HashStore(), Clocks()
    found: list[list[float] | None] = [None] * len(ahead)

    def rank(number: int) -> None:
        found[number] = measure(store, number, range(len(ahead)), 30, clocks.of(ahead[number]))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(len(ahead))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_offsets_are_right_within_their_uncertainty() -> None:
    ahead = [0.0, 5.0, -3.0]
    found = measured(*ahead)
    assert found[0] == [0.0, 0.0]
    for (offset, uncertainty), truth in zip(found[1:], ahead[1:], strict=True):
        assert abs(offset - truth) <= uncertainty + 1e-9 and 0 < uncertainty < 1


def test_the_shortest_round_trip_counts() -> None:
    """The answer to the first question takes ten seconds, all on the way back: alone it would be wrong by five."""
    store, clocks = dist.HashStore(), Clocks()
    asked = []
    clock = clocks.of(2.0)

    def slow_at_first() -> float:
        asked.append(1)
        clocks.now += 10 if len(asked) == 2 else 0
        return clock()

    server = threading.Thread(target=measure, args=(store, 0, [0, 1], 30, clocks.of(0.0)))
    server.start()
    offset, uncertainty = measure(store, 1, [0, 1], 30, slow_at_first) or [0.0, 0.0]
    server.join()
    assert abs(offset - 2) <= uncertainty < 0.01


def test_other_ranks_of_a_node_do_not_take_part() -> None:
    assert measure(dist.HashStore(), 1, [0, 2], 1) is None


def test_a_question_that_nobody_answers_ends_in_time() -> None:
    with pytest.raises(TimeoutError, match="no answer"):
        measure(dist.HashStore(), 1, [0, 1], 0.05)


ROSTER = world(a=1, b=2, c=1, d=1)


def judged(*offsets: tuple[float, float]) -> list:
    a, b, c, d = (list(offset) for offset in offsets)
    return judge(values(a, b, None, c, d), ROSTER)


def test_near_clocks_are_one_line() -> None:
    (found,) = judged((0, 0), (0.2, 0.001), (-0.4, 0.002), (0.1, 0.001))
    assert found.status == "ok" and "within 0.4000 s" in found.what and "0.0020 s" in found.what


def test_a_clock_that_is_ahead_is_named() -> None:
    found = only(judged((0, 0), (7.5, 0.1), (0.1, 0.1), (0, 0.1)), "warn")
    assert found.nodes == ("b",) and found.ranks == (1, 2) and "b is 7.5 s ahead" in found.what and "give or take 0.100 s" in found.what


def test_a_clock_that_is_behind_is_named() -> None:
    assert "d is 2.0 s behind" in only(judged((0, 0), (0, 0.1), (0.1, 0.1), (-2.0, 0.1)), "warn").what


def test_a_wrong_clock_on_the_first_node_is_its_own() -> None:
    found = only(judged((0, 0), (9, 0.1), (9, 0.1), (9.1, 0.1)), "warn")
    assert found.nodes == ("a",) and "a is 9.0 s behind" in found.what


def test_less_than_the_uncertainty_is_no_complaint_about_clocks() -> None:
    assert statuses(judged((0, 0), (1.5, 0.6), (0, 0.1), (0, 0.1))) == ["ok"]
    assert "too long to compare clocks" in only(judged((0, 0), (1.5, 3.0), (0, 0.1), (0, 0.1)), "warn").what


def test_one_node_has_one_clock() -> None:
    assert statuses(judge(values([0, 0], None), world(a=2))) == ["skipped"]


def test_an_error_is_a_fail() -> None:
    found = judge([Outcome([0, 0]), Outcome(error="TimeoutError: no answer")], world(a=1, b=1))
    assert only(found, "FAIL").ranks == (1,)
