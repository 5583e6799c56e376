"""`build_ext` without the tools it wants: what it leaves out, removes, refuses and says. Nothing is compiled here."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import toolchain
from build_support.command import NAMES, extensions
from build_support.parts import BINDING_FLAGS, CXX_FLAGS, Builder
from build_support.settings import BuildSettings
from build_support.toolchain import Torch

ROOT = Path(__file__).parents[3]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POET_") and name not in ("CXX", "NVCC", "CUDA_HOME")}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    return subprocess.run(command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False)


def test_without_a_compiler_the_build_succeeds_and_warns_once(tmp_path: Path) -> None:
    (tmp_path / "lib" / "poet_megatron").mkdir(parents=True)
    for name in ("_poet_cpu.so", "_poet_cuda.so"):
        (tmp_path / "lib" / "poet_megatron" / name).touch()
    done = build(tmp_path, CXX="/bin/false", POET_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("warning: the compiled ops were not built") == 1 and "apt install g++" in done.stderr
    assert not list((tmp_path / "lib").rglob("*.so")), "a library of an earlier build would be packed"


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"POET_NATIVE": "1", "CXX": "/bin/false"}, ["POET_NATIVE=1, but", "apt install g++"]),
        ({"POET_CUDA": "1", "CXX": "/bin/false"}, ["POET_CUDA=1, but", "apt install g++"]),
        ({"POET_CUDA": "maybe"}, ["POET_CUDA='maybe'"]),
    ],
)
def test_what_is_asked_for_is_an_error_if_it_cannot_be_had(tmp_path: Path, environment: dict[str, str], words: list[str]) -> None:
    done = build(tmp_path, **environment)
    assert done.returncode != 0
    assert all(word in done.stderr for word in words) and "Traceback" not in done.stderr, done.stderr


def test_cuda_without_nvcc_says_where_to_get_it(tmp_path: Path) -> None:
    installed = [path for folder in toolchain.library_folders() for path in folder.glob("nvidia/cu*/bin/nvcc")]
    if installed or shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("this machine has nvcc where it cannot be hidden")
    done = build(tmp_path, POET_CUDA="1", PATH="/usr/bin:/bin")
    assert done.returncode != 0
    assert "POET_CUDA=1, but no nvcc: put it on PATH, set CUDA_HOME, or pip install '.[cuda-ci]'" in done.stderr


def test_parts_by_setting() -> None:
    def parts(**settings: str) -> list[str]:
        names = [extension.name for extension in extensions(BuildSettings(**settings))]
        return [part for part, name in NAMES.items() if name in names]

    assert parts(native="0") == []
    assert parts(cuda="0") == ["cpu", "host", "text"]
    assert parts() == ["cpu", "cuda", "host", "text"]
    assert all(extension.optional for extension in extensions(BuildSettings()))


def test_commands_are_portable_and_carry_the_flags_of_the_environment(tmp_path: Path) -> None:
    environment = {"CXXFLAGS": "-g -fno-omit-frame-pointer", "LDFLAGS": "-Wl,-O1"}
    builder = Builder.create(ROOT / "csrc", tmp_path, ["c++"], environment)
    torch = Torch("2.13.0", None, tmp_path)
    binding = builder.binding("cpu_ops", torch)
    steps = [*builder.kernels(), binding, builder.link_ops(tmp_path / "x.so", [binding.output], torch)]
    words = [word for step in steps for word in step.command]
    assert not any("march=native" in word or "mtune=native" in word for word in words)
    assert "-DTORCH_TARGET_VERSION=0x020d000000000000" in BINDING_FLAGS and "-O3" in CXX_FLAGS and "-fopenmp" in CXX_FLAGS
    assert words.count("-fno-omit-frame-pointer") == len(steps) - 1 and steps[-1].command.count("-Wl,-O1") == 1
    assert not any("torch" in word for step in builder.kernels() for word in step.command if word != str(ROOT))


def test_bindings_alone_know_torch_and_kernels_know_no_python() -> None:
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.parent.name != "bindings":
            text = path.read_text()
            assert "#include <torch" not in text and "pybind11" not in text and "Python.h" not in text, path
