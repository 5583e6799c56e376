"""Whom a slow rank is compared with, and when it is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from poet_megatron.guard.config import GuardConfig
from poet_megatron.guard.stragglers import OwnTimes, StragglerMeter, describe


def times(*seconds: float, stages: tuple[int, ...] = ()) -> OwnTimes:
    return OwnTimes(7, tuple((0.25, total - 0.25) for total in seconds), stages or (0,) * len(seconds))


def meter(**settings: Any) -> StragglerMeter:
    engine: Any = SimpleNamespace(context=SimpleNamespace(world_size=4, nodes=("a", "b", "c", "d")))
    return StragglerMeter(engine, GuardConfig(**settings))


def test_stages_are_not_compared_with_each_other():
    """The second stage has the head and takes twice as long, on both replicas: nobody is slow."""
    found = times(1.0, 1.0, 2.0, 2.0, stages=(0, 0, 1, 1))
    assert [found.ratio(rank) for rank in range(4)] == [1.0] * 4
    slow = times(1.0, 1.5, 2.0, 2.0, stages=(0, 0, 1, 1))  # not the rank with the largest time of all
    assert (slow.slowest, slow.ratio(1)) == (1, 1.5)


def test_a_rank_that_is_alone_in_its_stage_is_compared_with_all_others():
    found = times(1.0, 3.0, 1.0, stages=(0, 1, 2))
    assert (found.slowest, found.ratio(1), found.peers(1)) == (1, 3.0, [0, 2])


def test_the_slow_rank_is_no_part_of_the_median():
    assert times(1.0, 2.0).ratio(1) == 2.0
    assert times(1.0, 3.0, 5.0, 8.0).ratio(3) == pytest.approx(8 / 3)


def test_a_straggler_is_named_when_it_was_slow_twice_in_a_row():
    """The same rank; once may be chance."""
    subject = meter(straggler_ratio=1.3)
    said = []
    for seconds in ((1, 1, 1, 1.4), (1, 1, 1, 1.4), (1, 1, 1, 1.2), (1, 1, 1, 1.4), (1.4, 1, 1, 1), (1.4, 1, 1, 1)):
        subject.last = times(*seconds)
        said.append(subject.report())
    assert [bool(line) for line in said] == [False, True, False, False, False, True]
    assert said[1].startswith("straggler: rank 3 (d) took 1.400 s") and said[5].startswith("straggler: rank 0 (a) took 1.400 s")


def test_the_part_in_which_it_loses_time_is_named():
    rows = [(0.1, 1.0)] * 3
    assert "mostly in loading data" in describe(OwnTimes(7, (*rows, (0.9, 1.1)), (0,) * 4), ())
    assert "mostly in forward and backward" in describe(OwnTimes(7, (*rows, (0.2, 1.9)), (0,) * 4), ())


@pytest.mark.parametrize(("step", "interval", "due"), [(1, 1, False), (2, 1, True), (100, 100, True), (101, 100, False), (100, 0, False)])
def test_which_steps_are_measured(step: int, interval: int, due: bool):
    assert meter(straggler_interval=interval).due(step) == due
