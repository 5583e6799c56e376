"""The compiled parts of the package: which sources each is made of, and the commands that make it.

kernels  csrc/cpu/*.cpp                                   an archive, linked into the next two
cpu      csrc/bindings/cpu_ops.cpp + kernels              poet_megatron/_poet_cpu.so
host     csrc/bindings/host.cpp + kernels                 poet_megatron/_host.<python's suffix>
text     csrc/bindings/text.cpp, csrc/text/*.cpp          poet_megatron/_text.<python's suffix>
cuda     csrc/bindings/cuda_ops.cpp, csrc/cuda/*.cu       poet_megatron/_poet_cuda.so
"""

from __future__ import annotations

import shlex
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from build_support.settings import LOWEST_TORCH, BuildSettings
from build_support.steps import Step
from build_support.toolchain import Nvcc, Torch

CXX_FLAGS = ("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fopenmp", "-Wall", "-Wno-uninitialized", "-Wno-maybe-uninitialized")
"""Never -march=native: the kernels name the instruction sets they use, and choose among them when they run."""

NVCC_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "-Xcompiler", "-fPIC")
TARGET_VERSION = f"-DTORCH_TARGET_VERSION=0x{LOWEST_TORCH[0]:02x}{LOWEST_TORCH[1]:02x}000000000000"
BINDING_FLAGS = ("-fvisibility=hidden", TARGET_VERSION)


@dataclass(frozen=True)
class Builder:
    """Commands for one source tree, compiler and build folder.

    Attributes:
        csrc: the folder of that name.
        temp: where objects go.
        compiler: command of the C++ compiler.
        extra: CPPFLAGS and CXXFLAGS of the environment, behind our own.
        link_extra: LDFLAGS of the environment.
    """

    csrc: Path
    temp: Path
    compiler: tuple[str, ...]
    extra: tuple[str, ...] = ()
    link_extra: tuple[str, ...] = ()

    @classmethod
    def create(cls, csrc: Path, temp: Path, compiler: list[str], environ: Mapping[str, str]) -> Builder:
        """A builder with the flags of the environment."""
        extra = [word for name in ("CPPFLAGS", "CXXFLAGS") for word in shlex.split(environ.get(name, ""))]
        return cls(csrc, temp, tuple(compiler), tuple(extra), tuple(shlex.split(environ.get("LDFLAGS", ""))))

    def kernels(self) -> list[Step]:
        """Objects of the CPU kernels: they know neither torch nor Python."""
        return [self.compile(source) for source in sorted((self.csrc / "cpu").glob("*.cpp"))]

    def archive(self, objects: list[Path]) -> Step:
        """The CPU kernels as one archive, so that a user of one function links no more than that."""
        output = self.temp / "libpoet_cpu.a"
        return Step(("ar", "rcsD", str(output), *map(str, objects)), output, tuple(objects))

    def binding(self, name: str, torch: Torch) -> Step:
        """Object of csrc/bindings/<name>.cpp, which sees torch's stable ABI."""
        return self.compile(self.csrc / "bindings" / f"{name}.cpp", *BINDING_FLAGS, "-isystem", str(torch.include))

    def text(self) -> list[Step]:
        """Objects of the tokenizer's inner loop, which knows no Python."""
        return [self.compile(source, "-fvisibility=hidden") for source in sorted((self.csrc / "text").glob("*.cpp"))]

    def module(self, name: str, pybind11: Path) -> Step:
        """Object of csrc/bindings/<name>.cpp, a Python module."""
        headers = ("-isystem", str(pybind11), "-isystem", sysconfig.get_path("include"))
        return self.compile(self.csrc / "bindings" / f"{name}.cpp", "-fvisibility=hidden", *headers)

    def build_info(self, text: str) -> Step:
        """Object that holds `text` as poet_build_info."""
        source = self.temp / "build_info.cpp"
        content = f'extern const char poet_build_info[];\nconst char poet_build_info[] = R"poet({text})poet";\n'
        if not source.is_file() or source.read_text() != content:
            source.write_text(content)
        return self.compile(source)

    def cuda_kernels(self, nvcc: Nvcc, settings: BuildSettings, host_compiler: str | None) -> list[Step]:
        """Objects of the CUDA kernels and their launchers, for all of `settings.archs`."""
        flags = [*NVCC_FLAGS, *settings.gencode, *(("-ccbin", host_compiler) if host_compiler else ())]
        steps = []
        for source in sorted((self.csrc / "cuda").glob("*.cu")):
            output = self.temp / "cuda" / f"{source.stem}.o"
            command = (nvcc.path, *flags, *self._includes(), "-c", str(source), "-o", str(output))
            steps.append(Step(command, output, (source, *self._headers())))
        return steps

    def link_ops(self, output: Path, objects: list[Path], torch: Torch) -> Step:
        """A library of ops. Its symbols must all be found; torch is found by its name, because it is loaded first."""
        return self._link(output, objects, "-fopenmp", *self._torch(torch))

    def link_cuda_ops(self, output: Path, objects: list[Path], torch: Torch, nvcc: Nvcc) -> Step:
        """As `link_ops`, with the CUDA runtime inside: the library loads where there is no driver."""
        runtime = (f"-L{nvcc.library_dir}", "-lcudart_static", "-lrt", "-ldl", "-lpthread")
        return self._link(output, objects, *runtime, *self._torch(torch))

    def link_module(self, output: Path, objects: list[Path]) -> Step:
        """A Python module; the interpreter provides Python's symbols."""
        return self._link(output, objects, "-fopenmp")

    @staticmethod
    def _torch(torch: Torch) -> tuple[str, ...]:
        return f"-L{torch.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-Wl,--as-needed", "-Wl,-z,defs"

    def compile(self, source: Path, *flags: str) -> Step:
        """Object of one C++ source, with `flags` behind the common ones."""
        output = self.temp / source.parent.name / f"{source.stem}.o"
        words = (*self.compiler, *CXX_FLAGS, *flags, *self._includes(), *self.extra, "-c", str(source), "-o", str(output))
        return Step(words, output, (source, *self._headers()))

    def _link(self, output: Path, objects: list[Path], *libraries: str) -> Step:
        words = (*self.compiler, "-shared", "-Wl,--as-needed", "-Wl,-s", *map(str, objects), *libraries, *self.link_extra)
        return Step((*words, "-o", str(output)), output, tuple(objects))

    def _includes(self) -> tuple[str, str]:
        return f"-I{self.csrc / 'include'}", f"-I{self.csrc}"

    def _headers(self) -> tuple[Path, ...]:
        return tuple(sorted(path for path in self.csrc.rglob("*") if path.suffix in (".h", ".cuh", ".inl")))
