"""Steps and roll call over a key-value store, ranks as threads: who is missing, silent, stuck, or twice there."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from poet_megatron.errors import UserError
from poet_megatron.health import control as control_module
from poet_megatron.health.control import Control, Silent, bounded
from poet_megatron.health.outcomes import errors
from poet_megatron.health.roll_call import NotAllCame, open_stores, roll_call
from poet_megatron.health.roster import Launch, Roster


@pytest.fixture(autouse=True)
def little_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "GRACE_SECONDS", 0.2)


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """What each rank returned or raised."""
    found: list[Any] = [None] * len(works)

    def run(rank: int) -> None:
        try:
            found[rank] = works[rank]()
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def controls(size: int, timeout: float) -> list[Control]:
    store = dist.HashStore()
    return [Control(store, rank, size, timeout) for rank in range(size)]


def test_rank_0_gets_all_values_and_everybody_its_own() -> None:
    first, second = in_threads(*(lambda one=one: one.step("s", lambda: one.rank * 10) for one in controls(2, 20)))
    assert [outcome.value for outcome in first.outcomes] == [0, 10] and first.own == 0 and not first.failed
    assert second.outcomes == [] and second.own == 10 and not second.failed


def test_everybody_learns_that_one_failed() -> None:
    def work(one: Control) -> None:
        if one.rank == 1:
            raise ValueError("first line\nsecond line")

    steps = in_threads(*(lambda one=one: one.step("s", lambda: work(one)) for one in controls(3, 20)))
    assert all(step.failed for step in steps)
    assert [outcome.error for outcome in steps[0].outcomes] == ["", "ValueError: first line", ""]


def test_work_that_hangs_is_left_behind() -> None:
    release = threading.Event()
    ranks = controls(2, 0.3)
    first, _ = in_threads(*(lambda one=one: one.step("s", release.wait if one.rank else lambda: None) for one in ranks))
    release.set()
    assert first.outcomes[1].stuck and first.outcomes[1].error == "did not finish within 0 s"
    assert ranks[1].stuck and not ranks[0].stuck


def test_ranks_that_give_no_answer_are_named_on_every_rank() -> None:
    """Ranks 1 and 3 ended before the step."""
    ranks = controls(4, 0.3)
    found = in_threads(*(lambda one=one: one.step("s", lambda: None) for one in (ranks[0], ranks[2])))
    assert all(isinstance(error, Silent) and error.ranks == (1, 3) and error.step == "s" for error in found)


def test_a_rank_0_that_is_gone_is_named() -> None:
    (error,) = in_threads(lambda: controls(2, 0.2)[1].step("s", lambda: None))
    assert isinstance(error, Silent) and error.ranks == (0,)
    (error,) = in_threads(lambda: controls(2, 0.2)[1].told("word"))
    assert isinstance(error, Silent) and error.ranks == (0,)


class GoneStore:
    """What a connection does when the process that serves it has ended."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("Connection reset by peer")


def test_a_store_that_is_gone_means_that_rank_0_is() -> None:
    with pytest.raises(Silent) as silent:
        Control(GoneStore(), 1, 2, 5).step("s", lambda: None)  # type: ignore[arg-type]
    assert silent.value.ranks == (0,)
    with pytest.raises(NotAllCame, match="rank 1 on a lost rank 0 at 127.0.0.1:29999 during the roll call"):
        roll_call(GoneStore(), launch(1, 2), 5)  # type: ignore[arg-type]


def test_what_rank_0_says_everybody_hears() -> None:
    assert in_threads(*(lambda one=one: one.told("word", f"from {one.rank}") for one in controls(3, 20))) == ["from 0"] * 3


def test_bounded_work_ends_or_is_given_up() -> None:
    assert bounded(lambda: 3, 20).value == 3
    start = time.monotonic()
    assert bounded(lambda: time.sleep(30), 0.05).stuck
    assert time.monotonic() - start < 20


def test_equal_errors_are_one_line_and_those_that_say_more_come_first() -> None:
    roster = Roster([_member(rank, 4, "a" if rank < 2 else "b") for rank in range(4)])
    outcomes = [bounded(work, 0.05) for work in (lambda: time.sleep(1), lambda: 1 / 0, lambda: time.sleep(1), lambda: 3)]
    found = errors("sums", "adding up", outcomes, roster, "mend it")
    assert [one.ranks for one in found] == [(1,), (0, 2)]
    assert found[0].what == "adding up: ZeroDivisionError: division by zero on rank 1 on a" and found[1].nodes == ("a", "b")


# -- roll call --


def _member(rank: int, size: int, node: str) -> Any:
    from poet_megatron.health.roster import Member

    return Member(rank, size, rank % 2, node)


