"""poet_cuda_block_product and poet_cuda_block_product_grad against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from harness import Device, LaunchError, Simulator, assert_no_worse_than_torch
from torch import Tensor

from benchmarks.cuda_toolchain import Blocks
from poet_megatron.ops.block_product import BlockRun, block_product, block_product_grad

pytest_plugins = ("cuda_fixtures",)

PRODUCT, GRAD = ["block_product.cu", "permute_columns.cu"], "block_product_grad.cu"
SLOW = [pytest.param(b, marks=pytest.mark.slow) for b in (128, 256)]
DTYPES = [torch.float32, torch.bfloat16]
LONG = ("POET_TEST_RANGES=2",)  # few token ranges, each of several tiles, as with many tokens


class Case:
    """`count` blocks of `b`, one of `ragged` if not 0, `tail` untouched columns; rows `stride` apart (default: whole 16-byte chunks)."""

    def __init__(self, dtype: torch.dtype, b: int, count: int, tokens: int, ragged: int = 0, tail: int = 0, stride: int = 0):
        self.dtype, self.tokens, self.width = dtype, tokens, count * b + ragged + tail
        self.stride = stride or -(-self.width // 8) * 8
        self.runs = [BlockRun(count, b, 0), *([BlockRun(1, ragged, count * b)] if ragged else [])]
        self.blocks = Blocks(count, b, int(ragged > 0), ragged)
        generator = torch.Generator().manual_seed(b + tokens)
        self.x, self.g = (torch.randn(tokens, self.width, generator=generator).to(dtype) for _ in range(2))
        self.e = [(torch.randn(r.count, r.size, r.size, generator=generator) * 0.5 / r.size**0.5).to(dtype) for r in self.runs]

    @property
    def code(self) -> int:
        return int(self.dtype == torch.bfloat16)

    def product(self, device: Device, transpose: bool, seed: int = 0, defines: tuple[str, ...] = ()) -> Tensor:
        """What the kernels give; what lies between the rows must stay as it was."""
        x, y = device.tensor(self.x, stride=self.stride), device.empty((self.tokens, self.width), self.dtype, stride=self.stride)
        e = [device.tensor(e) for e in self.e]
        launcher = device.load(PRODUCT, defines).poet_cuda_block_product
        with device.checked(seed):
            device.call(launcher, self.code, x, self.stride, e[0], e[-1], self.blocks, transpose, y, self.stride, self.tokens, self.width)
        assert device.name != "simulator" or y.padding_untouched()
        return y.read()

    def check_product(self, device: Device, seed: int = 0, defines: tuple[str, ...] = ()) -> None:
        for transpose in (False, True):
            found = self.product(device, transpose, seed, defines)
            exact = block_product(self.x.double(), [e.double() for e in self.e], self.runs, transpose)
            assert_no_worse_than_torch(found, exact, block_product(self.x, self.e, self.runs, transpose))
            stop = self.runs[-1].stop
            assert torch.equal(found[:, stop:], self.x[:, stop:])

    def grad(self, device: Device, seed: int = 0, defines: tuple[str, ...] = ()) -> list[Tensor]:
        x, g = device.tensor(self.x, stride=self.stride), device.tensor(self.g, stride=self.stride)
        library = device.load(GRAD, defines)
        workspace = device.workspace(library.poet_cuda_block_product_grad_workspace(self.blocks, self.tokens))
        de = [device.empty(e.shape) for e in self.e]
        arguments = (self.code, x, self.stride, g, self.stride, de[0], de[-1], self.blocks, self.tokens, self.width, workspace)
        with device.checked(seed):
            device.call(library.poet_cuda_block_product_grad, *arguments)
        return [d.read() for d in de]

    def check_grad(self, device: Device, seed: int = 0, defines: tuple[str, ...] = ()) -> None:
        exact = block_product_grad(self.x.double(), self.g.double(), self.runs)
        # torch on a GPU accumulates in fp32, and so do the kernels; a bf16 product on the CPU is rounded to bf16 and would prove less.
        torchs = block_product_grad(self.x.float(), self.g.float(), self.runs)
        for found, want, single in zip(self.grad(device, seed, defines), exact, torchs, strict=True):
            assert_no_worse_than_torch(found, want, single)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, 20, *SLOW])
def test_product(device: Device, dtype: torch.dtype, b: int, seed: int) -> None:
    """Five blocks: panels of several blocks are not full. 400 tokens in two ranges of several tiles, the last one not full."""
    Case(dtype, b, 5 if b <= 64 else 2, 400).check_product(device, seed, LONG)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, 20, *SLOW])
def test_grad(device: Device, dtype: torch.dtype, b: int, seed: int) -> None:
    """600 tokens: two ranges (b <= 128) and a tile that is not full."""
    Case(dtype, b, 5 if b <= 64 else 1, 600 if b <= 64 else 1100).check_grad(device, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("b", "ragged", "tail", "odd_stride"), [(32, 24, 0, 0), (64, 16, 9, 0), (16, 7, 3, 0), (24, 5, 2, 1), (1, 3, 1, 0), (70, 33, 0, 1)]
)
def test_ragged_blocks_tails_and_odd_strides(device: Device, dtype: torch.dtype, b: int, ragged: int, tail: int, odd_stride: int) -> None:
    case = Case(dtype, b, 3, 70, ragged, tail, stride=(3 * b + ragged + tail) | 1 if odd_stride else 0)
    case.check_product(device)
    case.check_grad(device)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "ragged"), [(256, 160), (128, 96), (100, 0), (192, 64), (257, 11)])
def test_large_ragged_blocks(device: Device, dtype: torch.dtype, b: int, ragged: int, seed: int) -> None:
    case = Case(dtype, b, 2, 300, ragged, tail=5)
    case.check_product(device, seed)
    case.check_grad(device, seed)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, 128, 256, 20])
def test_other_architectures(simulator: Simulator, arch: int, dtype: torch.dtype, b: int) -> None:
    simulator.arch = arch
    case = Case(dtype, b, 3, 150, ragged=8, tail=8)
    case.check_product(simulator)
    case.check_grad(simulator)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 64])
def test_few_tokens(device: Device, dtype: torch.dtype, tokens: int) -> None:
    case = Case(dtype, 32, 3, tokens)
    if tokens:
        case.check_product(device)
        case.check_grad(device)
    else:
        assert case.product(device, False).shape == (0, 96)
        assert not any(d.any() for d in case.grad(device))


def test_no_blocks_is_a_copy(device: Device) -> None:
    x, y = torch.randn(5, 33), device.empty((5, 33))
    launcher = device.load(PRODUCT).poet_cuda_block_product
    device.call(launcher, 0, device.tensor(x), 33, None, None, Blocks(0, 0, 0, 0), 0, y, 33, 5, 33)
    assert torch.equal(y.read(), x)


def test_impossible_arguments(device: Device) -> None:
    product, grad = device.load(PRODUCT).poet_cuda_block_product, device.load(GRAD).poet_cuda_block_product_grad
    shapes = [(Blocks(3, 16, 0, 0), 4, 47), (Blocks(-1, 16, 0, 0), 4, 64), (Blocks(1, 0, 0, 0), 4, 64), (Blocks(1, 16, 0, 0), -1, 64)]
    for blocks, tokens, width in shapes:
        with pytest.raises(LaunchError) as error:
            device.call(product, 1, None, 64, None, None, blocks, 0, None, 64, tokens, width)
        assert error.value.status == -2
        with pytest.raises(LaunchError) as error:
            device.call(grad, 1, None, 64, None, 64, None, None, blocks, tokens, width, None)
        assert error.value.status == -2
    with pytest.raises(LaunchError) as error:
        device.call(product, 7, None, 64, None, None, Blocks(1, 16, 0, 0), 0, None, 64, 1, 64)
    assert error.value.status == -1


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_does_not_depend_on_the_schedule(simulator: Simulator, dtype: torch.dtype) -> None:
    case = Case(dtype, 64, 2, 700)
    first, *others = (case.grad(simulator, seed)[0] for seed in range(3))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_of_a_token_do_not_depend_on_the_others(simulator: Simulator, dtype: torch.dtype) -> None:
    whole, part = Case(dtype, 32, 3, 150), Case(dtype, 32, 3, 150)
    part.tokens, part.x = 5, whole.x[70:75]
    assert torch.equal(whole.product(simulator, False)[70:75], part.product(simulator, False))


# What ptxsim counts at 512 tokens (b <= 64) or 2 b tokens: ranges as short as the launcher ever makes them, so that the increments weigh
# as much as they ever do. moved: requested over compulsory sectors of the product. fp32 at 256 asks for x twice (see the kernel).
PRODUCT_BARS = [(16, 512), (32, 512), (64, 512), *(pytest.param(b, 2 * b, marks=pytest.mark.slow) for b in (128, 256))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "tokens"), PRODUCT_BARS)
def test_product_traffic(simulator: Simulator, dtype: torch.dtype, b: int, tokens: int) -> None:
    case = Case(dtype, b, max(2, 128 // b), tokens)
    for transpose in (False, True):
        with simulator.counted() as kernels:
            case.product(simulator, transpose)
        (kernel,) = kernels.values()
        assert ("block_product_bf16<" if dtype == torch.bfloat16 else "block_product_f32<") in kernel["name"]
        assert kernel["cp_async"]["efficiency"] >= 0.95 and kernel["global_store"]["efficiency"] >= 0.95
        assert kernel["shared"]["bank_conflict_factor"] <= 1.1
        assert kernel["traffic_over_compulsory"] <= (1.6 if (b, dtype) == (256, torch.float32) else 1.3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [16, 32, 64, *SLOW])
def test_grad_traffic(simulator: Simulator, dtype: torch.dtype, b: int) -> None:
    case = Case(dtype, b, max(1, 128 // b), 512)
    with simulator.counted() as kernels:
        case.grad(simulator)
    for kernel in kernels.values():
        loads = "global_load" if "sum_ranges" in kernel["name"] else "cp_async"
        assert kernel[loads]["efficiency"] >= 0.95 and kernel["global_store"]["efficiency"] >= 0.95
        assert kernel["shared"]["bank_conflict_factor"] <= 1.1 or "sum_ranges" in kernel["name"]
        # 256 x 256 fp32 sums would fill the register file: a thread block takes half (fp32: a quarter) of dE and reads x or g again.
        assert kernel["traffic_over_compulsory"] <= (1.3 if b < 256 else 1.45 if dtype == torch.bfloat16 else 1.95)


# One class of fault each, planted in all kernels of a build at once; 32 runs specialised kernels, 20 and 24 the general ones. 150 tokens in
# one range are three tiles of 64: the third one is copied over the first.
FAULTS = [
    ("NO_REUSE_BARRIER", "racecheck", 32),
    ("NO_CPASYNC_WAIT", "cpasync", 32),
    ("NO_CPASYNC_WAIT", "cpasync", 24),
    ("TAIL", "memcheck", 32),
    pytest.param("NO_BARRIER", "racecheck", 32, marks=pytest.mark.slow),
    pytest.param("NO_BARRIER", "racecheck", 20, marks=pytest.mark.slow),
    pytest.param("DIVERGENT_BARRIER", "synccheck", 32, marks=pytest.mark.slow),
]


def _planted(*faults: str) -> tuple[str, ...]:
    return (*(f"POET_FAULT_{fault}" for fault in faults), "POET_ONLY_BLOCK_SIZE=32", "POET_TEST_RANGES=1")


@pytest.mark.parametrize(("fault", "check", "b"), [*FAULTS, ("TAIL", "memcheck", 20)])
def test_planted_fault_is_found_in_product(simulator: Simulator, fault: str, check: str, b: int) -> None:
    for dtype in DTYPES:
        with simulator.finds(check):
            Case(dtype, b, 1, 150).product(simulator, False, defines=_planted(fault))


@pytest.mark.parametrize(("fault", "check", "b"), FAULTS)
def test_planted_fault_is_found_in_grad(simulator: Simulator, fault: str, check: str, b: int) -> None:
    for dtype in DTYPES:
        with simulator.finds(check):
            Case(dtype, b, 1, 150).grad(simulator, defines=_planted(fault))


WRONG = _planted("WRONG_TRANSPOSE", "NO_SWIZZLE")  # one build: the first shows in the results alone, the second in the counters alone


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("b", [32, 20])
def test_planted_wrong_transpose_is_found(simulator: Simulator, dtype: torch.dtype, b: int) -> None:
    case = Case(dtype, b, 3, 70)
    with pytest.raises(AssertionError, match="error"):
        case.check_product(simulator, defines=WRONG)
    if (b, dtype) == (32, torch.bfloat16):
        with pytest.raises(AssertionError, match="error"):
            case.check_grad(simulator, defines=WRONG)


@pytest.mark.parametrize("dtype", DTYPES)
def test_planted_bank_conflicts_are_counted(simulator: Simulator, dtype: torch.dtype) -> None:
    """bf16: rows of 64 columns without the exchange meet in the same banks; fp32: the transposed copy of E does."""
    with simulator.counted() as kernels:
        Case(dtype, 32, 2, 64).product(simulator, False, defines=WRONG)  # takes E^T
    (kernel,) = kernels.values()
    assert kernel["shared"]["bank_conflict_factor"] >= (3 if dtype == torch.bfloat16 else 1.2)


@pytest.mark.slow
def test_failed_launch_is_reported(simulator: Simulator) -> None:
    case = Case(torch.bfloat16, 32, 3, 70)
    for run in (case.product, case.grad):
        arguments = (False,) if run == case.product else ()
        with pytest.raises(LaunchError) as error:
            run(simulator, *arguments, defines=_planted("LAUNCH"))
        assert error.value.status > 0
    case.check_product(simulator, defines=LONG)  # and does not stick
