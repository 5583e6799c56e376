"""Loading of the compiled ops: when they are used, when not, what is said and how often."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from poet_megatron.ops import native

BUILT = (native.FOLDER / native.LIBRARIES["cpu"]).is_file()


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loader as in a new process, and its answers forgotten again afterwards."""
    monkeypatch.delenv("POET_NATIVE", raising=False)
    for cached in (native.load, native._warn_once):
        cached.cache_clear()
    yield
    for cached in (native.load, native._warn_once):
        cached.cache_clear()


def answers(*devices: str) -> tuple[list[bool], list[str]]:
    """What native_available says, and the warnings it gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [native.native_available(device) for device in devices]
    return found, [str(warning.message) for warning in caught if warning.category is native.NativeMissingWarning]


def test_off_is_off_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POET_NATIVE", "0")
    assert answers("cpu", "cuda", "cpu") == ([False] * 3, [])
    assert {(found.cpu, found.cuda) for found in native.explain()} == {("reference", "reference")}
    assert all("POET_NATIVE=0" in found.why for found in native.explain())


def test_a_missing_library_is_one_warning_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "host_module", lambda: None)
    found, said = answers("cpu", "cpu", "cpu", "meta")
    assert found == [False] * 4
    assert len(said) == 1
    assert all(words in said[0] for words in ("_poet_cpu.so", "install g++", "pip install .", "docs/install.md", "POET_NATIVE=0"))


def test_a_missing_cuda_library_is_of_interest_on_a_gpu_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "LIBRARIES", {**native.LIBRARIES, "cuda": "no-such.so"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert answers("cuda", "cuda") == ([False, False], [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found, said = answers("cuda", "cuda")
    assert found == [False, False] and len(said) == 1


def test_an_old_torch_is_not_given_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu126")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail("loaded"))
    found, said = answers("cpu", "cuda")
    assert found == [False, False]
    assert len(said) == 1 and "torch 2.12.1+cu126 is older than 2.13" in said[0] and "torch>=2.13" in said[0]


def test_a_library_that_does_not_load_is_a_reason_not_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_poet_cpu.so").write_text("not a library")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    found, said = answers("cpu")
    assert found == [False] and "_poet_cpu.so does not load" in said[0]


def test_a_library_without_all_ops_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "_poet_cpu.so").touch()
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(native, "has_kernel", lambda op, device: op != "merge")
    assert not native.load("cpu").available
    assert "of another version, it lacks merge" in native.load("cpu").why


def test_the_reason_of_the_build_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Host:
        @staticmethod
        def build_info() -> dict[str, str]:
            return {"cpu": "torch >= 2.13 was not there to compile with", "cuda": "POET_CUDA=0"}

    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "host_module", lambda: Host)
    assert native.load("cpu").why == "not built: torch >= 2.13 was not there to compile with"
    assert native.load("cuda").why.startswith("the CPU ops are missing: not built: torch")


def test_required_ops_that_are_missing_are_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setenv("POET_NATIVE", "1")
    with pytest.raises(RuntimeError, match="POET_NATIVE=1, but compiled ops for cpu tensors are missing"):
        native.native_available("cpu")


def test_devices_that_no_op_knows_have_none() -> None:
    assert answers("meta", "mps", "xpu") == ([False] * 3, [])


def test_every_op_is_explained() -> None:
    assert [found.op for found in native.explain()] == list(native.OPS)


@pytest.mark.skipif(not BUILT, reason="the compiled ops are not built here")
def test_a_built_library_has_every_op_and_says_which_instructions_it_uses() -> None:
    assert answers("cpu", "cpu") == ([True, True], [])
    assert all(native.has_kernel(op, "cpu") for op in native.OPS)
    assert {found.cpu for found in native.explain()} == {"native"}
    assert native.cpu_isa() in ("portable", "avx2", "avx512", "amx")
    assert str(native.cpu_isa()) in native.load("cpu").why


def test_the_answer_is_a_constant_for_the_compiler() -> None:
    def choose(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if native.native_available(x.device.type) else x - 1

    native.load("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = choose(torch.zeros(2))
        assert torch.equal(torch.compile(choose, backend="eager", fullgraph=True)(torch.zeros(2)), expected)