def launch(rank: int, size: int, node: str = "a", **more: Any) -> Launch:
    return Launch(rank, size, rank % 2, node, "127.0.0.1", 29999, **more)


def called(*launches: Launch, timeout: float = 0.5) -> list[Any]:
    store = dist.HashStore()
    return in_threads(*(lambda one=one: roll_call(store, one, timeout) for one in launches))


def test_everybody_knows_everybody() -> None:
    for roster, findings in called(launch(0, 3, "a"), launch(1, 3, "a"), launch(2, 3, "b"), timeout=20):
        assert roster.nodes == {"a": (0, 1), "b": (2,)}
        assert [finding.status for finding in findings] == ["ok"]


def test_ranks_that_do_not_come_are_named_on_every_rank() -> None:
    found = called(launch(0, 5, "a"), launch(1, 5, "a"), launch(3, 5, "b"))
    for error in found:
        assert isinstance(error, NotAllCame) and error.finding.ranks == (2, 4) and error.nodes == {"a": (0, 1), "b": (3,)}
        assert "ranks 2,4 of 5 did not come in time (came: 0-1,3)" in error.finding.what and "127.0.0.1:29999" in error.finding.fix


def test_nodes_that_nobody_came_from_are_named() -> None:
    known = {"local_size": 2, "expected_nodes": ("a", "b", "c")}
    (error, *_) = called(launch(0, 6, "a", **known), launch(1, 6, "a", **known), launch(4, 6, "c", **known))
    assert error.finding.ranks == (2, 3, 5) and error.finding.nodes == ("b", "c")
    assert "nobody came from b, c sent only rank 4" in error.finding.what


def test_two_processes_with_one_rank_are_named() -> None:
    found = called(launch(0, 3, "a"), launch(1, 3, "a"), launch(1, 3, "b"))
    late = [error for error in found if "two processes are rank 1" in error.finding.what and error.finding.ranks == ()]
    assert len(late) == 1 and "rank.sh" in late[0].finding.fix
    assert "rank 2 of 3 did not come" in found[0].finding.what and "two processes are rank 1" in found[0].finding.what


def test_ranks_with_another_world_size_are_named() -> None:
    found = called(launch(0, 2, "a"), launch(1, 3, "b"), timeout=1)
    assert "rank 1 on b: WORLD_SIZE is 3, on rank 0 it is 2" in found[0].finding.what and found[0].finding.ranks == (1,)


def test_two_ranks_with_one_local_rank_are_a_warning() -> None:
    roster, findings = called(launch(0, 3, "a"), launch(1, 3, "a"), launch(2, 3, "a"), timeout=20)[0]
    assert findings[1].status == "warn" and "LOCAL_RANK 0 is taken more than once" in findings[1].what and findings[1].nodes == ("a",)


def test_a_rank_0_that_does_not_answer_is_said() -> None:
    (error,) = called(launch(1, 2))
    assert error.finding.ranks == (0,) and "rank 0 did not answer" in error.finding.what and "MASTER_PORT" in error.finding.fix


# -- stores --


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_rank_0_that_cannot_be_reached_is_said_with_the_reason() -> None:
    port = free_port()
    with pytest.raises(NotAllCame) as caught:
        open_stores(Launch(3, 4, 0, "b", "127.0.0.1", port), 0.3)
    assert f"rank 3 on b cannot reach rank 0 at 127.0.0.1:{port}: Connection refused" in caught.value.finding.what
    assert caught.value.finding.ranks == (0,) and "firewall" in caught.value.finding.fix


def test_a_port_that_is_taken_is_said_by_rank_0() -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        with pytest.raises(
            UserError, match=f"rank 0 on a cannot serve port {taken.getsockname()[1]} .*address already in use.*MASTER_PORT"
        ):
            open_stores(Launch(0, 2, 0, "a", "127.0.0.1", taken.getsockname()[1]), 5)


def test_both_stores_are_one_and_starts_do_not_mix() -> None:
    port = free_port()
    control, collectives = open_stores(Launch(0, 2, 0, "a", "127.0.0.1", port), 20)
    other, _ = open_stores(Launch(1, 2, 0, "b", "127.0.0.1", port), 20)
    later, _ = open_stores(Launch(1, 2, 0, "b", "127.0.0.1", port, attempt="1"), 20)
    control.set("key", "value")
    assert other.check(["key"]) and not later.check(["key"]) and not collectives.check(["key"])


def test_a_world_of_one_needs_no_port() -> None:
    control, _ = open_stores(Launch(0, 1, 0, "a"), 20)
    control.set("key", "value")
    assert control.get("key") == b"value"
