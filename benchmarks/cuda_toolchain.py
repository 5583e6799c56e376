"""Where the CUDA compiler and the PTX simulator are, and the launchers of csrc/cuda as Python functions (ctypes, no torch extension).

`bind` reads the prototypes of csrc/include/poet_cuda.h, so that a call with too few arguments, or an `int` where the header says
`int64_t`, fails here instead of in a kernel.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent
CUDA = REPOSITORY / "csrc" / "cuda"
INCLUDE = REPOSITORY / "csrc" / "include"
HEADER = INCLUDE / "poet_cuda.h"
PTXSIM_DEFAULT = REPOSITORY.parent / "shared" / "tools" / "ptxsim"


class Blocks(ctypes.Structure):
    """`poet_blocks` of poet_status.h, passed by value."""

    _fields_ = [(name, ctypes.c_int64) for name in ("count", "size", "ragged_count", "ragged_size")]


class MissingToolError(RuntimeError):
    """A tool that this machine does not have; the message says how to get it."""


def find_nvcc() -> str:
    """$NVCC, nvcc on PATH, or that of the nvidia-cuda-nvcc package.

    Raises:
        MissingToolError: none of them is there.
    """
    found = os.environ.get("NVCC") or shutil.which("nvcc")
    packages = (path for entry in sys.path for path in sorted(Path(entry or ".").glob("nvidia/cu*/bin/nvcc")))
    found = found or next((str(path) for path in packages), None)
    if found is None:
        raise MissingToolError("no nvcc: put it on PATH, set NVCC, or install the extra [cuda-ci]")
    return found


def find_ptxsim() -> ModuleType:
    """The PTX simulator: the folder $PTXSIM, else shared/tools/ptxsim beside the repository.

    Raises:
        MissingToolError: it is not there.
    """
    folder = Path(os.environ.get("PTXSIM") or PTXSIM_DEFAULT)
    if not (folder / "ptxsim.py").is_file():
        raise MissingToolError(f"no ptxsim.py in {folder}: set PTXSIM to the folder of the PTX simulator")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module("ptxsim")


def bind(library: ctypes.CDLL) -> ctypes.CDLL:
    """Set result and argument types of every launcher of poet_cuda.h that `library` has; returns it."""
    for result, name, arguments in prototypes():
        function = getattr(library, name, None)
        if function is not None:
            function.restype = _ctype(result)
            function.argtypes = [_ctype(argument) for argument in arguments]
    return library


def prototypes() -> list[tuple[str, str, list[str]]]:
    """(result type, name, argument types) of every function of poet_cuda.h."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    found = re.findall(r"\b(int|int64_t)\s+(poet_cuda_\w+)\s*\(([^)]*)\)\s*;", text)
    return [(result, name, [argument.strip() for argument in arguments.split(",")]) for result, name, arguments in found]


def _ctype(declaration: str) -> type:
    """ctypes type of a C declaration such as `const void* x`."""
    if "*" in declaration:
        return ctypes.c_void_p
    name = declaration.removeprefix("const ").split()[0]
    return {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "poet_blocks": Blocks}[name]
