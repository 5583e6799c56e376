"""The build_ext command: compiles what it can, goes on without the rest, and writes down why.

What becomes of each part is compiled into poet_megatron._host (`build_info()`), which `poet-megatron doctor` shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from setuptools import Extension
from setuptools.command.build_ext import build_ext

from build_support import toolchain
from build_support.parts import CXX_FLAGS, NVCC_FLAGS, Builder
from build_support.settings import BuildSettings, SettingError
from build_support.steps import Step, StepError, run_steps
from build_support.toolchain import MissingToolError

NAMES = {"cpu": "poet_megatron._poet_cpu", "cuda": "poet_megatron._poet_cuda", "host": "poet_megatron._host", "text": "poet_megatron._text"}
BUILT = "built"
ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def extensions(settings: BuildSettings) -> list[Extension]:
    """What setuptools packs: all optional, so that an installation without a compiler has none of them."""
    if settings.native == "0":
        return []
    parts = [part for part in NAMES if part != "cuda" or settings.cuda != "0"]
    return [Extension(NAMES[part], sources=[], optional=True) for part in parts]


class BuildNative(build_ext):
    """Builds the parts of `build_support.parts`; a part that cannot be built is left out unless its setting is "1"."""

    def get_ext_filename(self, fullname: str) -> str:
        """Libraries of ops are not Python modules: plain `.so`, for any Python."""
        name = super().get_ext_filename(fullname)
        return str(Path(*fullname.split(".")).with_suffix(".so")) if fullname.endswith(("_poet_cpu", "_poet_cuda")) else name

    def build_extensions(self) -> None:
        """Compile, link, and remove what an earlier build left of parts that this one does not have."""
        try:
            self.settings = BuildSettings.from_environment(os.environ)
            self.results = dict.fromkeys(NAMES, "not tried")
            self._build()
        except (SettingError, MissingToolError, StepError) as error:
            raise SystemExit(f"error: {error}") from error
        for name in self._missing():
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)
        self._report()

    def copy_extensions_to_source(self) -> None:
        """For an editable installation: also remove stale libraries from the source tree."""
        for name in self._missing():
            (ROOT / self.get_ext_filename(name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def _missing(self) -> list[str]:
        """Parts that this build does not have, whether it tried or not."""
        return [name for part, name in NAMES.items() if self.results[part] != BUILT]

    def _build(self) -> None:
        """Find the tools, run all compilations together, then link what has all of its objects."""
        try:
            compiler = toolchain.find_compiler(os.environ)
        except MissingToolError as error:
            for part in NAMES:
                self._miss(part, error)
            return
        temp = Path(self.build_temp).resolve()
        temp.mkdir(parents=True, exist_ok=True)
        self.builder = Builder.create(ROOT / "csrc", temp, compiler, os.environ)
        self.torch = self._find("cpu", toolchain.require_torch)
        self.nvcc = self._find_cuda()
        self.pybind11 = self._find("host", toolchain.find_pybind11)
        self.results["text"] = self.results["host"]
        self._link_all(self._compile_all())

    def _compile_all(self) -> dict[str, list[Path]]:
        """Compile everything there are tools for, the slowest first; returns the objects of each part."""
        steps: dict[str, list[Step]] = {"cuda": [], "kernels": self.builder.kernels(), "host": [], "text": [], "cpu": []}
        if self.torch:
            steps["cpu"] = [self.builder.binding("cpu_ops", self.torch)]
        if self.torch and self.nvcc:
            cuda_kernels = self.builder.cuda_kernels(self.nvcc, self.settings, os.environ.get("CXX"))
            steps["cuda"] = [*cuda_kernels, self.builder.binding("cuda_ops", self.torch)]
        if self.pybind11:
            steps["host"] = [self.builder.module("host", self.pybind11)]
            steps["text"] = [self.builder.module("text", self.pybind11), *self.builder.text()]
        self.errors = run_steps([step for part in steps.values() for step in part], self.settings.jobs)
        return {part: [step.output for step in part_steps] for part, part_steps in steps.items()}

    def _link_all(self, objects: dict[str, list[Path]]) -> None:
        """Link each part; the Python module last, because it holds what became of the others."""
        archive = self._archive(objects["kernels"])
        torch, nvcc = self.torch, self.nvcc
        if torch:
            self._link("cpu", objects["cpu"] + archive, lambda output, inputs: self.builder.link_ops(output, inputs, torch))
        if torch and nvcc:
            self._link("cuda", objects["cuda"], lambda output, inputs: self.builder.link_cuda_ops(output, inputs, torch, nvcc))
        if self.pybind11:
            self._link("text", objects["text"], self.builder.link_module)
            info = self.builder.build_info(json.dumps(self._info()))
            self.errors |= run_steps([info], 1)
            self._link("host", [*objects["host"], info.output, *archive], self.builder.link_module)

    def _find_cuda(self) -> toolchain.Nvcc | None:
        """The CUDA compiler, where POET_CUDA and what is installed ask for it."""
        return self._find("cuda", self._require_cuda)

    def _require_cuda(self) -> toolchain.Nvcc:
        if self.settings.cuda == "0":
            raise MissingToolError("POET_CUDA=0")
        if self.torch is None:
            raise MissingToolError(self.results["cpu"])
        if self.settings.cuda == "auto" and self.torch.cuda is None:
            raise MissingToolError(f"torch {self.torch.version} is a CPU build; POET_CUDA=1 builds them all the same")
        return toolchain.find_nvcc(os.environ)

    def _find(self, part: str, find: Callable[[], T]) -> T | None:
        try:
            return find()
        except MissingToolError as error:
            self._miss(part, error)
            return None

    def _miss(self, part: str, error: Exception) -> None:
        """Write down why a part is missing, or stop if it was asked for."""
        wanted = self.settings.cuda if part == "cuda" else self.settings.native
        if wanted == "1":
            raise MissingToolError(f"{'POET_CUDA' if part == 'cuda' else 'POET_NATIVE'}=1, but {error}") from error
        self.results[part] = str(error)

    def _archive(self, objects: list[Path]) -> list[Path]:
        """The archive of the CPU kernels; without all of its objects the parts that need it fail with their errors."""
        step = self.builder.archive(objects)
        failed = next((error for path in objects if (error := self.errors[path])), None)
        self.errors[step.output] = failed
        if failed is None:
            self.errors |= run_steps([step], 1)
        return [step.output]

    def _link(self, part: str, inputs: list[Path], link: Callable[[Path, list[Path]], Step]) -> None:
        """Link one part if all of its objects are there."""
        error = next((error for path in inputs if (error := self.errors[path])), None)
        output = Path(self.get_ext_fullpath(NAMES[part]))
        if error is None:
            output.parent.mkdir(parents=True, exist_ok=True)
            step = link(self.builder.temp / output.name, inputs)
            error = run_steps([step], 1)[step.output]
            if error is None:
                self.copy_file(str(step.output), str(output))
        if error is None:
            self.results[part] = BUILT
        else:
            self._miss(part, error)

    def _info(self) -> dict[str, object]:
        """What `poet_megatron._host.build_info()` returns."""
        version = subprocess.run([*self.builder.compiler, "--version"], capture_output=True, text=True, check=False).stdout
        nvcc = self.nvcc
        cuda = {"nvcc": nvcc.release, "archs": list(self.settings.archs), "flags": " ".join(NVCC_FLAGS)} if nvcc else None
        return {
            "cpu": self.results["cpu"],
            "cuda": self.results["cuda"],
            "text": self.results["text"],
            "compiler": version.partition("\n")[0],
            "flags": " ".join((*CXX_FLAGS, *self.builder.extra)),
            "torch": self.torch.version if self.torch else None,
            "cuda_build": cuda,
        }

    def _report(self) -> None:
        """One message about what was left out; pip shows it with -v only, the package says it again when it is used."""
        if self.results["cpu"] != BUILT:
            print(f"warning: the compiled ops were not built, the slower reference runs instead: {self.results['cpu']}", file=sys.stderr)
