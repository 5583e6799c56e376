"""poet_cuda_skew_unpack and poet_cuda_skew_pack_grad against the torch reference. They move and subtract fp32 numbers: exact equality."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from harness import Device, LaunchError, Simulator

from poet_megatron.ops.skew import packed_length, skew_pack_grad, skew_unpack

pytest_plugins = ("cuda_fixtures",)

SOURCE = "skew.cu"
SIZES = [1, 2, 16, 20, 32, 64, 100, pytest.param(128, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow), 300]


def _count(b: int) -> int:
    return 2 if b > 100 else 5


def _packed(b: int) -> torch.Tensor:
    return torch.randn(_count(b), packed_length(b), generator=torch.Generator().manual_seed(b))


def _unpack(device: Device, packed: torch.Tensor, b: int, padding: int = 0, seed: int = 0, defines: tuple[str, ...] = ()) -> torch.Tensor:
    library = device.load(SOURCE, defines)
    count, length = packed.shape
    source, q = device.tensor(packed, stride=length + padding), device.empty((count, b, b))
    with device.checked(seed):
        device.call(library.poet_cuda_skew_unpack, source, length + padding, q, count, b)
    return q.read()


def _pack(device: Device, dq: torch.Tensor, padding: int = 0, seed: int = 0, defines: tuple[str, ...] = ()) -> torch.Tensor:
    library = device.load(SOURCE, defines)
    count, b, _ = dq.shape
    length = packed_length(b)
    source, packed = device.tensor(dq), device.empty((count, length), stride=length + padding)
    with device.checked(seed):
        device.call(library.poet_cuda_skew_pack_grad, source, packed, length + padding, count, b)
    assert packed.padding_untouched()
    return packed.read()


@pytest.mark.parametrize("b", SIZES)
def test_unpack(device: Device, b: int, seed: int) -> None:
    packed = _packed(b)
    assert torch.equal(_unpack(device, packed, b, seed=seed), skew_unpack(packed, b))


@pytest.mark.parametrize("b", SIZES)
def test_pack_grad(device: Device, b: int, seed: int) -> None:
    dq = torch.randn(_count(b), b, b, generator=torch.Generator().manual_seed(b))
    assert torch.equal(_pack(device, dq, seed=seed), skew_pack_grad(dq))


@pytest.mark.parametrize("b", [20, 64, 300])
def test_rows_of_the_packed_form_may_be_padded(device: Device, b: int) -> None:
    packed = _packed(b)
    assert torch.equal(_unpack(device, packed, b, padding=3), skew_unpack(packed, b))
    dq = torch.randn(2, b, b)
    assert torch.equal(_pack(device, dq, padding=3), skew_pack_grad(dq))


def test_nothing_to_do_and_impossible_shapes(device: Device) -> None:
    library = device.load(SOURCE)
    device.call(library.poet_cuda_skew_unpack, None, 0, None, 0, 16)
    device.call(library.poet_cuda_skew_pack_grad, None, None, 0, 3, 1)
    for count, b in [(-1, 16), (1, -16), (2**31, 16), (1, 65536 * 32)]:
        with pytest.raises(LaunchError) as error:
            device.call(library.poet_cuda_skew_unpack, None, 0, None, count, b)
        assert error.value.status == -2


def test_rows_beyond_two_to_the_31_elements(simulator: Simulator) -> None:
    """Two rows 2^31 + 8 floats apart: the memory between them is reserved, never touched."""
    b, ld = 16, 2**31 + 8
    packed, length = _packed(b)[:2], packed_length(b)
    reserved = np.empty(ld + length, dtype=np.float32)
    for row in range(2):
        reserved[row * ld : row * ld + length] = packed[row].numpy()
        simulator.sim.register(reserved[row * ld : row * ld + length])
    q, library = simulator.empty((2, b, b)), simulator.load(SOURCE)
    with simulator.checked():
        simulator.call(library.poet_cuda_skew_unpack, reserved.ctypes.data, ld, q, 2, b)
        simulator.call(library.poet_cuda_skew_pack_grad, simulator.tensor(q.read()), reserved.ctypes.data, ld, 2, b)
    assert torch.equal(q.read(), skew_unpack(packed, b))
    assert torch.equal(torch.from_numpy(reserved[ld:]), 2 * packed[1])
    simulator.sim.unregister(reserved[:length], reserved[ld:])


@pytest.mark.parametrize("b", [16, 32, 64])
def test_global_accesses_are_contiguous(simulator: Simulator, b: int) -> None:
    """Every sector moved is used: the packed form is read from sector boundaries on, Q written in whole sectors."""
    with simulator.counted() as kernels:
        _unpack(simulator, _packed(b), b)
        _pack(simulator, torch.randn(_count(b), b, b))
    assert len(kernels) == 2
    for kernel in kernels.values():
        assert kernel["global_load"]["efficiency"] >= 0.95
        assert kernel["global_store"]["efficiency"] >= 0.95
        assert kernel["traffic_over_compulsory"] <= 1.3
        if b == 64:  # in smaller blocks several rows meet in a request, and an odd pitch suits single rows and columns only
            assert kernel["shared"]["bank_conflict_factor"] <= 1.35


def test_packed_rows_are_read_from_sector_boundaries(simulator: Simulator) -> None:
    """Rows that start anywhere cost one more sector at their ends, not one per request (which would be 0.8)."""
    with simulator.counted() as kernels:
        _unpack(simulator, _packed(64), 64, padding=3)
        _pack(simulator, torch.randn(5, 64, 64), padding=3)
    unpack, pack = kernels.values()
    assert min(unpack["global_load"]["efficiency"], pack["global_store"]["efficiency"]) >= 0.97


@pytest.mark.parametrize(("fault", "check"), [("NO_BARRIER", "racecheck"), ("DIVERGENT_BARRIER", "synccheck"), ("TAIL", "memcheck")])
def test_planted_fault_is_found(simulator: Simulator, fault: str, check: str) -> None:
    defines = (f"POET_FAULT_{fault}",)
    with simulator.finds(check):
        _run_unchecked_unpack(simulator, defines)
    with simulator.finds(check):
        _run_unchecked_pack(simulator, defines)


def test_planted_wrong_sign_is_found(simulator: Simulator) -> None:
    defines = ("POET_FAULT_SIGN",)
    packed, dq = _packed(32), torch.randn(2, 32, 32)
    assert not torch.equal(_unpack(simulator, packed, 32, defines=defines), skew_unpack(packed, 32))
    assert not torch.equal(_pack(simulator, dq, defines=defines), skew_pack_grad(dq))


def _run_unchecked_unpack(device: Device, defines: tuple[str, ...]) -> None:
    packed = _packed(32)
    device.call(
        device.load(SOURCE, defines).poet_cuda_skew_unpack, device.tensor(packed), packed.shape[1], device.empty((5, 32, 32)), 5, 32
    )


def _run_unchecked_pack(device: Device, defines: tuple[str, ...]) -> None:
    packed = device.empty((1, packed_length(32)))
    device.call(device.load(SOURCE, defines).poet_cuda_skew_pack_grad, device.tensor(torch.randn(1, 32, 32)), packed, packed.width, 1, 32)
