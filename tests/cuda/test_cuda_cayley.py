"""poet_cuda_series_increment and poet_cuda_series_grad against float64, with at most twice torch's fp32 error."""

from __future__ import annotations

import ctypes

import pytest
import torch
from harness import Device, LaunchError, Simulator, assert_no_worse_than_torch
from torch import Tensor

from poet_megatron.ops.cayley import _polynomial, _polynomial_grad

pytest_plugins = ("cuda_fixtures",)

SOURCE = "cayley.cu"
SEEDED = [16, 20, 32, 64, pytest.param(128, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)]
NEUMANN = [0.0, 2.0, 2.0, 2.0, 2.0, 1.0]  # k = 4


def _inputs(b: int, count: int, norm: float = 0.5) -> tuple[Tensor, Tensor]:
    """Skew blocks of spectral norm about `norm`, and a gradient of their increments."""
    generator = torch.Generator().manual_seed(b)
    u, g = (torch.randn(count, b, b, generator=generator) for _ in range(2))
    upper = u.triu(1)
    return (upper - upper.mT) * (norm / (2 * b**0.5)), g


def _host(coefficients: list[float]) -> ctypes.Array:
    return (ctypes.c_float * len(coefficients))(*coefficients)


def _increment(device: Device, q: Tensor, c: list[float], seed: int = 0, defines: tuple[str, ...] = (), arch: int | None = None) -> Tensor:
    library = device.load(SOURCE, defines, arch)
    count, b, _ = q.shape
    e, work = device.empty(q.shape), device.workspace(library.poet_cuda_series_workspace(count, b, len(c) - 1, 0))
    source = device.tensor(q)
    with device.checked(seed):
        device.call(library.poet_cuda_series_increment, source, e, count, b, _host(c), len(c) - 1, work)
    return e.read()


def _grad(device: Device, q: Tensor, g: Tensor, c: list[float], seed: int = 0, defines: tuple[str, ...] = ()) -> Tensor:
    """D, as the launcher returns it."""
    library = device.load(SOURCE, defines)
    count, b, _ = q.shape
    d, work = device.empty(q.shape), device.workspace(library.poet_cuda_series_workspace(count, b, len(c) - 1, 1))
    source, grad = device.tensor(q), device.tensor(g)
    with device.checked(seed):
        device.call(library.poet_cuda_series_grad, source, grad, d, count, b, _host(c), len(c) - 1, work)
    return d.read()


def _fold(d: Tensor) -> Tensor:
    return d - d.mT


def _check_increment(found: Tensor, q: Tensor, c: list[float]) -> None:
    assert_no_worse_than_torch(found, _polynomial(q.double(), c)[0], _polynomial(q, c)[0])


def _check_grad(found: Tensor, q: Tensor, g: Tensor, c: list[float]) -> None:
    reference = _fold(_autograd(q.double(), g.double(), c))
    assert_no_worse_than_torch(_fold(found), reference, _fold(_polynomial_grad(q, c, g)))


def _autograd(q: Tensor, g: Tensor, c: list[float]) -> Tensor:
    """Gradient of the plain power sum, so that a mistake in Horner's scheme cannot hide in the reference."""
    leaf = q.clone().requires_grad_()
    power, total = torch.eye(q.shape[-1], dtype=q.dtype).expand_as(q), torch.zeros_like(q)
    for coefficient in c[1:]:
        power = power @ leaf
        total = total + coefficient * power
    return torch.autograd.grad(total, leaf, g)[0]


@pytest.mark.parametrize("b", SEEDED)
def test_increment(device: Device, b: int, seed: int) -> None:
    q, _ = _inputs(b, 3 if b <= 64 else 1)
    _check_increment(_increment(device, q, NEUMANN, seed), q, NEUMANN)


@pytest.mark.parametrize("b", SEEDED)
def test_grad(device: Device, b: int, seed: int) -> None:
    q, g = _inputs(b, 3 if b <= 64 else 1)
    _check_grad(_grad(device, q, g, NEUMANN, seed), q, g, NEUMANN)


