"""Bandwidths from times, slow nodes, and what is skipped in a world of one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from known_worlds import only, statuses, values, world

from poet_megatron.health import network
from poet_megatron.health.control import Control, Step
from poet_megatron.health.network import Network
from poet_megatron.health.report import Report


def net(roster_size: int = 4) -> Network:
    roster = world(a=2, b=2) if roster_size == 4 else world(a=1)
    store = dist.HashStore()
    return Network(Control(store, 0, roster_size, 20), roster, "gloo", torch.device("cpu"), dist.PrefixStore("collectives", store))


def test_bandwidths_are_those_of_the_slowest_rank() -> None:
    """4 MiB in 2 ms over 4 ranks: 2.097 GB/s, and a ring sends 2 * 3/4 of the tensor over each link."""
    step = Step(None, False, values(*({"wrong": [], "seconds": seconds} for seconds in (0.001, 0.002, 0.001, 0.0005))))
    rate = network._rate(net(), [0, 1, 2, 3], step)
    assert rate["algorithm_GBps"] == pytest.approx(2**22 / 0.002 / 1e9) and rate["bus_GBps"] == pytest.approx(1.5 * 2**22 / 0.002 / 1e9)
    pair = network._rate(net(), [2, 3], step)
    assert pair["algorithm_GBps"] == pair["bus_GBps"] == pytest.approx(2**22 / 0.001 / 1e9)


def test_a_rank_without_a_figure_leaves_its_group_without_one() -> None:
    step = Step(None, True, values({"wrong": [], "seconds": 0.001}, None, None, None))
    assert network._rate(net(), [0, 1], step) == {}
    assert network._rate(net(), [0, 1], Step(None, False)) == {}, "not rank 0"


def test_a_node_below_half_of_the_median_node_is_named() -> None:
    roster = world(a=2, b=2, c=2)
    found = only(network._judge_inside({"a": 100.0, "b": 45.0, "c": 100.0}, roster), "warn")
    assert found.nodes == ("b",) and found.ranks == (2, 3) and "NVLink" in found.fix
    assert statuses(network._judge_inside({"a": 100.0, "b": 50.0, "c": 100.0}, roster)) == ["ok"]


def test_a_world_of_one_still_adds_up() -> None:
    report = Report(1)
    one = net(1)
    try:
        network.examine(one, report)
        found = {finding.check: finding.status for finding in report.findings}
        expected = {"connect": "ok", "sums": "ok", "all ranks": "skipped", "inside nodes": "skipped", "node pairs": "skipped"}
        assert found == expected
    finally:
        network.leave(one.device, stuck=False)
    assert not dist.is_initialized()


def test_after_a_failure_the_rest_is_skipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no interface")

    monkeypatch.setattr(network.dist, "init_process_group", fail)
    report = Report(1)
    network.examine(net(1), report)
    assert statuses(report.findings) == ["FAIL", "skipped", "skipped", "skipped"]
    assert "first gloo collective: RuntimeError: no interface on rank 0 on a" in report.findings[0].what
    assert all("failure of: connect" in finding.what for finding in report.findings[1:])
