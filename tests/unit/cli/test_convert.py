"""The convert command hands its options on, says what happens and how to go on."""

from __future__ import annotations

import argparse
import sys
import types
from pathlib import Path

import pytest

from poet_megatron.cli import convert
from poet_megatron.cli.main import main
from poet_megatron.monitor.run_dir import RunDirectory


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    convert.add_parser(parser.add_subparsers())
    return parser.parse_args(["convert", *words])


def test_options_progress_and_the_next_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def convert_run(run, output, step, report):
        calls.append((run, output, step))
        report("loading")
        return RunDirectory(output)

    monkeypatch.setitem(sys.modules, "poet_megatron.train.convert_run", types.SimpleNamespace(convert_run=convert_run))
    assert convert.run(parse("--run", "runs/big", "--output", "runs/one")) == 0
    assert convert.run(parse("--run", "runs/big", "--output", "runs/one", "--step", "7")) == 0
    assert calls == [(Path("runs/big"), Path("runs/one"), None), (Path("runs/big"), Path("runs/one"), 7)]
    output = capsys.readouterr().out
    assert output.startswith("loading\nconverted in ")
    assert "poet-megatron pretrain --config runs/one/config.yaml\n" in output


def test_help_says_when_it_is_not_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("Training resumes in another layout by itself", "holds the whole model", "poet-megatron pretrain --config"):
        assert words in text


@pytest.mark.parametrize("words", [["--run", "r"], ["--output", "o"]])
def test_both_folders_are_needed(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*words)
    assert "required" in capsys.readouterr().err


def test_a_missing_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--run", str(tmp_path / "nothing"), "--output", str(tmp_path / "new")]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {tmp_path / 'nothing'} does not exist; give the run directory of a pretraining (train.run_dir)\n"
    )
