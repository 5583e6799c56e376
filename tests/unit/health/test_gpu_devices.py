"""Every rank its own GPU, all alike: planted faults in what ranks would see on GPU nodes (there is no GPU here)."""

from __future__ import annotations

import warnings

import pytest
import torch
from known_worlds import GIB, gpu, only, statuses, world

from poet_megatron.health import devices
from poet_megatron.health.devices import Devices, judge, read, usable


def test_healthy_gpus_are_counted() -> None:
    roster = world(a=2, b=2)
    seen = [gpu(0), gpu(1), gpu(2), gpu(3)]
    (found,) = judge(seen, roster, "")
    assert found.status == "ok" and "4 x H100, 80 GiB" in found.what
    assert usable(seen, roster)


def test_two_ranks_on_one_gpu_fail_with_their_node() -> None:
    roster = world(a=2, b=2)
    seen = [gpu(0), gpu(1), gpu(2), gpu(3, uuid="GPU-2")]
    found = only(judge(seen, roster, ""), "FAIL")
    assert found.ranks == (2, 3) and found.nodes == ("b",) and "GPU-2" in found.what and "LOCAL_RANK" in found.fix
    assert not usable(seen, roster)


def test_the_same_uuid_on_two_nodes_is_no_fault() -> None:
    """Fake or virtual GPUs may have the same name on two machines; within one it is one device."""
    assert statuses(judge([gpu(0), gpu(0)], world(a=1, b=1), "")) == ["ok"]


def test_fewer_gpus_than_ranks_fail() -> None:
    seen = [gpu(0, count=1), gpu(1, count=1, name="", uuid="", memory=0)]
    roster = world(a=2)
    found = only(judge(seen, roster, ""), "FAIL")
    assert found.ranks == (1,) and "LOCAL_RANK 1" in found.what and "only 1 GPU" in found.what and "--gpus-per-node" in found.fix
    assert not usable(seen, roster)


def test_a_gpu_that_does_not_work_fails() -> None:
    seen = [gpu(0), gpu(1, name="", uuid="", memory=0, error="CUDA error: uncorrectable ECC error encountered")]
    found = only(judge(seen, world(a=1, b=1), ""), "FAIL")
    assert found.ranks == (1,) and found.nodes == ("b",) and "uncorrectable ECC error" in found.what and "drain" in found.fix


@pytest.mark.parametrize("change", [{"name": "A100"}, {"memory": 40 * GIB}])
def test_another_gpu_than_most_is_a_warning(change: dict) -> None:
    found = only(judge([gpu(0), gpu(1), gpu(2, **change)], world(a=2, b=1), ""), "warn")
    assert found.ranks == (2,) and found.nodes == ("b",) and "H100 with 80.0 GiB" in found.what


def test_a_little_less_memory_is_alike() -> None:
    assert statuses(judge([gpu(0), gpu(1, memory=int(79.9 * GIB))], world(a=2), "")) == ["ok"]


def test_a_node_without_gpus_among_others_fails() -> None:
    found = only(judge([gpu(0), Devices("12.8")], world(a=1, b=1), ""), "FAIL")
    assert found.nodes == ("b",) and "only 0 GPU" in found.what


def test_no_gpu_anywhere_is_skipped_unless_some_were_promised() -> None:
    cpu_build, cuda_build = [Devices(None)] * 2, [Devices("12.8", error="driver too old")] * 2
    roster = world(a=2)
    assert statuses(judge(cpu_build, roster, "")) == ["skipped"] and statuses(judge(cuda_build, roster, "")) == ["skipped"]
    found = only(judge(cpu_build, roster, "CUDA_VISIBLE_DEVICES=0,1"), "warn")
    assert "built for CPUs" in found.what and "CUDA_VISIBLE_DEVICES=0,1" in found.what
    assert "driver too old" in only(judge(cuda_build, roster, "SLURM_GPUS_ON_NODE=8"), "FAIL").what


class FakeProperties:
    """What torch.cuda.get_device_properties returns."""

    name = "NVIDIA H100 80GB HBM3"
    uuid = "9a1f-77"
    total_memory = 80 * GIB


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that sees two GPUs (a mock)."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: FakeProperties)
    monkeypatch.setattr(devices.torch, "zeros", lambda *_, **__: None)


def test_reading_takes_the_gpu_of_the_local_rank(two_gpus: None) -> None:
    assert read(1) == Devices(torch.version.cuda, 2, "NVIDIA H100 80GB HBM3", "GPU-9a1f-77", 80 * GIB)
    assert read(2) == Devices(torch.version.cuda, 2)


def test_a_listed_gpu_is_tried(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: device-side failure\nmore lines")

    monkeypatch.setattr(devices.torch, "zeros", fail)
    assert read(0) == Devices(torch.version.cuda, 2, error="CUDA error: device-side failure")


def test_the_reason_of_a_driver_that_does_not_start_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def unavailable() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nmore", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    assert read(0).error == "CUDA initialization: the driver is too old"
