"""Running the launchers of csrc/cuda in tests: one interface over the PTX simulator and a real GPU.

    lib = device.load("skew.cu")
    q, out = device.tensor(x), device.empty((n, b, b))
    with device.checked(seed):
        device.call(lib.poet_cuda_skew_unpack, q, length, out, n, b)
    out.read()                                      # torch CPU tensor; fails if an element was not written

The simulator finds out-of-bounds, uninitialised, racing and divergent accesses; on the GPU only the results are compared, unwritten
elements are recognised by a fill pattern. Both run on a null stream unless `call` is given one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import subprocess
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cuda_toolchain import CUDA, INCLUDE, bind, find_nvcc, find_ptxsim

SEEDS = (0, 1, 2)
UNWRITTEN = 0xFF  # every byte of fresh memory on the GPU: NaN as fp32 and bf16
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # enum poet_dtype


class LaunchError(AssertionError):
    """A launcher returned something else than 0; `.status` is it."""

    def __init__(self, name: str, status: int):
        super().__init__(f"{name} returned {status}")
        self.status = status


class Buffer:
    """Device memory seen as a tensor of `shape`, the rows of its last two dimensions `stride` elements apart.

    What lies between the rows is uninitialised: a kernel that reads it is caught, and `padding_untouched` tells whether it wrote there.
    """

    def __init__(self, device: Device, shape: Sequence[int], dtype: torch.dtype, stride: int | None):
        self.device, self.shape, self.dtype = device, tuple(shape), dtype
        self.width = self.shape[-1] if self.shape else 1
        self.stride = self.width if stride is None else stride
        self.rows = int(np.prod(self.shape[:-1], dtype=np.int64)) if self.shape else 1
        self.size = ((self.rows - 1) * self.stride + self.width if self.rows else 0) * dtype.itemsize
        self.memory = device.allocate(max(self.size, 1))

    @property
    def pointer(self) -> int:
        return self.device.pointer(self.memory)

    def fill(self, values: Tensor) -> Buffer:
        """Write `values` and mark them, not the padding, as initialised."""
        bytes_ = values.detach().to(self.dtype).contiguous().cpu().reshape(self.rows, self.width).view(torch.uint8)
        pitch, length = self.stride * self.dtype.itemsize, self.width * self.dtype.itemsize
        self.device.write(self.memory, bytes_, pitch, length)
        return self

    def read(self) -> Tensor:
        """The elements as a CPU tensor; every one must have been written."""
        raw, written = self.device.read(self.memory)
        elements = self._rows(written).reshape(self.rows, self.width, self.dtype.itemsize).any(-1)
        assert elements.all(), f"{int((~elements).sum())} elements of the result {self.shape} were never written"
        return self._rows(raw).clone().view(self.dtype).reshape(self.shape)

    def padding_untouched(self) -> bool:
        """Nothing was written between the rows."""
        written = self.device.read(self.memory)[1].clone()
        self._rows(written).zero_()
        return not written[: self.size].any()

    def _rows(self, raw: Tensor) -> Tensor:
        item = self.dtype.itemsize
        return torch.as_strided(raw, (self.rows, self.width * item), (self.stride * item, 1))


class Device(ABC):
    """Common part of the two devices."""

    name: str
    arch: int

    def __init__(self) -> None:
        self.alive: list[Any] = []

    def tensor(self, values: Tensor, stride: int | None = None, dtype: torch.dtype | None = None) -> Buffer:
        """Device copy of `values` (its dtype unless given), rows `stride` elements apart."""
        return Buffer(self, values.shape, dtype or values.dtype, stride).fill(values)

    def empty(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, stride: int | None = None) -> Buffer:
        """Uninitialised device memory."""
        return Buffer(self, shape, dtype, stride)

    def workspace(self, size: int) -> Buffer | None:
        """`size` bytes of uninitialised device memory, None (a null pointer) for 0."""
        return self.empty((size,), torch.uint8) if size else None

    def call(self, function: Any, *arguments: Any, stream: int | None = None) -> None:
        """Call a launcher (all arguments but the stream); buffers become pointers. Raises LaunchError."""
        plain = [a.pointer if isinstance(a, Buffer) else a for a in arguments]
        status = function(*plain, stream)
        if status:
            raise LaunchError(function.__name__, status)

    def load(self, sources: str | Sequence[str], defines: Sequence[str] = (), arch: int | None = None) -> ctypes.CDLL:
        """Compile files of csrc/cuda (cached) and load them with their launchers typed."""
        names = [sources] if isinstance(sources, str) else list(sources)
        return bind(self.compile([CUDA / name for name in names], list(defines), arch or self.arch))

    @abstractmethod
    def compile(self, sources: list[Path], defines: list[str], arch: int) -> ctypes.CDLL: ...

    @abstractmethod
    def allocate(self, size: int) -> Any: ...

    @abstractmethod
    def pointer(self, memory: Any) -> int: ...

    @abstractmethod
    def write(self, memory: Any, rows: Tensor, pitch: int, length: int) -> None: ...

    @abstractmethod
    def read(self, memory: Any) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def checked(self, seed: int = 0) -> contextlib.AbstractContextManager[Any]: ...

    def release(self) -> None:
        self.alive.clear()


class Simulator(Device):
    """ptxsim: executes the PTX of compute_80 (or the `arch` given to `load`) with all checks."""

    name, arch = "simulator", 80

    def __init__(self) -> None:
        super().__init__()
        self.sim = find_ptxsim()
        find_nvcc()
        self.sim.quiet(True)
        self.sim.clear()

    def compile(self, sources: list[Path], defines: list[str], arch: int) -> ctypes.CDLL:
        return self.sim.load(sources, arch=arch, include_dirs=[INCLUDE, CUDA], defines=defines)

    def allocate(self, size: int) -> np.ndarray:
        memory = self.sim.guarded(size, "uint8")
        self.alive.append(memory)
        return memory

    def pointer(self, memory: np.ndarray) -> int:
        return memory.ctypes.data

    def write(self, memory: np.ndarray, rows: Tensor, pitch: int, length: int) -> None:
        for i, row in enumerate(rows.numpy()):
            memory[i * pitch : i * pitch + length] = row
            self.sim._core().ptxsim_mark_initialised(memory.ctypes.data + i * pitch, length, 1)

    def read(self, memory: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(np.array(memory)), torch.from_numpy(self.sim.written(memory))

    def checked(self, seed: int = 0) -> contextlib.AbstractContextManager[Any]:
        """Raises ptxsim.PtxsimError if anything inside goes wrong; `seed` picks the schedule of blocks and warps."""
        return self.sim.check(seeds=seed)

    @contextlib.contextmanager
    def finds(self, check: str, seed: int = 0) -> Iterator[list[dict[str, Any]]]:
        """For mutants: the simulator must report a finding of kind `check` (memcheck, racecheck, ...); launch errors are expected."""
        found: list[dict[str, Any]] = []
        self.sim.clear()
        self.sim.seed(seed)
        with contextlib.suppress(LaunchError):
            yield found
        found += self.sim.errors()
        self.sim.clear()
        assert any(error["check"] == check for error in found), f"no {check} finding: {found}"

    @contextlib.contextmanager
    def counted(self) -> Iterator[dict[str, dict[str, Any]]]:
        """Counters of the launches inside, by the kernel's readable name."""
        found: dict[str, dict[str, Any]] = {}
        self.sim.clear()
        yield found
        found.update({kernel["name"]: kernel for kernel in self.sim.report().values()})

    def release(self) -> None:
        self.sim.unregister(*self.alive)
        self.sim.clear()
        super().release()


