"""poet_cuda_merge_rows against the float64 reference: out of place and in place, rows permuted on load and on store."""

from __future__ import annotations

import pytest
import torch
from harness import Device, LaunchError, Simulator, assert_no_worse_than_torch
from torch import Tensor

from benchmarks.cuda_toolchain import Blocks
from poet_megatron.ops.block_product import BlockRun
from poet_megatron.ops.merge import merge_output

pytest_plugins = ("cuda_fixtures",)

SOURCE = "merge_rows.cu"


class Case:
    """`count` row blocks of `b`, one of `ragged` if not 0, then `tail` rows of no block; `width` columns in rows of `stride`."""

    def __init__(self, b: int, count: int, width: int, ragged: int = 0, tail: int = 0, stride: int = 0, permuted: bool = True):
        self.height, self.width, self.stride = count * b + ragged + tail, width, stride or width
        self.runs = [BlockRun(count, b, 0), *([BlockRun(1, ragged, count * b)] if ragged else [])]
        self.blocks = Blocks(count, b, int(ragged > 0), ragged)
        generator = torch.Generator().manual_seed(b + width)
        self.w = torch.randn(self.height, width, generator=generator)
        self.e = [torch.randn(r.count, r.size, r.size, generator=generator) * 0.5 / r.size**0.5 for r in self.runs]
        self.rows = torch.randperm(self.height, generator=generator) if permuted else None

    def merge(self, device: Device, in_place: bool, seed: int = 0, defines: tuple[str, ...] = ()) -> Tensor:
        w = device.tensor(self.w, stride=self.stride)
        out = w if in_place else device.empty(self.w.shape, stride=self.stride)
        rows = None if self.rows is None else device.tensor(self.rows.int())
        e = [device.tensor(e) for e in self.e]
        launcher = device.load(SOURCE, defines).poet_cuda_merge_rows
        arguments = (w, self.stride, rows, e[0], e[-1], self.blocks, out, self.stride, self.height, self.width)
        with device.checked(seed):
            device.call(launcher, *arguments)
        assert in_place or device.name != "simulator" or out.padding_untouched()
        return out.read()

    def reference(self, dtype: torch.dtype) -> Tensor:
        rows = torch.arange(self.height) if self.rows is None else self.rows
        out = torch.empty(self.w.shape, dtype=dtype)
        out[rows] = merge_output(self.w.to(dtype)[rows], [e.to(dtype) for e in self.e], self.runs)
        return out

    def check(self, device: Device, in_place: bool, seed: int = 0) -> None:
        found = self.merge(device, in_place, seed)
        assert_no_worse_than_torch(found, self.reference(torch.float64), self.reference(torch.float32))
        if self.rows is not None:
            untouched = self.rows[self.runs[-1].stop :]
            assert torch.equal(found[untouched], self.w[untouched])


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("b", [16, 32, 64, 20, *(pytest.param(b, marks=pytest.mark.slow) for b in (128, 256))])
def test_merge(device: Device, b: int, in_place: bool, seed: int) -> None:
    Case(b, 3 if b <= 64 else 2, 150).check(device, in_place, seed)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("b", "ragged", "tail", "width", "stride"), [(32, 24, 0, 64, 0), (16, 7, 5, 33, 41), (1, 0, 3, 5, 0), (65, 33, 2, 70, 73)]
)
def test_ragged_blocks_tails_and_strides(device: Device, b: int, ragged: int, tail: int, width: int, stride: int, in_place: bool) -> None:
    for permuted in (False, True):
        Case(b, 2, width, ragged, tail, stride, permuted).check(device, in_place)


@pytest.mark.slow
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("b", [600, 700])
def test_large_blocks(device: Device, b: int, in_place: bool) -> None:
    """700 rows of 64 columns do not fit into sm_80's shared memory: columns are taken 8 at a time."""
    Case(b, 1, 70, ragged=9).check(device, in_place)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("b", [16, 32, 64, 128, 256, 20, 900])
def test_other_architectures(simulator: Simulator, arch: int, b: int) -> None:
    simulator.arch = arch
    Case(b, 1, 70, ragged=9, tail=2).check(simulator, in_place=True)


def test_nothing_to_do_and_impossible_arguments(device: Device) -> None:
    launcher = device.load(SOURCE).poet_cuda_merge_rows
    device.call(launcher, None, 4, None, None, None, Blocks(0, 0, 0, 0), None, 4, 0, 4)
    device.call(launcher, None, 0, None, None, None, Blocks(1, 4, 0, 0), None, 0, 4, 0)
    for blocks, height, width in [
        (Blocks(2, 16, 0, 0), 31, 4),
        (Blocks(1, -1, 0, 0), 16, 4),
        (Blocks(1, 16, 0, 0), 16, 5),
        (Blocks(1, 60000, 0, 0), 60000, 4),
    ]:
        with pytest.raises(LaunchError) as error:
            device.call(launcher, None, 4, None, None, None, blocks, None, 4, height, width)
        assert error.value.status == -2


@pytest.mark.parametrize("b", [16, 32, 64, *(pytest.param(b, marks=pytest.mark.slow) for b in (128, 256))])
def test_traffic(simulator: Simulator, b: int) -> None:
    """Whole sectors. X and Y move once, E once per 64 columns (from L2): no bar on that."""
    case = Case(b, 2, 256)
    with simulator.counted() as kernels:
        case.merge(simulator, in_place=True)
    (kernel,) = kernels.values()
    assert kernel["global_load"]["efficiency"] >= 0.85 and kernel["global_store"]["efficiency"] >= 0.95
    assert kernel["shared"]["bank_conflict_factor"] <= 1.1


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("NO_REUSE_BARRIER", "racecheck"),
        ("TAIL", "memcheck"),
        pytest.param("NO_BARRIER", "racecheck", marks=pytest.mark.slow),
        pytest.param("DIVERGENT_BARRIER", "synccheck", marks=pytest.mark.slow),
    ],
)
def test_planted_fault_is_found(simulator: Simulator, fault: str, check: str) -> None:
    case = Case(40, 1, 64, permuted=False)
    launcher = simulator.load(SOURCE, (f"POET_FAULT_{fault}",)).poet_cuda_merge_rows
    w, e = simulator.tensor(case.w), simulator.tensor(case.e[0])
    out = simulator.empty(case.w.shape)
    with simulator.finds(check):
        simulator.call(launcher, w, 64, None, e, None, case.blocks, out, 64, 40, 64)


def test_planted_wrong_transpose_is_found(simulator: Simulator) -> None:
    case = Case(32, 1, 64)
    found = case.merge(simulator, in_place=False, defines=("POET_FAULT_WRONG_TRANSPOSE",))
    with pytest.raises(AssertionError, match="error"):
        assert_no_worse_than_torch(found, case.reference(torch.float64), case.reference(torch.float32))
