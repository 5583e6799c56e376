"""Cores and memory of ranks: shared cores, too many threads, little memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from known_worlds import GIB, cpu, only, statuses, world

from poet_megatron.health import affinity
from poet_megatron.health.affinity import judge, numa_nodes, read


def test_ranks_with_cores_of_their_own_are_fine() -> None:
    found = judge([cpu(0, 1), cpu(2, 3), cpu(0, 1), cpu(2, 3)], world(a=2, b=2))
    assert statuses(found) == ["ok", "ok"] and found[0].what == "2 per rank" and "64.0 GiB" in found[1].what


def test_ranks_of_one_node_that_share_cores_are_a_warning() -> None:
    found = only(judge([cpu(0, 1), cpu(2, 3), cpu(0, 1), cpu(1, 2)], world(a=2, b=2)), "warn")
    assert found.nodes == ("b",) and found.ranks == (2, 3) and "1 of 3 cores" in found.what and "--cpu-bind=cores" in found.fix


def test_the_same_complaint_of_many_nodes_is_one_line() -> None:
    found = only(judge([cpu(0, 1)] * 6, world(a=2, b=2, c=2)), "warn")
    assert found.nodes == ("a", "b", "c") and "a, b and c" in found.what


def test_ranks_bound_to_a_numa_node_may_share_it() -> None:
    """That is what launch/slurm/rank.sh does: ranks stay next to their GPUs."""
    bound = [cpu(0, 1, numa=(0,), numa_nodes=2), cpu(0, 1, numa=(0,), numa_nodes=2), cpu(2, 3, numa=(1,), numa_nodes=2)]
    found = judge(bound, world(a=3))
    assert statuses(found) == ["ok", "ok"] and "inside one NUMA node" in found[0].what
    unbound = [cpu(0, 1, 2, 3, numa=(0, 1), numa_nodes=2)] * 2
    assert statuses(judge(unbound, world(a=2))) == ["warn", "ok"]


def test_more_threads_than_cores_are_a_warning() -> None:
    found = only(judge([cpu(0, 1, 2, 3, threads=4, numa_nodes=2), cpu(0, 1, 2, 3, threads=4, numa_nodes=2)], world(a=2)), "warn")
    assert "8 threads of torch in 2 ranks for 4 cores" in found.what and found.fix == "set OMP_NUM_THREADS to 2"
    crowded = judge([cpu(0, threads=1, numa_nodes=2)] * 3, world(a=3))
    assert "start fewer ranks" in only(crowded, "warn").fix


def test_little_memory_is_a_warning_per_rank() -> None:
    found = only(judge([cpu(0, memory=7 * GIB), cpu(1, memory=7 * GIB), cpu(0)], world(a=2, b=1)), "warn")
    assert found.nodes == ("a",) and "3.5 GiB free per rank" in found.what


def test_little_shared_memory_is_a_warning() -> None:
    found = only(judge([cpu(0, shared=64 * 2**20), cpu(0, shared=None)], world(a=1, b=1)), "warn")
    assert found.nodes == ("a",) and "0.06 GiB free in /dev/shm" in found.what and "--shm-size" in found.fix


def test_a_system_that_does_not_tell_is_skipped() -> None:
    assert statuses(judge([cpu(), cpu()], world(a=2))) == ["skipped", "ok"]


def test_what_is_read_is_what_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read()
    assert set(found.cores) == os.sched_getaffinity(0) and found.memory > 0
    monkeypatch.delattr(os, "sched_getaffinity")
    assert read().cores == ()


def test_numa_nodes_of_cores(tmp_path: Path) -> None:
    for node, text in {"node0": "0-3,8\n", "node1": "4-7\n", "node10": "\n"}.items():
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(text)
    assert numa_nodes([8], tmp_path) == (0,)
    assert numa_nodes([3, 4], tmp_path) == (0, 1)
    assert numa_nodes([9], tmp_path) == () and numa_nodes([1], tmp_path / "none") == ()


def test_the_tightest_control_group_counts(tmp_path: Path) -> None:
    """As Slurm makes them: the step has no limit of its own, the job above it has."""
    job = tmp_path / "slurm" / "job_1"
    (job / "step_0").mkdir(parents=True)
    (job / "step_0" / "memory.max").write_text("max\n")
    (job / "step_0" / "memory.current").write_text("5\n")
    (job / "memory.max").write_text("1000\n")
    (job / "memory.current").write_text("400\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/slurm/job_1/step_0\n")
    assert min(affinity._cgroup_memory(membership, tmp_path)) == 600
    assert min(affinity._cgroup_memory(tmp_path / "none", tmp_path)) == 2**62
