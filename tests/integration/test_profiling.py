"""profile.steps in a real run: the trace holds the chosen steps with their parts, and the training is the same bits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from poet_megatron.train.run import pretrain

SETTINGS = {"train.steps": "6", "poet.merge_interval": "4", "checkpoint.interval": "0"}


def test_profiled_steps_of_a_run(tiny_run, losses, capsys):
    plain = tiny_run("plain", SETTINGS)
    assert pretrain(plain) == 0
    capsys.readouterr()
    profiled = tiny_run("profiled", {**SETTINGS, "profile.steps": "3:5", "profile.shapes": "true"})
    assert pretrain(profiled) == 0
    assert losses(profiled.train.run_dir) == losses(plain.train.run_dir)

    (trace,) = (Path(profiled.train.run_dir) / "profile").iterdir()
    with gzip.open(trace) as file:
        events = json.load(file)["traceEvents"]
    parts = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert sorted(name for name in parts if name.startswith("step ")) == ["step 3", "step 4"]
    for part, times in {"data": 2, "forward-backward": 2, "update": 2, "the merge after step 4": 1}.items():
        assert parts.count(part) == times, part
    assert not any("evaluation" in name or "checkpoint" in name for name in parts)

    text = capsys.readouterr().out
    assert "the profiler will trace steps 3 to 4 of rank 0" in text
    assert f"profile of steps 3 to 4: {trace}" in text and "forward-backward" in text
    assert not (Path(plain.train.run_dir) / "profile").exists()
