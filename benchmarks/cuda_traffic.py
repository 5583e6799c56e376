"""What the simulator counts for the kernels of csrc/cuda on standard shapes: sectors, bank conflicts, bytes, and a bound on their time.

Counts are exact for the shape and do not depend on the schedule. Nothing here is a time: `lower_bound_us` says what an H100 cannot beat.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_compile import short_name
from benchmarks.cuda_toolchain import CUDA, INCLUDE, Blocks, bind, find_ptxsim

# H100 SXM: measured copy bandwidth; dense tensor-core and fp32 peaks of the data sheet, which no kernel reaches.
BYTES_PER_S, BF16_FLOPS, TF32_FLOPS, FP32_FLOPS = 3.0e12, 989e12, 495e12, 67e12

TOKENS, WIDTH = 1024, 2048
NEUMANN = (0.0, 2.0, 2.0, 2.0, 2.0, 1.0)
SOURCES = ("block_product.cu", "block_product_grad.cu", "permute_columns.cu")


@dataclass(frozen=True)
class Traffic:
    """Counters of one kernel in one case.

    Attributes:
        case: op, dtype and shape.
        kernel: name with template arguments.
        launches: in the case.
        load_sectors_per_request: 32-byte sectors per warp-wide load or cp.async.
        load_efficiency: bytes asked for over 32 * sectors.
        store_sectors_per_request: of stores.
        store_efficiency: of stores.
        bank_conflicts: shared-memory wavefronts over the least possible; 0 without shared memory.
        moved_bytes: sectors requested, before any cache.
        compulsory_bytes: sectors touched at least once.
        tensor_flops: of mma instructions.
        other_flops: fp32.
    """

    case: str
    kernel: str
    launches: int
    load_sectors_per_request: float
    load_efficiency: float
    store_sectors_per_request: float
    store_efficiency: float
    bank_conflicts: float
    moved_bytes: int
    compulsory_bytes: int
    tensor_flops: float
    other_flops: float

    @classmethod
    def of(cls, case: str, report: dict[str, Any]) -> Traffic:
        """From a kernel's entry in ptxsim's report."""
        loads = {key: report["global_load"][key] + report["cp_async"][key] for key in ("requests", "sectors", "bytes")}
        compulsory = report["compulsory"]
        return cls(
            case=case,
            kernel=short_name(report["name"]),
            launches=report["launches"],
            load_sectors_per_request=_ratio(loads["sectors"], loads["requests"]),
            load_efficiency=_ratio(loads["bytes"], 32 * loads["sectors"]),
            store_sectors_per_request=_ratio(report["global_store"]["sectors"], report["global_store"]["requests"]),
            store_efficiency=report["global_store"]["efficiency"],
            bank_conflicts=report["shared"]["bank_conflict_factor"],
            moved_bytes=report["sector_bytes_requested"],
            compulsory_bytes=compulsory["read_sector_bytes"] + compulsory["write_sector_bytes"],
            tensor_flops=report["mma_flops"],
            other_flops=report["flops"],
        )

    @property
    def moved_over_compulsory(self) -> float:
        """1 if every sector is requested once."""
        return _ratio(self.moved_bytes, self.compulsory_bytes)

    @property
    def lower_bound_us(self) -> float:
        """Microseconds no H100 can beat: compulsory bytes at its bandwidth, or flops at its peak, whichever is more."""
        tensor = BF16_FLOPS if "bf16" in self.kernel else TF32_FLOPS
        return 1e6 * max(self.compulsory_bytes / BYTES_PER_S, self.tensor_flops / tensor, self.other_flops / FP32_FLOPS)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "moved_over_compulsory": self.moved_over_compulsory, "lower_bound_us": self.lower_bound_us}


def _ratio(a: float, b: float) -> float:
    return a / b if b else 0.0


class Memory:
    """Arrays that the simulator lets kernels see."""

    def __init__(self, sim: ModuleType):
        self.sim = sim
        self.arrays: list[Any] = []

    def input(self, values: Tensor) -> int:
        """Pointer to a copy of `values`."""
        raw = values.contiguous().view(torch.uint8).numpy()
        return self._keep(self.sim.guarded(raw.shape, "uint8", fill=raw))

    def output(self, elements: int, dtype: torch.dtype = torch.float32) -> int:
        """Pointer to uninitialised memory."""
        return self._keep(self.sim.guarded(max(elements, 1) * dtype.itemsize, "uint8"))

    def release(self) -> None:
        """Give everything back."""
        self.sim.unregister(*self.arrays)

    def _keep(self, array: Any) -> int:
        self.arrays.append(array)
        return int(array.ctypes.data)


@dataclass(frozen=True)
class Case:
    """A call whose traffic is counted.

    Attributes:
        name: op, dtype and shape.
        source: the .cu file it needs.
        run: makes the call, returns its status.
    """

    name: str
    source: str
    run: Callable[[ctypes.CDLL, Memory], int]


def cases() -> list[Case]:
    """The standard shapes: 1,024 tokens of 2,048 columns, blocks of 64 and 256."""
    found = [Case(f"permute {name}, {TOKENS} x {WIDTH}", "permute_columns.cu", _permute(dtype)) for name, dtype in _DTYPES.items()]
    for b in (64, 256):
        for name, dtype in _DTYPES.items():
            shape = f"{name} b={b}, {TOKENS} x {WIDTH}"
            found.append(Case(f"product {shape}", "block_product.cu", _product(dtype, b)))
            found.append(Case(f"product grad {shape}", "block_product_grad.cu", _product_grad(dtype, b)))
        found.append(Case(f"merge rows fp32 b={b}, 1024 x 256", "merge_rows.cu", _merge(b)))
        count = WIDTH // b
        found.append(Case(f"skew unpack b={b}, {count} blocks", "skew.cu", _skew(b, count, unpack=True)))
        found.append(Case(f"skew pack grad b={b}, {count} blocks", "skew.cu", _skew(b, count, unpack=False)))
        found.append(Case(f"series b={b}, {count} blocks", "cayley.cu", _series(b, count)))
        found.append(Case(f"series grad b={b}, {count} blocks", "cayley.cu", _series_grad(b, count)))
    return [case for case in found if (CUDA / case.source).exists()]


def measure(case: Case, arch: int = 90) -> list[Traffic]:
    """Run a case in the simulator.

    Raises:
        MissingToolError: there is no simulator.
        RuntimeError: the call failed or a check of the simulator found something.
    """
    sim = find_ptxsim()
    sim.quiet(True)
    companions = SOURCES if case.source in SOURCES else (case.source,)  # the products copy through permute_columns.cu
    library = bind(sim.load([CUDA / name for name in companions], arch=arch, include_dirs=[INCLUDE, CUDA]))
    memory = Memory(sim)
    sim.clear()
    sim.seed(0)
    status = case.run(library, memory)
    errors, report = sim.errors(), sim.report()
    memory.release()
    sim.clear()
    if status or errors:
        raise RuntimeError(f"{case.name}: status {status}, findings {errors[:3]}")
    kernels = [Traffic.of(case.name, entry) for entry in report.values()]
    return sorted(kernels, key=lambda kernel: re.sub(r"\d+", "", kernel.kernel))


_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_CODES = {torch.float32: 0, torch.bfloat16: 1}


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _blocks(b: int) -> Blocks:
    return Blocks(WIDTH // b, b, 0, 0)


def _permute(dtype: torch.dtype) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0)).to(torch.int32)
        x, y = memory.input(_random(TOKENS, WIDTH, dtype=dtype)), memory.output(TOKENS * WIDTH, dtype)
        return library.poet_cuda_permute_columns(_CODES[dtype], x, WIDTH, memory.input(order), y, WIDTH, TOKENS, WIDTH, None)

    return run


def _product(dtype: torch.dtype, b: int) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        x, y = memory.input(_random(TOKENS, WIDTH, dtype=dtype)), memory.output(TOKENS * WIDTH, dtype)
        e = memory.input(_random(WIDTH // b, b, b, dtype=dtype))
        return library.poet_cuda_block_product(_CODES[dtype], x, WIDTH, e, None, _blocks(b), 0, y, WIDTH, TOKENS, WIDTH, None)

    return run


def _product_grad(dtype: torch.dtype, b: int) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        x, g = (memory.input(_random(TOKENS, WIDTH, dtype=dtype)) for _ in range(2))
        size = library.poet_cuda_block_product_grad_workspace(_blocks(b), TOKENS)
        work, de = memory.output(size, torch.uint8), memory.output(WIDTH * b)
        return library.poet_cuda_block_product_grad(
            _CODES[dtype], x, WIDTH, g, WIDTH, de, None, _blocks(b), TOKENS, WIDTH, work if size else None, None
        )

    return run


def _merge(b: int) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        height, width = 1024, 256
        w, e = memory.input(_random(height, width)), memory.input(_random(height // b, b, b))
        rows = memory.input(torch.randperm(height, generator=torch.Generator().manual_seed(0)).to(torch.int32))
        blocks = Blocks(height // b, b, 0, 0)
        return library.poet_cuda_merge_rows(w, width, rows, e, None, blocks, memory.output(height * width), width, height, width, None)

    return run


def _skew(b: int, count: int, unpack: bool) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        length = b * (b - 1) // 2
        if unpack:
            return library.poet_cuda_skew_unpack(memory.input(_random(count, length)), length, memory.output(count * b * b), count, b, None)
        return library.poet_cuda_skew_pack_grad(memory.input(_random(count, b, b)), memory.output(count * length), length, count, b, None)

    return run


def _series(b: int, count: int) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        degree, c = len(NEUMANN) - 1, (ctypes.c_float * len(NEUMANN))(*NEUMANN)
        work = memory.output(library.poet_cuda_series_workspace(count, b, degree, 0), torch.uint8)
        return library.poet_cuda_series_increment(
            memory.input(_skew_blocks(b, count)), memory.output(count * b * b), count, b, c, degree, work, None
        )

    return run


def _series_grad(b: int, count: int) -> Callable[[ctypes.CDLL, Memory], int]:
    def run(library: ctypes.CDLL, memory: Memory) -> int:
        degree, c = len(NEUMANN) - 1, (ctypes.c_float * len(NEUMANN))(*NEUMANN)
        work = memory.output(library.poet_cuda_series_workspace(count, b, degree, 1), torch.uint8)
        q, g, dq = memory.input(_skew_blocks(b, count)), memory.input(_random(count, b, b)), memory.output(count * b * b)
        return library.poet_cuda_series_grad(q, g, dq, count, b, c, degree, work, None)

    return run


def _skew_blocks(b: int, count: int) -> Tensor:
    upper = _random(count, b, b).triu(1) / (4 * b**0.5)
    return upper - upper.mT
