"""Clocks and memory errors: planted readings, each complaint with its rank and node."""

from __future__ import annotations

import time
from dataclasses import asdict

import pytest
import torch
from known_worlds import only, state, statuses, values, world

from poet_megatron.health import clocks
from poet_megatron.health.clocks import judge, read_under_load
from poet_megatron.health.control import Outcome
from poet_megatron.health.gpu_state import NotReadable
from poet_megatron.health.report import Finding

ROSTER = world(a=2, b=2)


def judged(*changes: dict) -> list[Finding]:
    return judge(values(*(asdict(state(**change)) for change in changes)), ROSTER)


def test_healthy_gpus_are_one_line_each_for_clocks_and_memory() -> None:
    found = judged({}, {}, {"sm_mhz": 1700.0}, {"temperature_c": 70.0})
    assert statuses(found) == ["ok", "ok"]
    assert "1700 to 1755 of 1980 MHz" in found[0].what and "at most 70 C" in found[0].what and "held by the power cap" in found[0].what
    assert "no uncorrectable errors" in found[1].what and "4 GPUs" in found[1].what


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reasons": 0x48}, "hardware slowdown and hardware thermal slowdown"),
        ({"reasons": 0x80}, "hardware power brake"),
        ({"reasons": 0x20}, "software thermal slowdown"),
        ({"reasons": 0x2}, "a fixed application clock"),
        ({"sm_mhz": 1200.0}, "1200 MHz under load, the median is 1755"),
        ({"power_limit_w": 500.0}, "power cap 500 W instead of 700 W"),
        ({"temperature_c": 88.0}, "88 C"),
    ],
)
def test_one_slow_gpu_is_named(change: dict, words: str) -> None:
    found = only(judged({}, {}, {}, change), "warn")
    assert found.check == "clocks" and words in found.what and found.ranks == (3,) and found.nodes == ("b",) and "rank 3 on b" in found.what


def test_the_power_cap_and_idling_are_no_complaint() -> None:
    assert statuses(judged({"reasons": 0x5}, {"reasons": 0}, {"reasons": None}, {})) == ["ok", "ok"]


def test_all_gpus_slow_is_seen_against_their_maximum() -> None:
    found = only(judged(*[{"sm_mhz": 900.0}] * 4), "warn")
    assert found.ranks == (0, 1, 2, 3) and "900 of 1980 MHz" in found.what


def test_a_tenth_below_the_median_is_still_fine() -> None:
    assert statuses(judged({}, {}, {}, {"sm_mhz": 1580.0})) == ["ok", "ok"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"uncorrectable": 1, "uncorrectable_ever": 1}, "FAIL", "1 uncorrectable memory error(s) since the driver was loaded"),
        ({"pending": True}, "FAIL", "waits to be replaced"),
        ({"remap_failed": True}, "FAIL", "no spare rows"),
        ({"uncorrectable_ever": 2}, "warn", "2 uncorrectable memory error(s) in its life"),
        ({"ecc_on": False}, "warn", "ECC is off"),
    ],
)
def test_memory_errors_are_named(change: dict, status: str, words: str) -> None:
    found = only([one for one in judged({}, {}, change, {}) if one.check == "gpu memory"], status)
    assert words in found.what and found.ranks == (2,) and found.nodes == ("b",) and found.fix


def test_gpus_that_do_not_tell_are_skipped() -> None:
    found = judged(*[{"uncorrectable": None, "uncorrectable_ever": None, "ecc_on": None, "pending": None}] * 4)
    assert statuses(found) == ["ok", "skipped"]


def test_a_world_without_gpus_is_skipped() -> None:
    assert statuses(judge(values(None, None, None, None), ROSTER)) == ["skipped", "skipped"]


def test_no_way_to_ask_on_any_rank_is_skipped_with_the_reason() -> None:
    found = judge(values(*[{"unreadable": "nvidia-smi is not on PATH"}] * 4), ROSTER)
    assert statuses(found) == ["skipped", "skipped"] and "not on PATH" in found[0].what and "nvidia-ml-py" in found[0].what


def test_one_gpu_that_cannot_be_read_is_a_warning_and_one_that_hangs_a_fail() -> None:
    found = judge(values(*[asdict(state())] * 3, {"unreadable": "nvidia-smi failed with status 255"}), ROSTER)
    assert only(found, "warn").ranks == (3,)
    found = judge(values({"unreadable": "nvidia-smi did not answer within 30 s"}, None, None, None), ROSTER)
    assert only(found, "FAIL").ranks == (0,)


def test_a_gpu_that_fails_under_load_fails() -> None:
    outcomes = [*values(*[asdict(state())] * 3), Outcome(error="AcceleratorError: CUDA error: uncorrectable ECC error")]
    found = only(judge(outcomes, ROSTER), "FAIL")
    assert found.ranks == (3,) and "uncorrectable ECC error on rank 3 on b" in found.what
    (found,) = judge([*values(None, None, None), Outcome(error="did not finish within 60 s", stuck=True)], ROSTER)
    assert found.status == "FAIL" and found.nodes == ("b",)


def test_a_reading_is_plain_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "read", lambda uuid: state(sm_mhz=1500.0) if uuid == "GPU-1" else None)
    assert read_under_load("GPU-1", torch.device("cpu")) == asdict(state(sm_mhz=1500.0))

    def fail(uuid: str) -> None:
        raise NotReadable("why not")

    monkeypatch.setattr(clocks, "read", fail)
    assert read_under_load("GPU-1", torch.device("cpu")) == {"unreadable": "why not"}


def test_the_load_runs_while_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of a GPU: the products run on the CPU."""
    products: list[int] = []
    monkeypatch.setattr(clocks, "WIDTH", 4)
    randn = torch.randn
    monkeypatch.setattr(clocks.torch, "randn", lambda *shape, device, dtype: randn(*shape, dtype=dtype))
    monkeypatch.setattr(clocks.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(clocks.torch, "mm", lambda a, b, out: products.append(1))
    deadline = time.monotonic() + 60
    with clocks.load(torch.device("cuda", 0)):
        while len(products) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert len(products) >= 3


def test_an_error_of_the_load_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(clocks.torch, "randn", fail)
    with pytest.raises(RuntimeError, match="CUDA error"), clocks.load(torch.device("cuda", 0)):
        pass
