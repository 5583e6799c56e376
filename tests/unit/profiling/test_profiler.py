"""The profiler around steps of a made-up training loop: what it records, writes and prints, and that it ends with the block."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import record_function

from poet_megatron.profiling.config import ProfileConfig
from poet_megatron.profiling.profiler import StepProfiler
from poet_megatron.profiling.table import operator_table

CPU = torch.device("cpu")


@pytest.fixture
def profiler(tmp_path: Path) -> Callable[..., StepProfiler]:
    """Make a profiler whose lines end up in its `lines`."""

    def make(rank: int = 0, device: torch.device = CPU, **settings: object) -> StepProfiler:
        lines: list[str] = []
        made = StepProfiler(ProfileConfig(**settings), tmp_path, rank, 4, device, lines.append)  # type: ignore[arg-type]
        made.lines = lines  # type: ignore[attr-defined]
        return made

    return make


def take_steps(profiler: StepProfiler, steps: range, fail_in: int = 0) -> None:
    """A loop like the training loop's; step n multiplies matrices n times."""
    with profiler:
        for step in steps:
            profiler.step_begin(step)
            with record_function(f"step {step}"):
                for _ in range(step):
                    torch.ones(8, 8) @ torch.ones(8, 8)
                if step == fail_in:
                    raise FloatingPointError("nan")
            profiler.step_end(step)


def events(path: Path) -> list[dict]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def test_the_trace_holds_the_chosen_steps_and_nothing_else(profiler, tmp_path):
    made = profiler(steps="3:5")
    take_steps(made, range(1, 8))
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step-3-rank-0.json.gz"
    found = events(path)
    assert sorted(event["name"] for event in found if event.get("cat") == "user_annotation") == ["step 3", "step 4"]
    assert sum(event["name"] == "aten::mm" and event["ph"] == "X" for event in found) == 3 + 4
    assert made.lines[0].startswith(f"profile of steps 3 to 4: {path} (open it at ")
    table = made.lines[1]
    assert re.search(r"^step N +\d+\.\d{3}$", table, re.MULTILINE)
    assert re.search(r"^aten::mm +3.5 +\d", table, re.MULTILINE)  # calls per step


def test_off_costs_nothing_and_other_ranks_stay_out(profiler, tmp_path, monkeypatch):
    monkeypatch.setattr("poet_megatron.profiling.profiler.profile", None)  # any use of it would be an error
    for made in (profiler(), profiler(steps="2:4", ranks="1"), profiler(rank=3, steps="2:4", ranks="0,2")):
        take_steps(made, range(1, 6))
        assert made.lines == []
    take_steps(StepProfiler.off(), range(1, 6))
    assert list(tmp_path.iterdir()) == []


def test_every_rank_has_a_file_of_its_own(profiler, tmp_path):
    for rank in (0, 2):
        take_steps(profiler(rank, steps="2:3", ranks="0,2"), range(1, 4))
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["step-2-rank-0.json.gz", "step-2-rank-2.json.gz"]


def test_a_run_that_resumes_in_between_profiles_the_rest(profiler, tmp_path):
    made = profiler(steps="3:6")
    made.announce(4)
    take_steps(made, range(5, 8))
    assert [path.name for path in (tmp_path / "profile").iterdir()] == ["step-5-rank-0.json.gz"]
    assert made.lines[0] == f"the profiler will trace steps 5 to 5 of rank 0 into {tmp_path / 'profile'}"
    assert made.lines[1].startswith("profile of step 5: ")
    later = profiler(steps="3:6")
    later.announce(5)
    take_steps(later, range(6, 9))
    assert later.lines == ["profile.steps 3:6 is over: the run continues from step 5"]


def test_a_run_that_stops_in_between_writes_what_there_is(profiler, tmp_path):
    made = profiler(steps="3:20")
    take_steps(made, range(1, 5))
    assert made.lines[0].startswith("profile of steps 3 to 4: ")
    assert len(list((tmp_path / "profile").iterdir())) == 1


