"""The compiled ops `torch.ops.poet_native.*`: loaded at their first use, per device, or the reason why they are not.

    torch.ops.poet_native.permuted_block_product(x, gather, increments, transpose, inverse) -> y
    torch.ops.poet_native.permuted_block_product_grad(x, gather_x, g, gather_g, runs) -> [dE, ...] fp32
    torch.ops.poet_native.skew_unpack(packed, b) -> Q;  skew_pack_grad(dQ) -> dpacked
    torch.ops.poet_native.series_increment(q, coefficients) -> E;  series_grad(q, coefficients, dE) -> dQ, skew
    torch.ops.poet_native.merge(w, rows, columns, inverse_columns, increments_in, increments_out, out)

They have neither autograd nor fake kernels; those belong to the ops that choose between them and the reference. A wrong argument is a
ValueError, a failed launch a RuntimeError; both name op, dtype and shape. POET_NATIVE in the environment: 0 takes the reference
everywhere, 1 makes missing CPU ops an error; otherwise one warning says what to install.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

LOWEST_TORCH = (2, 13)
"""The lowest torch whose stable ABI has what the ops use. build_support.settings has the same number."""

OPS = (
    "permuted_block_product",
    "permuted_block_product_grad",
    "skew_unpack",
    "skew_pack_grad",
    "series_increment",
    "series_grad",
    "merge",
)
LIBRARIES = {"cpu": "_poet_cpu.so", "cuda": "_poet_cuda.so"}
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
FOLDER = Path(__file__).resolve().parent.parent
NATIVE, REFERENCE = "native", "reference"
OFF = "POET_NATIVE=0"
FIX = "install g++ and run `pip install .` in the clone again (docs/install.md)"


class NativeMissingWarning(UserWarning):
    """The compiled ops are not there; everything works, slower."""


@dataclass(frozen=True)
class Loaded:
    """What became of the library of one device type.

    Attributes:
        available: its ops can be called.
        why: why not, or which instruction set the ops use.
        fix: what the user can do about it; empty if there is nothing to do.
    """

    available: bool
    why: str
    fix: str = ""


@dataclass(frozen=True)
class Explanation:
    """Which implementation of an op runs on each device, and why."""

    op: str
    cpu: str
    cuda: str
    why: str


def native_available(device_type: str) -> bool:
    """Whether `torch.ops.poet_native` runs on "cpu" or "cuda" tensors. Loads the libraries at the first call; later ones look it up.

    Warns once per process if ops that this machine could use are missing. Any other device type has none.

    Raises:
        RuntimeError: POET_NATIVE=1 and the CPU ops are missing.
    """
    if device_type not in LIBRARIES:
        return False
    status = load(device_type)
    if not status.available:
        _complain(device_type, status)
    return status.available


# torch.compile takes the answer as a constant: it cannot change within a process.
native_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def load(device_type: str) -> Loaded:
    """Load the library for "cpu" or "cuda" tensors, once, and say what became of it; never warns.

    The library of the CPU ops defines the schemas, so that of CUDA needs it.
    """
    if os.environ.get("POET_NATIVE") == "0":
        return Loaded(False, OFF)
    lowest = ".".join(map(str, LOWEST_TORCH))
    if _version(torch.__version__) < LOWEST_TORCH:
        return Loaded(False, f"torch {torch.__version__} is older than {lowest}", f"pip install 'torch>={lowest}' and install again")
    if device_type != "cpu" and not load("cpu").available:
        return Loaded(False, f"the CPU ops are missing: {load('cpu').why}", load("cpu").fix)
    path = FOLDER / LIBRARIES[device_type]
    if not path.is_file():
        return Loaded(
            False, _why_not_built(device_type), FIX if device_type == "cpu" else "install again with POET_CUDA=1 (docs/install.md)"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Loaded(False, f"{path.name} does not load: {error}", FIX)
    missing = [op for op in OPS if not has_kernel(op, device_type)]
    if missing:
        return Loaded(False, f"{path.name} is of another version, it lacks {', '.join(missing)}", FIX)
    return Loaded(True, f"{path.name}, {cpu_isa() or 'instruction set chosen at run time'}" if device_type == "cpu" else path.name)


def explain() -> list[Explanation]:
    """For every op: "native" or "reference" on CPU and on CUDA tensors, and the reasons."""
    status = {device: load(device) for device in LIBRARIES}
    why = "; ".join(f"{device}: {found.why}" for device, found in status.items())
    kind = {device: NATIVE if found.available else REFERENCE for device, found in status.items()}
    return [Explanation(op, kind["cpu"], kind["cuda"], why) for op in OPS]


def host_module() -> ModuleType | None:
    """poet_megatron._host, or None if it was not built."""
    try:
        from poet_megatron import _host  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return _host


def cpu_isa() -> str | None:
    """Instruction set of the CPU kernels: "portable", "avx2", "avx512" or "amx"; None if nothing was built."""
    host = host_module()
    return host.cpu_isa() if host is not None else None


def has_kernel(op: str, device_type: str) -> bool:
    """Whether an implementation of poet_native::op is registered for tensors of this device type."""
    name = f"poet_native::{op}"
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, DISPATCH_KEYS[device_type])
    except RuntimeError:  # no such op
        return False


def _why_not_built(device_type: str) -> str:
    """What the build wrote down about a missing library."""
    host = host_module()
    reason = host.build_info().get(device_type) if host is not None else None
    return (
        f"not built: {reason}"
        if reason and reason != "built"
        else f"{LIBRARIES[device_type]} is not there: no C++ compiler at installation, or POET_NATIVE=0"
    )


def _complain(device_type: str, status: Loaded) -> None:
    """One warning per process for ops that would have been used here."""
    wanted = os.environ.get("POET_NATIVE") == "1"
    text = f"compiled ops for {device_type} tensors are missing ({status.why}); to have them, {status.fix}"
    if wanted and device_type == "cpu":
        raise RuntimeError(f"POET_NATIVE=1, but {text}")
    if status.why != OFF and (device_type == "cpu" or torch.cuda.is_available()):
        _warn_once(f"{text}. The slower reference runs instead; POET_NATIVE=0 chooses it without this warning.")


@functools.cache
def _warn_once(text: str) -> None:
    warnings.warn(text, NativeMissingWarning, stacklevel=4)


def _version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
