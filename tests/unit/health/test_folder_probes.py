"""Probes of a file system by one node, and what is said about their figures."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest
from known_worlds import only, statuses, world

from poet_megatron.health import probes
from poet_megatron.health.filesystem import judge_space, judge_speed

MB, GIB = 1e6, 2**30


def test_a_file_is_seen_when_it_has_its_text(tmp_path: Path) -> None:
    probes.create(tmp_path / "own", "text")
    assert probes.seconds_until_seen(tmp_path / "own" / "hello", "text", 0) is not None
    assert probes.seconds_until_seen(tmp_path / "own" / "hello", "other", 0.1) is None
    assert probes.seconds_until_seen(tmp_path / "none", "text", 0.1) is None


def test_a_file_that_comes_late_is_waited_for(tmp_path: Path) -> None:
    timer = threading.Timer(0.2, lambda: (tmp_path / "late").write_text("x"))
    timer.start()
    assert probes.seconds_until_seen(tmp_path / "late", "x", 30) is not None
    timer.join()


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    assert probes.write_rate(tmp_path / "large", 3 * probes.MIB, 7) > 0
    assert (tmp_path / "large").stat().st_size == 3 * probes.MIB
    data = (tmp_path / "large").read_bytes()
    assert len({data[start : start + probes.MIB] for start in range(0, len(data), probes.MIB)}) == 3, "no two pieces alike"
    assert probes.read_rate(tmp_path / "large", 3 * probes.MIB, 7) > 0


@pytest.mark.parametrize(("place", "number"), [(0, 0), (2 * probes.MIB + 17, 2)])
def test_one_wrong_byte_is_found(tmp_path: Path, place: int, number: int) -> None:
    probes.write_rate(tmp_path / "large", 3 * probes.MIB, 7)
    with (tmp_path / "large").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=f"large differs from what was written, in MiB {number}"):
        probes.read_rate(tmp_path / "large", 3 * probes.MIB, 7)


def test_a_file_of_another_node_or_length_is_found(tmp_path: Path) -> None:
    probes.write_rate(tmp_path / "large", 2 * probes.MIB, 1)
    with pytest.raises(ValueError, match="in MiB 0"):
        probes.read_rate(tmp_path / "large", 2 * probes.MIB, 2)
    with pytest.raises(ValueError):
        probes.read_rate(tmp_path / "large", 3 * probes.MIB, 1)


def test_small_files_are_made_durable_and_stay(tmp_path: Path) -> None:
    assert probes.latency(tmp_path, "small") > 0
    assert len(list(tmp_path.iterdir())) == probes.FILES and not list(tmp_path.glob("*.partial"))


def test_a_lock_is_refused_while_it_is_held(tmp_path: Path) -> None:
    held = probes.take_lock(tmp_path / "lock")
    assert probes.lock_is_refused(tmp_path / "lock")
    os.close(held)
    assert not probes.lock_is_refused(tmp_path / "lock")


def test_locks_that_do_not_exist_are_not_taken_for_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(OSError, match="No locks available"):
        probes.lock_is_refused(tmp_path / "lock")


def test_the_type_of_a_file_system_is_that_of_the_nearest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nserver:/x {tmp_path}/with\\040space nfs4 rw 0 0\ntmpfs {tmp_path}/with tmpfs rw 0 0\n")
    assert probes.kind(tmp_path / "with space" / "deep", mounts) == "nfs4"
    assert probes.kind(tmp_path / "with", mounts) == "tmpfs"
    assert probes.kind(tmp_path / "other", mounts) == "ext4"
    assert probes.kind(tmp_path, tmp_path / "none") == "unknown"


def figures(**changes: dict[str, float]) -> dict[str, dict[str, float]]:
    """Three healthy nodes, but for changes."""
    return {node: {"seconds": 0.01, "write": 500 * MB, "read": 900 * MB, "free": 100 * GIB} | changes.get(node, {}) for node in "abc"}


ROSTER = world(a=1, b=2, c=1)


def test_healthy_figures_are_one_line() -> None:
    (found,) = judge_speed(figures(b={"write": 400 * MB}), ROSTER)
    assert found.status == "ok" and "10.0 ms" in found.what and "write 400, read 900 MB/s" in found.what


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seconds": 0.9}, "900 ms to make a small file durable"),
        ({"write": 20 * MB}, "write 20 MB/s"),
        ({"read": 300 * MB}, "read 300 MB/s (median node 900)"),
    ],
)
def test_a_slow_node_is_named(change: dict[str, float], words: str) -> None:
    found = only(judge_speed(figures(b=change), ROSTER), "warn")
    assert words in found.what and found.nodes == ("b",) and found.ranks == (1, 2)


def test_a_file_system_that_is_slow_everywhere_is_said_of_every_node() -> None:
    found = judge_speed(figures(a={"write": 20 * MB}, b={"write": 20 * MB}, c={"write": 20 * MB}), ROSTER)
    assert statuses(found) == ["warn"] * 3 and [one.nodes for one in found] == [("a",), ("b",), ("c",)]


def test_two_nodes_are_not_compared_with_their_median() -> None:
    two = {node: figure for node, figure in figures(b={"read": 300 * MB}).items() if node != "c"}
    assert statuses(judge_speed(two, ROSTER)) == ["ok"]


@pytest.mark.parametrize(("free", "status"), [(60 * GIB, "ok"), (49 * GIB, "warn"), (GIB // 2, "FAIL")])
def test_space_is_that_of_the_node_that_sees_least(free: int, status: str) -> None:
    (found,) = judge_space(figures(c={"free": free}), ROSTER)
    assert found.status == status
    assert status == "ok" or found.nodes == ("c",)
