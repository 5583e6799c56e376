"""The command line: help, errors, overrides, and how subcommands are found."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest

from poet_megatron.cli import main as cli
from poet_megatron.config.load import describe_fields, load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.errors import UserError

ROOT = Path(__file__).parents[3]


@pytest.fixture
def called(monkeypatch):
    """Stands for the parts that train and estimate; holds the configuration they were called with."""
    seen = {}

    def module(name, **contents):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))

    def pretrain(config, job):
        seen["pretrain"], seen["job"] = config, job
        return 7

    def estimate(config, world_size=None):
        seen["estimate"], seen["world_size"] = config, world_size

    module("poet_megatron.train.run", pretrain=pretrain)
    module("poet_megatron.estimate.estimate", estimate=estimate)
    module("poet_megatron.estimate.report", to_text=lambda found: "TEXT", to_json=lambda found: json.dumps({"rotated_parameters": 5}))
    return seen


def stub(monkeypatch, run, **options):
    """Makes `poet-megatron export` a subcommand that runs `run`."""

    def add_parser(subparsers):
        parser = subparsers.add_parser("export")
        parser.add_argument("--out")
        parser.set_defaults(**options)

    monkeypatch.setitem(sys.modules, "poet_megatron.cli.export", types.SimpleNamespace(add_parser=add_parser, run=run))


def fail(error):
    def run(args):
        raise error

    return run


def test_help_is_light():
    heavy = "[name for name in ('torch', 'yaml', 'numpy') if name in sys.modules]"
    code = f"import sys; from poet_megatron.cli.main import main; main(['--help']); print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_module_entry_point_returns_the_status():
    done = subprocess.run([sys.executable, "-m", "poet_megatron", "estimate", "--jsno"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: unknown option --jsno; did you mean --json?\n")


def test_pretrain_help_has_every_key(capsys):
    assert cli.main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    for field in describe_fields():
        assert any(line.strip().startswith(f"--{field.key} ") for line in lines), field.key
    assert "[optim]" in text and "Peak learning rate of the skew parameters." in text
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", ["pretrain", "estimate"])
def test_help_has_examples_that_load(command, capsys):
    cli.main([command, "--help"])
    assert f"poet-megatron {command} --config configs/" in capsys.readouterr().out


def test_no_command(capsys):
    assert cli.main([]) == 2
    assert "a first run:" in capsys.readouterr().err


def test_unknown_command(capsys):
    assert cli.main(["pretrian"]) == 2
    assert "pretrain" in capsys.readouterr().err


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("poet-megatron ")


def test_pretrain_trains_what_was_asked_for(called, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("train: {steps: 5, seed: 6}\n")
    status = cli.main(["pretrain", "--train.steps", "8", "--config", str(recipe), "--optim.lr=1e-4", "--poet.master_weights", "false"])
    expected = load_config(recipe, ["--train.steps=8", "--optim.lr=1e-4", "--poet.master_weights=false"])
    assert status == 7 and called == {"pretrain": expected, "job": None}


@pytest.mark.parametrize(("restarts", "expected"), [(None, 0), ("", 0), ("3", 3)])
def test_pretrain_knows_the_slurm_job_that_it_belongs_to(called, monkeypatch, restarts, expected):
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    if restarts is not None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    cli.main(["pretrain"])
    assert (called["job"].name, called["job"].restarts) == ("slurm 812", expected)


def test_dry_run_estimates_and_does_not_train(called, capsys):
    assert cli.main(["pretrain", "--dry-run", "--train.steps=8"]) == 0
    assert capsys.readouterr().out == "TEXT\n"
    assert set(called) == {"estimate", "world_size"} and called["estimate"].train.steps == 8


def test_print_config_can_be_loaded_again(called, capsys, tmp_path):
    assert cli.main(["pretrain", "--print-config", "--train.steps=8", "--poet.block_size=64"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_config(printed) == load_config(None, ["--train.steps=8", "--poet.block_size=64"])
    assert called == {}


def test_estimate(called, capsys):
    assert cli.main(["estimate", "--json", "--poet.block_size", "64"]) == 0
    assert json.loads(capsys.readouterr().out) == {"rotated_parameters": 5}
    assert called["estimate"] == dataclasses.replace(RunConfig(), poet=dataclasses.replace(RunConfig().poet, block_size=64))
    assert cli.main(["estimate", "--world-size", "16"]) == 0
    assert capsys.readouterr().out == "TEXT\n" and called["world_size"] == 16


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dryrun"], "unknown option --dryrun; did you mean --dry-run?"),
        (["--steps", "3"], "did you mean train.steps?"),
        (["--train.stepz", "3"], "did you mean train.steps?"),
        (["--train.steps"], "needs a value"),
        (["x.yaml"], "--config x.yaml"),
        (["--config", "gone.yaml"], "gone.yaml does not exist"),
        (["--train.steps", "1.5"], "train.steps is 1.5; expected an integer"),
    ],
)
def test_mistakes_are_one_line(called, capsys, words, expected):
    assert cli.main(["pretrain", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and expected in captured.err
    assert captured.out == "" and called == {}


def test_options_are_not_abbreviated(called, capsys):
    assert cli.main(["pretrain", "--dry"]) == 2
    assert called == {}


def test_user_error_and_missing_file(monkeypatch, capsys):
    stub(monkeypatch, fail(UserError("no such run")))
    assert cli.main(["export"]) == 2
    assert capsys.readouterr().err == "error: no such run\n"
    stub(monkeypatch, fail(FileNotFoundError(2, "No such file or directory", "a.bin")))
    assert cli.main(["export"]) == 2
    assert capsys.readouterr().err.splitlines()[0] == "error: a.bin: no such file or folder"


def test_value_error_of_a_library_says_how_to_find_it(monkeypatch, capsys):
    stub(monkeypatch, lambda args: json.loads("{"))
    assert cli.main(["export"]) == 2
    assert "--traceback" in capsys.readouterr().err


def test_bugs_are_not_hidden(monkeypatch):
    stub(monkeypatch, fail(RuntimeError("bug")))
    with pytest.raises(RuntimeError, match="bug"):
        cli.main(["export"])


def test_megatron_warnings_are_quiet_and_others_are_not(monkeypatch):
    def run(args):
        warnings.warn("Transformer Engine and Apex are not installed. Falling back to Torch optimizers.", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return 0

    stub(monkeypatch, run)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert cli.main(["export"]) == 0
    assert [str(warning.message) for warning in seen] == ["something else"]


def test_interrupt(monkeypatch, capsys):
    stub(monkeypatch, fail(KeyboardInterrupt()))
    assert cli.main(["export"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("position", [0, 1])
def test_traceback_option(monkeypatch, capsys, position):
    stub(monkeypatch, fail(UserError("no such run")))
    words = ["export"]
    words.insert(position, "--traceback")
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("error: no such run\n")


@pytest.mark.parametrize(("value", "shown"), [("1", True), ("0", False), ("", False)])
def test_debug_variable(monkeypatch, capsys, value, shown):
    monkeypatch.setenv("POET_DEBUG", value)
    stub(monkeypatch, fail(UserError("no such run")))
    assert cli.main(["export"]) == 2
    assert ("Traceback" in capsys.readouterr().err) is shown


def test_subcommand_without_overrides_refuses_unknown_options(monkeypatch, capsys):
    stub(monkeypatch, lambda args: 0)
    assert cli.main(["export", "--outt", "x"]) == 2
    assert "unknown option --outt" in (err := capsys.readouterr().err) and "did you mean --out?" in err


def test_subcommand_with_overrides_gets_the_rest_in_order(monkeypatch):
    got = []
    stub(monkeypatch, lambda args: got.append((args.out, args.overrides)) or 0, accepts_overrides=True)
    assert cli.main(["export", "--a.b", "-1e-3", "--out", "o", "--c.d=x y", "--e.f", "z"]) == 0
    assert got == [("o", ["--a.b", "-1e-3", "--c.d=x y", "--e.f", "z"])]


def test_output_that_nobody_reads():
    """As `poet-megatron pretrain --print-config | head -1` once head has gone: no traceback."""
    command = f"{sys.executable} -m poet_megatron pretrain --print-config"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (cli.EXIT_BROKEN_PIPE, "", "")
