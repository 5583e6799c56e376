"""An sdist and a wheel can be built, and the wheel works where the source tree is not: compiled ops, command line, reference path."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from build_support.toolchain import MissingToolError, find_compiler

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "*.so")
USE = """
import torch
from poet_megatron.ops import native
assert native.native_available("cpu"), native.load("cpu").why
x, order = torch.randn(5, 12), torch.randperm(12).int()
y = torch.ops.poet_native.permuted_block_product(x, order, [torch.zeros(3, 4, 4)], False, order.argsort().int())
assert torch.equal(x, y)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("POET_", "PYTHON"))}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy of the tree by the build backend."""
    folder = tmp_path_factory.mktemp("sdist")
    tree = shutil.copytree(ROOT, folder / "tree", ignore=LEFT_OUT)
    run(sys.executable, "-c", "from build_support.backend import build_sdist; build_sdist('..')", cwd=tree)
    return next(folder.glob("poet_megatron-*.tar.gz"))


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    """The tree that the sdist holds."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return sdist.with_name(sdist.name.removesuffix(".tar.gz"))


def wheel(unpacked: Path, output: Path, **environment: str) -> Path:
    command = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", output, ".")
    shutil.rmtree(unpacked / "build", ignore_errors=True)
    run(*command, cwd=unpacked, **environment)
    return next(output.glob("*.whl"))


def fresh_environment(folder: Path, package: Path) -> Path:
    """A virtual environment with this package, and behind it what is installed here (but not our editable installation)."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "behind.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--force-reinstall", package, cwd=folder)
    return python


@pytest.mark.slow
def test_the_sdist_has_what_a_build_needs_and_no_more(unpacked: Path) -> None:
    for path in (*(ROOT / "csrc").rglob("*"), *(ROOT / "build_support").glob("*.py")):
        if path.is_file():
            assert (unpacked / path.relative_to(ROOT)).is_file(), path
    assert (unpacked / "setup.py").is_file() and (unpacked / "LICENSE").is_file() and (unpacked / "constraints" / "cpu.txt").is_file()
    assert not list(unpacked.rglob("*.so")) and not (unpacked / "runs").exists()


@pytest.mark.slow
def test_the_wheel_of_the_sdist_works_in_a_fresh_environment(unpacked: Path, tmp_path: Path) -> None:
    try:
        find_compiler(os.environ)
    except MissingToolError as missing:
        pytest.skip(str(missing))
    package = wheel(unpacked, tmp_path, POET_NATIVE="1", POET_CUDA="0")
    names = zipfile.ZipFile(package).namelist()
    assert any(name.endswith("/_poet_cpu.so") for name in names) and any("/_host." in name for name in names)
    assert {name.split("/")[0] for name in names if not name.startswith("poet_megatron-")} == {"poet_megatron", "data_prep"}
    python = fresh_environment(tmp_path / "venv", package)
    run(python, "-W", "error::UserWarning:poet_megatron", "-c", USE, cwd=tmp_path)
    report = json.loads(run(python.with_name("poet-megatron"), "doctor", "--json", cwd=tmp_path))
    assert Path(report["installed_in"]).is_relative_to(tmp_path / "venv")
    assert {row["cpu"] for row in report["ops"]} == {"native"} and report["build"]["cuda"] == "POET_CUDA=0"
    assert "march=native" not in report["build"]["flags"]


@pytest.mark.slow
def test_the_wheel_of_a_machine_without_a_compiler_works_too(unpacked: Path, tmp_path: Path) -> None:
    package = wheel(unpacked, tmp_path, CXX="/bin/false")
    assert not [name for name in zipfile.ZipFile(package).namelist() if name.endswith(".so")]
    python = fresh_environment(tmp_path / "venv", package)
    use = "from poet_megatron.ops import native; assert not any(native.native_available('cpu') for _ in range(3))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POET_")}
    said = subprocess.run([python, "-c", use], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stderr
    assert said.count("NativeMissingWarning") == 1 and "install g++" in said