@pytest.mark.parametrize("b", [1, 7, 33, 71, 100])
def test_any_size(device: Device, b: int) -> None:
    q, g = _inputs(b, 2)
    if b == 1:
        assert not _increment(device, q, NEUMANN).any()
        assert not _fold(_grad(device, q, g, NEUMANN)).any()
    else:
        _check_increment(_increment(device, q, NEUMANN), q, NEUMANN)
        _check_grad(_grad(device, q, g, NEUMANN), q, g, NEUMANN)


@pytest.mark.parametrize("b", [20, 68], ids=["shared", "tiled"])
@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 7, 8, 9, 34])
def test_any_degree(device: Device, b: int, degree: int) -> None:
    q, g = _inputs(b, 2, norm=0.8)
    c = [0.0] + [1.0 + 0.1 * (i % 7) for i in range(degree)]
    _check_grad(_grad(device, q, g, c), q, g, c)
    if degree == 1:
        assert torch.equal(_increment(device, q, c), c[1] * q)
    else:
        _check_increment(_increment(device, q, c), q, c)


@pytest.mark.parametrize("norm", [1e-3, 1.2])
def test_small_and_large_skews(device: Device, norm: float) -> None:
    q, g = _inputs(32, 2, norm)
    _check_increment(_increment(device, q, NEUMANN), q, NEUMANN)
    _check_grad(_grad(device, q, g, NEUMANN), q, g, NEUMANN)


def test_results_do_not_depend_on_the_schedule_or_the_batch(device: Device) -> None:
    for b in (20, 68):
        q, g = _inputs(b, 3)
        together = [(_increment(device, q, NEUMANN, seed), _grad(device, q, g, NEUMANN, seed)) for seed in (0, 5)]
        assert torch.equal(together[0][0], together[1][0]) and torch.equal(together[0][1], together[1][1])
        assert torch.equal(_increment(device, q[2:].clone(), NEUMANN), together[0][0][2:])
        assert torch.equal(_grad(device, q[2:].clone(), g[2:].clone(), NEUMANN), together[0][1][2:])


@pytest.mark.parametrize("b", [32, 68])
def test_nan_is_not_lost_in_the_split(device: Device, b: int) -> None:
    q, g = _inputs(b, 2)
    q[0, 1, 2], q[0, 2, 1] = float("nan"), float("nan")
    for found, torchs in (
        (_increment(device, q, NEUMANN), _polynomial(q, NEUMANN)[0]),
        (_fold(_grad(device, q, g, NEUMANN)), _fold(_polynomial_grad(q, NEUMANN, g))),
    ):
        assert found[0].isnan().all() and torchs[0].isnan().all()
        assert found[1].isfinite().all()


@pytest.mark.parametrize("b", [64, 68])
def test_unaligned_blocks(device: Device, b: int) -> None:
    """A view 4 bytes past an aligned address."""
    q, g = _inputs(b, 2)
    library, c = device.load(SOURCE), _host(NEUMANN)
    shifted = [device.tensor(torch.cat([torch.zeros(1), values.flatten()])) for values in (q, g)]
    source, grad = (buffer.pointer + 4 for buffer in shifted)
    for with_grad in (0, 1):
        out = device.empty((1 + q.numel(),))
        work = device.workspace(library.poet_cuda_series_workspace(2, b, 5, with_grad))
        with device.checked():
            if with_grad:
                device.call(library.poet_cuda_series_grad, source, grad, out.pointer + 4, 2, b, c, 5, work)
            else:
                device.call(library.poet_cuda_series_increment, source, out.pointer + 4, 2, b, c, 5, work)
        out.device.write(out.memory, torch.zeros(1, 4, dtype=torch.uint8), 4, 4)  # the element before the result
        found = out.read()[1:].view_as(q)
        assert torch.equal(found, _grad(device, q, g, NEUMANN) if with_grad else _increment(device, q, NEUMANN))


def test_degree_zero_is_zero(device: Device) -> None:
    for b in (16, 68):
        q, g = _inputs(b, 1)
        assert not _increment(device, q, [0.0]).any() and not _grad(device, q, g, [0.0]).any()


