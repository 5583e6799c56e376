"""The tools a build needs, and where they are: C++ compiler, torch's headers, nvcc. Imports neither torch nor pybind11's extension code."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_support.settings import LOWEST_TORCH

NO_COMPILER = "no working C++ compiler (c++, or that of CXX); on Debian and Ubuntu: apt install g++"
PROBE = """
#include <omp.h>
#if __cplusplus < 202002L
#error
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512bw,amx-tile,amx-bf16,avx512bf16")
__m512 twice(__m512 x) { return _mm512_add_ps(x, x); }
#endif
int main() { return omp_get_max_threads() < 0; }
"""
"""On x86-64 the kernels choose their targets by a pragma that GCC has from version 11 on, and clang ignores."""


class MissingToolError(RuntimeError):
    """A tool that a part cannot be built without; the message says how to get it."""


@dataclass(frozen=True)
class Torch:
    """An installed torch, found without importing it."""

    version: str
    cuda: str | None
    root: Path

    @property
    def include(self) -> Path:
        """Folder of torch/csrc/stable."""
        return self.root / "include"

    @property
    def supported(self) -> bool:
        """Whether the compiled ops can use this version."""
        return version_tuple(self.version) >= LOWEST_TORCH


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler, its release and the folder of libcudart_static.a."""

    path: str
    release: str
    library_dir: Path


def version_tuple(version: str) -> tuple[int, int]:
    """(2, 13) of "2.13.0a0+cpu"."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def library_folders() -> list[Path]:
    """Where packages may lie: this process's path, then the environment that pip's isolated build hides from it."""
    folders = [*sys.path, *site.getsitepackages(), sysconfig.get_path("platlib")]
    return list(dict.fromkeys(Path(folder) for folder in folders if folder))


def find_torch(folders: list[Path] | None = None) -> Torch | None:
    """The first torch that has the headers of the stable ABI or is too old for them."""
    for folder in library_folders() if folders is None else folders:
        version_file = folder / "torch" / "version.py"
        if version_file.is_file():
            text = version_file.read_text()
            version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.M)
            cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.M)
            return Torch(version[1] if version else "0", cuda[1] if cuda else None, version_file.parent)
    return None


def require_torch() -> Torch:
    """`find_torch`, where it must be one that the compiled ops support.

    Raises:
        MissingToolError: there is none, or it is too old.
    """
    torch, lowest = find_torch(), ".".join(map(str, LOWEST_TORCH))
    if torch is None:
        raise MissingToolError(f"torch >= {lowest} was not there to compile with: pip install 'torch>={lowest}' first")
    if not torch.supported:
        raise MissingToolError(f"torch {torch.version} is older than {lowest}, the lowest that the compiled ops support")
    return torch


def find_pybind11() -> Path:
    """Folder of pybind11's headers.

    Raises:
        MissingToolError: pybind11 is not there.
    """
    spec = importlib.util.find_spec("pybind11")
    if spec is None or not spec.submodule_search_locations:
        raise MissingToolError("pybind11 was not there to compile with: pip install pybind11")
    return Path(spec.submodule_search_locations[0]) / "include"


def find_compiler(environ: Mapping[str, str]) -> list[str]:
    """Command of a compiler that can build and link C++20 with OpenMP: CXX, or else the first of c++, g++ and clang++.

    Raises:
        MissingToolError: there is none.
    """
    candidates = [shlex.split(environ["CXX"])] if environ.get("CXX") else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]) and _compiles(command):
            return command
    raise MissingToolError(NO_COMPILER)


def _compiles(command: list[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text(PROBE)
        try:
            done = subprocess.run(
                [*command, "-std=c++20", "-fopenmp", "-o", f"{folder}/probe", str(source)], capture_output=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0 and (Path(folder) / "probe").is_file()


def find_nvcc(environ: Mapping[str, str]) -> Nvcc:
    """NVCC or CUDACXX, CUDA_HOME or CUDA_PATH, PATH, or the package nvidia-cuda-nvcc, in this order.

    Raises:
        MissingToolError: there is none, it does not run, or the static CUDA runtime is not beside it.
    """
    named = [environ.get(name) for name in ("NVCC", "CUDACXX")]
    named += [str(Path(environ[name]) / "bin" / "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    named += ["nvcc", *(str(path) for folder in library_folders() for path in sorted(folder.glob("nvidia/cu*/bin/nvcc")))]
    path = next((found for name in named if name and (found := shutil.which(name))), None)
    if path is None:
        raise MissingToolError("no nvcc: put it on PATH, set CUDA_HOME, or pip install '.[cuda-ci]'")
    release = re.search(r"release (\d+\.\d+)", _output([path, "--version"]))
    root = re.search(r"^#\$ TOP=(.*)$", _output([path, "--dryrun", "-c", "probe.cu"]), re.M)
    if release is None or root is None:
        raise MissingToolError(f"{path} does not run as nvcc")
    places = [Path(root[1]) / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    folder = next((place for place in places if (place / "libcudart_static.a").is_file()), None)
    if folder is None:
        raise MissingToolError(f"no libcudart_static.a under {os.path.normpath(root[1])}: install the CUDA runtime's development files")
    return Nvcc(path, release[1], folder.resolve())


def _output(command: list[str]) -> str:
    """Standard output and error of a command; nothing if it does not run."""
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