class Gpu(Device):
    """A real GPU: the same sources built for it, torch's memory."""

    name = "gpu"

    def __init__(self) -> None:
        super().__init__()
        major, minor = torch.cuda.get_device_capability()
        self.arch = 10 * major + minor

    def compile(self, sources: list[Path], defines: list[str], arch: int) -> ctypes.CDLL:
        text = b"".join(path.read_bytes() for path in sorted([*CUDA.iterdir(), *INCLUDE.iterdir()]) if path.is_file())
        key = hashlib.sha256(text + repr((sources, defines, arch)).encode()).hexdigest()[:24]
        library = Path(tempfile.gettempdir()) / f"poet-cuda-{key}.so"
        if not library.exists():
            command = [find_nvcc(), "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-shared", f"-arch=sm_{arch}"]
            command += [f"-I{INCLUDE}", f"-I{CUDA}", *(f"-D{define}" for define in defines), *map(str, sources)]
            subprocess.run([*command, "-o", f"{library}.part"], check=True)
            Path(f"{library}.part").replace(library)
        return ctypes.CDLL(str(library))

    def allocate(self, size: int) -> Tensor:
        return torch.full((size,), UNWRITTEN, dtype=torch.uint8, device="cuda")

    def pointer(self, memory: Tensor) -> int:
        return memory.data_ptr()

    def write(self, memory: Tensor, rows: Tensor, pitch: int, length: int) -> None:
        torch.as_strided(memory, (len(rows), length), (pitch, 1)).copy_(rows)

    def read(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        raw = memory.cpu()
        return raw, raw != UNWRITTEN

    @contextlib.contextmanager
    def checked(self, seed: int = 0) -> Iterator[None]:
        yield
        torch.cuda.synchronize()


def assert_no_worse_than_torch(found: Tensor, reference: Tensor, torch_low_precision: Tensor, factor: float = 2.0) -> None:
    """Compare with torch's own computation in the same precision: root mean square and largest error at most `factor` times torch's.

    Args:
        found: result of the kernel.
        reference: the same in float64.
        torch_low_precision: what torch gives for the same inputs in the kernel's precision.
        factor: bound on the ratio of errors.
    """
    assert found.shape == reference.shape == torch_low_precision.shape
    assert found.double().isfinite().all()
    ours, torchs = (x.double().cpu() - reference.double().cpu() for x in (found, torch_low_precision))
    for name, size in (("rms", _rms), ("largest", _largest)):
        assert size(ours) <= factor * size(torchs), f"{name} error {size(ours):.3g}, torch's {size(torchs):.3g}"


def _rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item() if error.numel() else 0.0


def _largest(error: Tensor) -> float:
    return error.abs().max().item() if error.numel() else 0.0
