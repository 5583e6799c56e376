"""Finding compilers and headers, with stand-ins on a PATH of their own."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from build_support import backend, toolchain
from build_support.toolchain import MissingToolError

NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release 13.0, V13.0.88" ;;
--dryrun) echo '#$ TOP={root}' >&2 ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def fake_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda!r}\n")
    return folder


@pytest.fixture
def empty_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A PATH with nothing on it, and no installed packages."""
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    monkeypatch.setenv("PATH", str(bin_folder))
    monkeypatch.setattr(toolchain, "library_folders", lambda: [tmp_path / "site"])
    return bin_folder


def test_no_compiler_says_what_to_install(empty_path: Path) -> None:
    with pytest.raises(MissingToolError, match=r"apt install g\+\+"):
        toolchain.find_compiler({})


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\nexit 0\n"])
def test_a_compiler_that_makes_nothing_is_none(tmp_path: Path, text: str) -> None:
    with pytest.raises(MissingToolError):
        toolchain.find_compiler({"CXX": str(script(tmp_path / "cxx", text))})


def test_cxx_may_have_arguments() -> None:
    assert toolchain.find_compiler({"CXX": "c++ -O1"}) == ["c++", "-O1"]


def test_nvcc_that_is_named_is_taken_and_its_runtime_found(tmp_path: Path, empty_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder / "lib64").mkdir(parents=True)
        (tmp_path / folder / "lib64" / "libcudart_static.a").touch()
    first, second = (script(tmp_path / name / "bin" / "nvcc", NVCC.format(root=tmp_path / name)) for name in ("one", "two"))
    found = toolchain.find_nvcc({"NVCC": str(first), "CUDA_HOME": str(tmp_path / "two")})
    assert (found.path, found.release, found.library_dir) == (str(first), "13.0", tmp_path / "one" / "lib64")
    assert toolchain.find_nvcc({"CUDA_HOME": str(tmp_path / "two")}).path == str(second)


def test_nvcc_of_the_python_package_is_found(tmp_path: Path, empty_path: Path) -> None:
    root = tmp_path / "site" / "nvidia" / "cu13"
    script(root / "bin" / "nvcc", NVCC.format(root=root))
    (root / "lib").mkdir()
    with pytest.raises(MissingToolError, match="libcudart_static.a"):
        toolchain.find_nvcc({})
    (root / "lib" / "libcudart_static.a").touch()
    assert toolchain.find_nvcc({}).library_dir == root / "lib"


def test_no_nvcc_and_a_broken_nvcc(tmp_path: Path, empty_path: Path) -> None:
    with pytest.raises(MissingToolError, match="no nvcc.*cuda-ci"):
        toolchain.find_nvcc({})
    broken = script(tmp_path / "nvcc", "#!/bin/sh\nexit 1\n")
    with pytest.raises(MissingToolError, match="does not run as nvcc"):
        toolchain.find_nvcc({"NVCC": str(broken)})


def test_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    installed = toolchain.find_torch()
    assert installed is not None
    assert (installed.version, installed.cuda) == (importlib.metadata.version("torch"), torch.version.cuda)
    gpu = toolchain.find_torch([tmp_path, fake_torch(tmp_path / "site", "2.14.0+cu130", "13.0")])
    assert gpu is not None and gpu.supported and gpu.cuda == "13.0"


def test_old_or_missing_torch_is_named(tmp_path: Path, empty_path: Path) -> None:
    with pytest.raises(MissingToolError, match="torch >= 2.13 was not there"):
        toolchain.require_torch()
    fake_torch(tmp_path / "site", "2.9.1")
    with pytest.raises(MissingToolError, match="torch 2.9.1 is older than 2.13"):
        toolchain.require_torch()


def test_torch_is_fetched_only_to_compile_and_only_if_it_is_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, empty_path: Path
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(toolchain, "find_compiler", lambda environ: ["c++"])
    monkeypatch.setenv("POET_NATIVE", "auto")
    assert backend.native_requirements() == ["torch==2.13.*"]
    monkeypatch.setenv("POET_NATIVE", "0")
    assert backend.native_requirements() == []
    monkeypatch.setenv("POET_NATIVE", "auto")
    fake_torch(tmp_path / "site", "2.14.0")
    assert backend.native_requirements() == []


def test_torch_is_not_fetched_without_a_compiler(monkeypatch: pytest.MonkeyPatch, empty_path: Path) -> None:
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("POET_NATIVE", "auto")
    assert backend.native_requirements() == []
