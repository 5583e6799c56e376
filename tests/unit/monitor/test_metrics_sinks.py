"""metrics.jsonl, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest

from poet_megatron.errors import UserError
from poet_megatron.monitor.config import MonitorConfig
from poet_megatron.monitor.metrics import JsonLinesSink, MetricsLogger, TensorBoardSink, read_metrics
from poet_megatron.monitor.run_dir import RunDirectory


@pytest.fixture
def directory(tmp_path):
    with RunDirectory(tmp_path / "run") as opened:
        yield opened


def steps_of(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_are_there_before_close(tmp_path):
    sink = JsonLinesSink(tmp_path / "m.jsonl")
    sink.log({"train/loss": 2.5, "step": 99}, 3)
    row = json.loads((tmp_path / "m.jsonl").read_text())
    assert (row["step"], row["train/loss"]) == (3, 2.5) and row["time"] > 1e9
    sink.close()


def test_not_finite_is_null_and_reads_as_nan(tmp_path):
    sink = JsonLinesSink(tmp_path / "m.jsonl")
    sink.log({"a": math.inf, "b": math.nan, "c": 1}, 1)
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))["a"] is None
    assert math.isnan(read_metrics(tmp_path / "m.jsonl")[0]["b"])


def test_rewind_drops_later_steps_and_goes_on(tmp_path):
    path = tmp_path / "m.jsonl"
    sink = JsonLinesSink(path)
    for step in (10, 20, 30, 40):
        sink.log({"x": step}, step)
    sink.rewind(20)
    assert steps_of(path) == [10, 20]
    sink.log({"x": 0.0}, 30)
    assert steps_of(path) == [10, 20, 30]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_half_a_line_of_a_crash_is_dropped(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2, "x"')
    assert [row["step"] for row in read_metrics(path)] == [1]
    JsonLinesSink(path).log({}, 5)
    assert steps_of(path) == [1, 5]


def test_a_new_start_appends(tmp_path):
    path = tmp_path / "m.jsonl"
    for step in (1, 2):
        sink = JsonLinesSink(path)
        sink.log({}, step)
        sink.close()
    assert steps_of(path) == [1, 2]


def scalars(path, tag):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(path))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)] if tag in events.Tags()["scalars"] else None


def test_tensorboard_shows_rewound_steps_once(tmp_path):
    sink = TensorBoardSink(tmp_path)
    for step in (1, 2, 3):
        sink.log({"train/loss": 10.0 + step, "step": step}, step)
    sink.rewind(1)
    for step in (2, 3):
        sink.log({"train/loss": 20.0 + step}, step)
    sink.close()
    assert scalars(tmp_path, "train/loss") == [(1, 11.0), (2, 22.0), (3, 23.0)]
    assert scalars(tmp_path, "step") is None


def test_logger_writes_both_on_rank_0(directory):
    with MetricsLogger(directory, MonitorConfig(), rank=0) as logger:
        logger.log({"train/loss": 1.5}, 1)
        logger.log({"train/loss": 2.5}, 2)
        logger.rewind(1)
    assert steps_of(directory.metrics_path) == [1]
    assert scalars(directory.tensorboard_path, "train/loss")[0] == (1, 1.5)


def test_other_ranks_write_nothing(directory):
    before = sorted(path.name for path in directory.path.iterdir())
    with MetricsLogger(directory, MonitorConfig(wandb_project="p"), rank=1) as logger:
        logger.log({"train/loss": 1.5}, 1)
        logger.rewind(0)
    assert sorted(path.name for path in directory.path.iterdir()) == before


def test_wandb_missing(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="monitor.wandb_project is 'mine'.*pip install wandb"):
        MetricsLogger(directory, MonitorConfig(wandb_project="mine"))


def test_wandb_run_is_continued(directory, monkeypatch):
    starts, rows = [], []

    class Run:
        id = "abc"
        define_metric = log = finish = lambda self, *args, **kwargs: rows.append(args)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: starts.append(kwargs) or Run()))
    for _ in range(2):
        with MetricsLogger(directory, MonitorConfig(wandb_project="mine"), settings={"train.steps": 5}) as logger:
            logger.log({"train/loss": 1.0}, 7)
    assert [start["id"] for start in starts] == [None, "abc"]
    assert starts[0]["project"] == "mine" and starts[0]["config"] == {"train.steps": 5}
    assert ({"train/loss": 1.0, "step": 7},) in rows
