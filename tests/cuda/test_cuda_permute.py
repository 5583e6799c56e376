"""poet_cuda_permute_columns: moves numbers, so results are exact."""

from __future__ import annotations

import pytest
import torch
from harness import Device, LaunchError, Simulator
from torch import Tensor

pytest_plugins = ("cuda_fixtures",)

SOURCE = "permute_columns.cu"
DTYPES = [torch.float32, torch.bfloat16]
SLOW_FAULT = pytest.param("DIVERGENT_BARRIER", "synccheck", marks=pytest.mark.slow)


def _permute(
    device: Device, x: Tensor, order: Tensor | None, stride: int = 0, seed: int = 0, shift: int = 0, defines: tuple[str, ...] = ()
) -> Tensor:
    """Rows `stride` apart on both sides, the first one `shift` elements into its allocation."""
    rows, width = x.shape
    stride = stride or width
    padded = torch.nn.functional.pad(x, (shift, 0))
    source, target = device.tensor(padded, stride=stride + shift), device.empty((rows, width), x.dtype, stride=stride)
    index = None if order is None else device.tensor(order.int())
    launcher = device.load(SOURCE, defines).poet_cuda_permute_columns
    first = source.pointer + shift * x.element_size()
    with device.checked(seed):
        device.call(launcher, int(x.dtype == torch.bfloat16), first, stride + shift, index, target, stride, rows, width)
    assert device.name != "simulator" or target.padding_untouched()
    return target.read()


def _case(dtype: torch.dtype, rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * width)
    return torch.randn(rows, width, generator=generator).to(dtype), torch.randperm(width, generator=generator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 33, 256, 700, 1376])
def test_permute(device: Device, dtype: torch.dtype, width: int, seed: int) -> None:
    """19 rows: two full groups of 8 (five of 4) and one that is not full."""
    x, order = _case(dtype, 19, width)
    assert torch.equal(_permute(device, x, order, seed=seed), x[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stride", "shift"), [(104, 0), (101, 0), (100, 1), (107, 3), (102, 2)])
def test_strides_and_alignments(device: Device, dtype: torch.dtype, stride: int, shift: int) -> None:
    x, order = _case(dtype, 9, 99)
    assert torch.equal(_permute(device, x, order, stride, shift=shift), x[:, order])
    assert torch.equal(_permute(device, x, None, stride, shift=shift), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [12000, 26000, 26001, 50001, 60001])
def test_rows_too_wide_for_16_byte_slots(device: Device, dtype: torch.dtype, width: int) -> None:
    """12,000: 8-byte slots on sm_80; 26,000: 4-byte slots; 50,000: more than sm_80 holds; 60,000: more than any."""
    x, order = _case(dtype, 3, width)
    assert torch.equal(_permute(device, x, order), x[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_may_repeat(device: Device, dtype: torch.dtype) -> None:
    """The kernel gathers: `order` need not be a permutation."""
    x, _ = _case(dtype, 5, 40)
    order = torch.randint(0, 40, (40,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(_permute(device, x, order), x[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 77, 78, 2048])
def test_no_order_is_a_copy(device: Device, dtype: torch.dtype, width: int, seed: int) -> None:
    x, _ = _case(dtype, 7, width)
    assert torch.equal(_permute(device, x, None, seed=seed), x)


def test_nothing_to_do_and_impossible_arguments(device: Device) -> None:
    launcher = device.load(SOURCE).poet_cuda_permute_columns
    device.call(launcher, 0, None, 8, None, None, 8, 0, 8)
    device.call(launcher, 1, None, 0, None, None, 0, 8, 0)
    for dtype, rows, width, status in [(2, 4, 4, -1), (0, -1, 4, -2), (0, 4, -1, -2)]:
        with pytest.raises(LaunchError) as error:
            device.call(launcher, dtype, None, 4, None, None, 4, rows, width)
        assert error.value.status == status


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_architectures(simulator: Simulator, arch: int, dtype: torch.dtype) -> None:
    simulator.arch = arch
    for width in (33, 256, 14001):
        x, order = _case(dtype, 19, width)
        assert torch.equal(_permute(simulator, x, order), x[:, order])


@pytest.mark.parametrize("dtype", DTYPES)
def test_traffic(simulator: Simulator, dtype: torch.dtype) -> None:
    """Contiguous on both global sides; `order` is read once per group of rows, 4 bytes against 32 of x and y.

    The slots of a gather are random: 8 lanes meet in 8 bank groups 2.6 deep on average, the writes are free of conflicts: (1 + 2.6) / 2.
    """
    x, order = _case(dtype, 32, 2048)
    with simulator.counted() as kernels:
        _permute(simulator, x, order)
    (kernel,) = kernels.values()
    assert kernel["global_load"]["efficiency"] >= 0.99 and kernel["global_store"]["efficiency"] >= 0.99
    assert kernel["traffic_over_compulsory"] <= 1.3
    assert kernel["shared"]["bank_conflict_factor"] <= 1.9
    with simulator.counted() as kernels:
        _permute(simulator, x, torch.arange(2048))
    (kernel,) = kernels.values()
    assert kernel["shared"]["bank_conflict_factor"] <= 1.01  # without a permutation there is none


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fault", "check"), [("NO_BARRIER", "racecheck"), ("TAIL", "memcheck"), SLOW_FAULT])
def test_planted_fault_is_found(simulator: Simulator, fault: str, check: str, dtype: torch.dtype) -> None:
    x, order = _case(dtype, 9, 700)
    launcher = simulator.load(SOURCE, (f"POET_FAULT_{fault}",)).poet_cuda_permute_columns
    source, index, target = simulator.tensor(x), simulator.tensor(order.int()), simulator.empty(x.shape, dtype)
    with simulator.finds(check):
        simulator.call(launcher, int(dtype == torch.bfloat16), source, 700, index, target, 700, 9, 700)


def test_planted_bank_conflicts_are_counted(simulator: Simulator) -> None:
    x, order = _case(torch.bfloat16, 8, 2048)
    found = []
    for defines in ((), ("POET_FAULT_NO_SWIZZLE",)):
        with simulator.counted() as kernels:
            _permute(simulator, x, torch.arange(2048), defines=defines)
        found.append(next(iter(kernels.values()))["shared"]["bank_conflict_factor"])
    assert found[0] <= 1.01 and found[1] >= 1.9