@pytest.mark.parametrize("fail_in", [2, 3, 4])
def test_an_error_is_passed_on_and_leaves_the_next_profiler_working(profiler, tmp_path, fail_in):
    """In step 2 the profiler is set up, in step 3 it records, before step 4 a step is complete."""
    with pytest.raises(FloatingPointError):
        take_steps(profiler(steps="3:6"), range(1, 8), fail_in)
    assert list(tmp_path.iterdir()) == []
    assert not torch.autograd._profiler_enabled()
    take_steps(profiler(steps="1:2"), range(1, 3))
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_a_trace_that_cannot_be_written_does_not_end_the_run(profiler, tmp_path, caplog):
    (tmp_path / "profile").write_text("in the way")
    take_steps(profiler(steps="2:3"), range(1, 5))
    assert "rank 0: the profile could not be written into" in caplog.text


def test_shapes_and_memory(profiler, tmp_path):
    made = profiler(steps="2:3", shapes=True, memory=True)
    take_steps(made, range(1, 4))
    found = events(next((tmp_path / "profile").iterdir()))
    products = [event["args"] for event in found if event["name"] == "aten::mm" and event["ph"] == "X"]
    assert all(args["Input Dims"][:2] == [[8, 8], [8, 8]] for args in products)
    assert any(event["name"] == "[memory]" and event["args"]["Bytes"] == 8 * 8 * 4 for event in found)
    assert "net MiB" in made.lines[1]


def test_a_rank_that_does_not_exist(profiler):
    with pytest.raises(ValueError, match="profile.ranks is '0,4'; this run has 4 rank"):
        profiler(steps="1:2", ranks="0,4")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA's memory history, and of a profiler that does nothing."""
    made: list[str] = []

    def record(enabled: str | None = "all", **_: object) -> None:
        made.append("on" if enabled else "off")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: made.append(Path(path).name))
    nothing = SimpleNamespace(prepare_trace=lambda: None, start_trace=lambda: None, stop_trace=lambda: None, key_averages=list)
    nothing.export_chrome_trace = lambda path: Path(path).touch()
    monkeypatch.setattr("poet_megatron.profiling.profiler.profile", lambda **_: nothing)
    return made


def test_memory_snapshot_on_a_gpu(profiler, calls):
    take_steps(profiler(device=torch.device("cuda"), steps="3:5", memory=True), range(1, 7))
    assert calls == ["on", "step-3-rank-0-memory.pickle", "off"]
    calls.clear()
    take_steps(profiler(device=torch.device("cuda"), steps="3:5"), range(1, 7))
    assert calls == []


def test_memory_snapshot_when_a_gpu_runs_out_of_memory(profiler, calls):
    made = profiler(device=torch.device("cuda"), steps="1:5", memory=True)
    with pytest.raises(torch.OutOfMemoryError), made:
        made.step_begin(1)
        raise torch.OutOfMemoryError
    assert calls == ["on", "step-1-rank-0-memory.pickle", "off"]


def average(key: str, **values: object) -> SimpleNamespace:
    nothing = {"is_user_annotation": False, "count": 1, "cpu_time_total": 0.0, "self_cpu_time_total": 0.0, "self_device_time_total": 0.0}
    return SimpleNamespace(key=key, **{**nothing, "self_cpu_memory_usage": 0, **values})


def test_table_on_a_gpu_ranks_by_its_time():
    averages = [
        average("update", is_user_annotation=True, cpu_time_total=4000.0, self_device_time_total=9e9),
        average("merge 10", is_user_annotation=True, cpu_time_total=1000.0),
        average("merge 20", is_user_annotation=True, cpu_time_total=5000.0),
        average("aten::small", count=6, self_device_time_total=1000.0, self_cpu_time_total=9e9),
        average("k" * 100, count=2, self_device_time_total=3000.0),
    ]
    lines = [line.split() for line in operator_table(averages, 2, on_gpu=True).splitlines()]
    assert lines[1:3] == [["merge", "N", "3.000"], ["update", "2.000"]]
    assert lines[5:] == [["k" * 45 + "...", "1", "1.500", "75.0%"], ["aten::small", "3", "0.500", "25.0%"]]
