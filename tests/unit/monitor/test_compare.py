"""Comparing runs: what each reached, which settings differ, the order, and what is said about damage."""

from __future__ import annotations

import json
import math
import os
import random
import re
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from poet_megatron.cli import main as cli
from poet_megatron.config.dump import to_yaml
from poet_megatron.config.load import load_config
from poet_megatron.errors import UserError
from poet_megatron.monitor.compare import Point, Run, common_folder, differing_settings, find_runs, ranked, read_run, remarks, short_names
from poet_megatron.monitor.compare_table import value_text
from poet_megatron.monitor.plot import NAMED, draw, legend_rows, loss_range, make_figure, smoothed

STEPS = 100


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Make a run directory: write("name", {"poet.block_size": 64}, train={step: loss}, valid={step: loss})."""

    def make(
        name: str,
        changes: Mapping[str, Any] | None = None,
        train: Mapping[int, float | None] | None = None,
        valid: Mapping[int, float | None] | None = None,
    ) -> Path:
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        settings = {"train.steps": STEPS, "train.run_dir": path, "data.path": "data", **(changes or {})}
        (path / "config.yaml").write_text(to_yaml(load_config(None, [f"--{key}={value}" for key, value in settings.items()])))
        (path / "run.json").write_text("[]")
        with (path / "metrics.jsonl").open("w") as file:
            for step, loss in (train if train is not None else dict.fromkeys(range(1, STEPS + 1), 4.0)).items():
                row = {"train/loss": loss, "perf/tokens_per_s": 1000.0 + step, "mem/peak_gib": step / 100}
                file.write(json.dumps({"step": step, "time": 0, **row}) + "\n")
            for step, loss in (valid if valid is not None else {0: 9.0, STEPS: 4.0}).items():
                file.write(json.dumps({"step": step, "time": 0, "eval/loss": loss}) + "\n")
        return path

    return make


def read(path: Path) -> Run:
    return read_run(path, path.parent)


def test_numbers_of_a_run(write):
    losses = {step: random.Random(step).uniform(3, 5) for step in range(2, STEPS + 1, 2)}
    run = read(write("a", train=losses, valid={0: 9.0, 50: 3.5, STEPS: 3.75}))
    last = [losses[step] for step in (96, 98, 100)]  # 5% of 50 logged steps, rounded up
    assert run.last_train_loss == pytest.approx(sum(last) / 3, abs=1e-12)
    assert (run.best, run.final) == (Point(50, 3.5), Point(STEPS, 3.75))
    assert (run.steps_done, run.steps_total, run.state) == (STEPS, STEPS, "complete")
    assert run.tokens_per_s == pytest.approx(np.median([1000.0 + step for step in losses]))
    assert run.peak_gib == 1.0
    assert not run.problems


@pytest.mark.parametrize(
    ("train", "valid", "state"),
    [
        ({10: 4.0, 40: 3.9}, {0: 9.0}, "stopped at 40"),
        ({10: 4.0}, {0: 9.0, 50: 4.0}, "stopped at 50"),
        ({}, {}, "no metrics"),
        ({10: 4.0, 20: None, 30: None}, {0: 9.0}, "not finite since 20"),
        ({10: None, 20: 4.0, 30: 3.9}, {0: 9.0}, "stopped at 30"),
        ({100: 4.0}, {0: 9.0, 100: None}, "not finite since 100"),
        ({100: 4.0}, {0: 9.0}, "complete"),
    ],
)
def test_state(write, train, valid, state):
    assert read(write("a", train=train, valid=valid)).state == state


def test_state_of_a_run_that_a_process_holds(write):
    path = write("a", train={10: 4.0}, valid={0: 9.0})
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}
    for changes, state in [({}, "running"), ({"host": "another"}, "perhaps running"), ({"pid": 2**30}, "stopped")]:  # no such pid: killed
        (path / "lock").write_text(json.dumps(holder | changes))
        assert read(path).state == f"{state} at 10"


def test_only_what_differs_is_named(write):
    runs = [
        read(write("a", {"poet.block_size": 64, "optim.poet_lr": 2e-3})),
        read(write("b", {"poet.block_size": 128, "optim.poet_lr": 2e-3, "train.stop_at_step": 7, "profile.steps": "1:2"})),
        read(write("c", {"poet.block_size": 128, "optim.poet_lr": 1e-3})),
    ]
    assert differing_settings(runs) == ["poet.block_size", "optim.poet_lr"]


def test_settings_without_meaning_for_a_dense_run_do_not_count(write):
    poet = {"poet.block_size": 64, "optim.poet_lr": 2e-3}
    runs = [read(write("a", poet)), read(write("b", poet)), read(write("dense", {"method": "adamw"}))]
    assert differing_settings(runs) == ["method"]


def test_short_names_stay_unique():
    keys = ["optim.weight_decay", "poet.block_size", "optim.eps", "model.eps"]
    assert list(short_names(keys).values()) == ["weight_decay", "block_size", "optim.eps", "model.eps"]


def test_order_is_by_the_last_validation_then_the_last_training_loss(write):
    runs = [
        read(write("diverged", valid={0: 9.0, 50: 1.0, 100: None})),
        read(write("unmeasured", train={10: 2.0}, valid={})),
        read(write("second", valid={100: 3.5})),
        read(write("first", valid={50: 3.9, 100: 3.25})),
        read(write("empty", train={}, valid={})),
    ]
    assert [run.name for run in ranked(runs)] == ["first", "second", "unmeasured", "diverged", "empty"]


def test_runs_below_a_folder_are_found_and_checkpoints_are_not_runs(write, tmp_path):
    first, second = write("sweep/point-0"), write("sweep/deep/point-1")
    checkpoint = first / "checkpoints" / "step-00000100"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.yaml").write_text("method: poet\n")
    (checkpoint / "metrics.jsonl").write_text("")
    sweep = tmp_path / "runs" / "sweep"
    assert find_runs([sweep]) == [second, first]
    assert find_runs([first, sweep, first / ".." / "point-0"]) == [first, second]
    assert common_folder([sweep], [second, first]) == sweep
    assert common_folder([first, second], [first, second]) == sweep
    assert common_folder([first], [first]) == sweep


def test_paths_without_runs_are_errors(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; give run directories"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(UserError, match="no run in .*: a run directory holds config.yaml and metrics.jsonl"):
        find_runs([tmp_path])


def damage(path: Path, kind: str) -> None:
    metrics = path / "metrics.jsonl"
    if kind == "no metrics":
        metrics.unlink()
    elif kind == "empty":
        metrics.write_text("")
    elif kind == "half a line":
        metrics.write_text(metrics.read_text()[:-20])
    elif kind == "wrong types":
        metrics.write_text(metrics.read_text() + '{"step": 7, "train/loss": "high", "mem/peak_gib": [1]}\n[1, 2]\n')
    elif kind == "not text":
        metrics.write_bytes(b"\xff\xfe\x00" * 50)
    elif kind == "no config":
        (path / "config.yaml").unlink()
    elif kind == "bad config":
        (path / "config.yaml").write_text("poet: {block_sise: 3}\n")
    elif kind == "nan":
        metrics.write_text('{"step": 5, "train/loss": null}\n{"step": 6, "train/loss": 3.0}\n')


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no metrics", "broken: no metrics.jsonl: it has logged nothing yet, or failed before its first step"),
        ("empty", "broken: metrics.jsonl is empty: it has logged nothing yet"),
        ("half a line", "broken: 1 of 102 lines of metrics.jsonl are damaged and left out"),
        ("wrong types", "broken: 1 of 104 lines of metrics.jsonl are damaged and left out"),
        ("not text", "broken: 1 of 1 lines of metrics.jsonl are damaged and left out"),
        ("no config", "broken: its settings are not known: configuration file .*config.yaml does not exist"),
        ("bad config", "broken: its settings are not known: .*unknown key poet.block_sise"),
        ("nan", "broken: 1 of 2 logged training losses are not finite"),
    ],
)
def test_damage_is_a_message_and_the_rest_is_compared(write, capsys, kind, message):
    good = write("good", {"poet.block_size": 64})
    damage(write("broken", {"poet.block_size": 128}), kind)
    assert cli.main(["compare", str(good.parent), "--output", str(good.parent / "pictures")]) == 0
    out, err = capsys.readouterr()
    assert out.count("good") == 1 and out.count("broken") == 1
    assert re.fullmatch(f"note: {message}.*", err.strip()), err
    assert (good.parent / "pictures" / "compare.png").stat().st_size > 5000


def test_validation_losses_of_other_data_are_pointed_out(write):
    runs = [read(write("a", {"data.path": "c4"})), read(write("b", {"data.path": "books"}))]
    assert remarks(runs) == ["data.path differ: validation losses compare only on the same validation text and tokenizer"]
    assert remarks(runs[:1]) == []


def test_values_as_a_recipe_would_have_them(write):
    run = read(write("a", {"data.cache": "", "optim.lr": 1e-3, "data.path": "x" * 50}))
    assert [value_text(run, key) for key in ("data.cache", "optim.lr", "poet.master_weights")] == ["''", "0.001", "true"]
    assert value_text(run, "data.path") == "..." + "x" * 29
    assert value_text(Run(run.path, "b"), "optim.lr") == "?"


def test_table(write, capsys):
    write("small", {"poet.block_size": 64, "optim.poet_lr": 2e-3}, valid={0: 9.0, 50: 3.25, 100: 3.5})
    write("large", {"poet.block_size": 128, "optim.poet_lr": 1e-3}, valid={0: 9.0, 100: 3.0})
    path = write("dense", {"method": "adamw"}, train={10: 5.0}, valid={})
    assert cli.main(["compare", str(path.parent)]) == 0
    lines = capsys.readouterr().out.splitlines()
    words = [line.split() for line in lines[:4]]
    assert words[0][:4] == ["run", "method", "block_size", "poet_lr"]
    assert words[1] == [
        "*",
        "large",
        "poet",
        "128",
        "0.001",
        "100/100",
        "3.0000",
        "20.09",
        "3.0000",
        "20.09",
        "4.0000",
        "1.05k",
        "1.00",
        "complete",
    ]
    assert words[2] == [
        "small",
        "poet",
        "64",
        "0.002",
        "100/100",
        "3.5000",
        "33.12",
        "3.2500",
        "25.79",
        "4.0000",
        "1.05k",
        "1.00",
        "complete",
    ]
    assert words[3] == ["dense", "adamw", "-", "-", "10/100", "-", "-", "-", "-", "5.0000", "1.01k", "0.10", "stopped", "at", "10"]
    assert lines[4].startswith("* lowest validation loss")
    assert lines[5:] == [f"picture: {path.parent / name}" for name in ("compare.svg", "compare.png")]


def test_json(write, capsys):
    write("a", {"poet.block_size": 64}, valid={0: 9.0, 100: None})
    path = write("b", {"poet.block_size": 128}, valid={0: 9.0, 100: 3.0})
    assert cli.main(["compare", str(path.parent), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["best"], found["settings"]) == ("b", ["poet.block_size"])
    assert [run["settings"] for run in found["runs"]] == [{"poet.block_size": 128}, {"poet.block_size": 64}]
    assert found["runs"][0]["final"] == {"step": 100, "loss": 3.0, "ppl": pytest.approx(math.exp(3.0))}
    assert found["runs"][1]["final"] == {"step": 100, "loss": None, "ppl": None}
    assert [Path(name).name for name in found["pictures"]] == ["compare.svg", "compare.png"]


def test_no_run_with_a_loss_has_no_picture(write, capsys):
    path = write("a", train={}, valid={})
    assert cli.main(["compare", str(path)]) == 0
    assert "no picture: no run has a finite loss" in capsys.readouterr().out
    assert not list(path.parent.glob("compare.*"))


def test_output_that_cannot_be_written(write, capsys):
    path = write("a")
    assert cli.main(["compare", str(path), "--output", str(path / "config.yaml")]) == 2
    assert re.search("the pictures cannot be written into .*config.yaml: .*; choose another folder with --output", capsys.readouterr().err)


def test_moving_mean():
    losses = np.array([float(step) for step in range(100)])
    losses[40] = np.nan
    found = smoothed(losses)  # a window of 4% of 100 points: two on either side
    assert found[0] == (0 + 1 + 2) / 3
    assert found[50] == 50.0
    assert np.isnan(found[40]) and found[41] == (39 + 41 + 42 + 43) / 4
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_picture_shows_the_end_and_not_the_first_steps(write):
    losses = {step: 3.0 + 7.0 * math.exp(-step / 4) for step in range(1, STEPS + 1)}
    low, high = loss_range([read(write("a", train=losses, valid={0: 10.0, STEPS: 3.1}))])
    assert low < 3.0 and 3.1 < high < 4.0
    low, high = loss_range([read(write("flat", train={5: 3.0}, valid={}))])
    assert low < 3.0 < high


def test_legend_names_what_differs(write):
    a, b = read(write("a", {"poet.block_size": 64})), read(write("b", {"poet.block_size": 128}, valid={}))
    rows = [row.split() for row in legend_rows([a, b])]
    assert rows == [["block_size", "valid"], ["64", "4.0000"], ["128", "-"]]
    twin = read(write("twin", {"poet.block_size": 64}))
    assert [row.split() for row in legend_rows([a, twin, b])][1:3] == [["a", "64", "4.0000"], ["twin", "64", "4.0000"]]
    assert [row.split() for row in legend_rows([a, twin])] == [["run", "valid"], ["a", "4.0000"], ["twin", "4.0000"]]


def test_picture_of_more_runs_than_can_be_told_apart(tmp_path):
    train = [Point(step, 4.0) for step in range(1, 50)]
    runs = [Run(tmp_path, f"_run-{n:02d}$x^$", {}, train, [Point(49, 3.0 + n / 100)]) for n in range(NAMED + 3)]
    svg, png = draw(runs, tmp_path)
    text = svg.read_text()  # holds every label as a comment
    assert "<!--  3 more: see the table -->" in text
    assert [f"_run-{n:02d}$x^$  3.{n:02d}00" in text for n in range(NAMED + 3)] == [True] * NAMED + [False] * 3
    assert png.read_bytes().startswith(b"\x89PNG")
    draw(runs[::-1], tmp_path)
    assert svg.read_text() == text  # the same runs give the same picture
    assert len(make_figure(runs).axes[0].lines) == 2 * NAMED + 3  # mean and validation of the named ones, the mean of the others
    assert len(make_figure(runs[:2]).axes[0].lines) == 2 * 3  # and what was logged, of a few