def test_nothing_to_do_and_impossible_shapes(device: Device) -> None:
    library = device.load(SOURCE)
    assert library.poet_cuda_series_workspace(3, 64, 5, 1) == 0
    assert library.poet_cuda_series_workspace(3, 128, 5, 0) == 2 * 3 * 128 * 128 * 4
    device.call(library.poet_cuda_series_increment, None, None, 0, 16, None, 5, None)
    device.call(library.poet_cuda_series_grad, None, None, None, 4, 0, None, 5, None)
    for count, b, degree in [(-1, 16, 5), (1, -1, 5), (1, 16, -1), (2**31, 16, 5), (2**31, 128, 5)]:
        with pytest.raises(LaunchError) as error:
            device.call(library.poet_cuda_series_increment, None, None, count, b, _host(NEUMANN), degree, None)
        assert error.value.status == -2
        with pytest.raises(LaunchError) as error:
            device.call(library.poet_cuda_series_grad, None, None, None, count, b, _host(NEUMANN), degree, None)
        assert error.value.status == -2


@pytest.mark.parametrize("b", [32, 64, 128])
def test_accesses(simulator: Simulator, b: int) -> None:
    """Whole sectors and free of bank conflicts; one product of the tensor cores is three tf32 products."""
    q, g = _inputs(b, 2)
    with simulator.counted() as kernels:
        _increment(simulator, q, NEUMANN)
        _grad(simulator, q, g, NEUMANN)
    for name, kernel in kernels.items():
        assert kernel["global_store"]["efficiency"] >= 0.95, name
        for way in ("global_load", "cp_async"):
            assert kernel[way]["requests"] == 0 or kernel[way]["efficiency"] >= 0.95, name
        if "combine" not in name:
            assert kernel["shared"]["bank_conflict_factor"] <= 1.1, name
    products = sum(kernel["mma_flops"] for kernel in kernels.values()) / (3 * 2 * 2 * b**3)
    assert products == 3 + 6  # increment and gradient of degree 5


def test_planted_bank_conflicts_are_counted(simulator: Simulator) -> None:
    q, _ = _inputs(64, 1)
    with simulator.counted() as kernels:
        _increment(simulator, q, NEUMANN, defines=("POET_FAULT_NO_SWIZZLE",))
    (kernel,) = kernels.values()
    assert kernel["shared"]["bank_conflict_factor"] > 2


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
def test_other_architectures(simulator: Simulator, arch: int) -> None:
    for b in (20, 64, 68, 128):
        q, _ = _inputs(b, 2)
        assert torch.equal(_increment(simulator, q, NEUMANN, arch=arch), _increment(simulator, q, NEUMANN))


FAULTS = [
    ("NO_BARRIER", 32, "racecheck"),
    ("NO_BARRIER", 68, "racecheck"),
    ("DIVERGENT_BARRIER", 32, "synccheck"),
    ("NO_PADDING", 20, "initcheck"),
    ("TAIL", 20, "memcheck"),
    ("TAIL", 68, "memcheck"),
    ("NO_CPASYNC_WAIT", 68, "cpasync"),
]


@pytest.mark.parametrize(("fault", "b", "check"), FAULTS)
def test_planted_fault_is_found(simulator: Simulator, fault: str, b: int, check: str) -> None:
    library = simulator.load(SOURCE, [f"POET_FAULT_{fault}"])
    q, _ = _inputs(b, 1)
    e, work, source = simulator.empty(q.shape), simulator.workspace(2 * 4 * b * b), simulator.tensor(q)
    with simulator.finds(check):
        simulator.call(library.poet_cuda_series_increment, source, e, 1, b, _host(NEUMANN), 5, work)


@pytest.mark.parametrize("b", [32, 68])
def test_planted_wrong_sign_is_found(simulator: Simulator, b: int) -> None:
    q, g = _inputs(b, 1)
    with pytest.raises(AssertionError, match="rms error"):
        _check_grad(_grad(simulator, q, g, NEUMANN, defines=("POET_FAULT_SIGN",)), q, g, NEUMANN)


@pytest.mark.parametrize("b", [32, 68])
def test_planted_loss_of_precision_is_found(simulator: Simulator, b: int) -> None:
    """Plain tf32 products, without the two corrections, are no match for fp32."""
    q, _ = _inputs(b, 1)
    with pytest.raises(AssertionError, match="rms error"):
        _check_increment(_increment(simulator, q, NEUMANN, defines=("POET_FAULT_ONE_TF32",)), q, NEUMANN)
