"""The doctor command says what is used and why, to people and to scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from poet_megatron.cli import doctor
from poet_megatron.cli.main import main
from poet_megatron.ops import native


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_report_names_versions_processor_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in (f"torch {torch.__version__}", "compiler", "nvcc", *native.OPS):
        assert words in text
    assert text.count("\ncpu ") == 2 and "\ncuda " in text, "processor, and one reason for each device"


def test_json_is_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in report["ops"]] == list(native.OPS)
    assert set(report["devices"]) == {"cpu", "cuda"}
    assert report["packages"]["torch"] and report["installed_in"] == str(native.FOLDER)


def test_the_reference_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("POET_NATIVE", "0")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "POET_NATIVE=0" in text and "reference  reference" in text
    assert "native    " not in text and "to have the compiled ops" not in text


def test_a_machine_with_nothing_built_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.delenv("POET_NATIVE", raising=False)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "host_module", lambda: None)
    monkeypatch.setattr(doctor, "_tool", lambda candidates: None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compiler     none" in text and "nothing was compiled" in text
    assert "to have the compiled ops for cpu tensors: install g++" in text


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("reference", "native", "POET_NATIVE=0", "POET_CPU_ISA", "--json", "docs/install.md"))
