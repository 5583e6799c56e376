"""Points of a sweep, the jobs of a request, and the folders that keep them."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from poet_megatron.errors import UserError
from poet_megatron.launch.check import parse_nodes
from poet_megatron.launch.jobs import Job, Request, Text, log_path, plan_jobs, shell_line
from poet_megatron.launch.record import earlier_jobs, next_folder, write_jobs, write_snapshot
from poet_megatron.launch.sweep import Point, parse_sweep, points_text

ROOT = Path(__file__).parents[3]
REQUEST = Request(
    root=Path("/clone"),
    run_dir=Path("/runs/a b"),
    folder=Path("/runs/a b/launch/1"),
    nodes=(2, 2),
    gpus_per_node=8,
    time="1-0",
    data_time="2:00:00",
    options=("--account=me",),
    gpu_options=("--partition=gpu",),
    cpu_options=("--partition=cpu",),
)
TEXT = Text(inputs=("/text/*.gz",), valid_inputs=(), tokenizer="", vocab_size=320, tasks=4, valid_fraction=None, output=Path("/data/c4"))


def test_a_sweep_is_every_combination():
    points = parse_sweep(["optim.poet_lr=1e-3,2e-3", "poet.block_size=32,64"])
    assert points[1] == Point("poet_lr-1e-3_block_size-64", ("--optim.poet_lr=1e-3", "--poet.block_size=64"))
    assert [point.name for point in points] == [f"poet_lr-{lr}_block_size-{size}" for lr in ("1e-3", "2e-3") for size in (32, 64)]
    assert points_text(points).splitlines()[3] == "poet_lr-2e-3_block_size-64 --optim.poet_lr=2e-3 --poet.block_size=64"
    assert parse_sweep([]) == []


def test_names_of_points_are_folders_and_unambiguous():
    (point,) = parse_sweep(["optim.lr=1e-3", "other.lr=../2"])
    assert point.name == "optim.lr-1e-3_other.lr-..-2"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.lr"], "--sweep 'optim.lr' is not key=value,value"),
        (["optim.lr="], "--sweep 'optim.lr=' is not key=value,value"),
        (["optim.lr=1,,2"], "is not key=value,value"),
        (["optim.lr=1", "optim.lr=2"], "--sweep has optim.lr twice: give all of its values at once, as optim.lr=1,2"),
        (["optim.lr=1,2,1"], "--sweep optim.lr has the value 1 twice"),
        (["data.blend=1 a"], "has a value with a space; put it into the recipe"),
        (["train.run_dir=a,b"], "every point has a folder of its own already"),
    ],
)
def test_other_sweeps_are_refused(words: list[str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_sweep(words)


@pytest.mark.parametrize("text", ["0", "", "x", "3-2", "0-2", "1-", "-1"])
def test_numbers_of_nodes(text: str):
    with pytest.raises(UserError, match=f"--nodes is {text}; give a number of at least 1, or MIN-MAX"):
        parse_nodes(text)
    assert parse_nodes("4") == (4, 4) and parse_nodes("2-4") == (2, 4)


def test_one_run():
    (job,) = plan_jobs(REQUEST)
    assert job.words({}) == [
        "--job-name=pretrain-a b",
        "--chdir=/clone",
        "--output=/runs/a b/launch/1/pretrain-%j.log",
        "--time=1-0",
        "--account=me",
        "--partition=gpu",
        "--nodes=2",
        "--gpus-per-node=8",
        "launch/slurm/pretrain.sbatch",
        "--config",
        "/runs/a b/launch/1/recipe.yaml",
    ]
    (job,) = plan_jobs(dataclasses.replace(REQUEST, nodes=(1, 4)))
    assert "--nodes=1-4" in job.options and job.arguments[:2] == ("--min-nodes", "1")


def test_a_chain_waits_job_by_job():
    jobs = plan_jobs(dataclasses.replace(REQUEST, text=TEXT, export=True))
    assert [(job.name, job.after, job.condition) for job in jobs] == [
        ("tokenizer", (), "afterok"),
        ("tokenize", ("tokenizer",), "afterok"),
        ("merge", ("tokenize",), "afterok"),
        ("pretrain", ("merge",), "afterok"),
        ("export", ("pretrain",), "afterok"),
    ]
    tokenizer, tokenize, merge, pretrain, export = jobs
    trained = "/data/c4.work/tokenizer.model"
    assert tokenizer.arguments == ("--input", "/text/*.gz", "--vocab-size", "320", "--output", trained)
    assert tokenize.arguments == ("--input", "/text/*.gz", "--tokenizer", trained, "--output", "/data/c4.work/parts")
    assert "--array=0-3" in tokenize.options and "--partition=cpu" in tokenize.options and "--time=2:00:00" in tokenize.options
    assert merge.arguments == ("--parts", "/data/c4.work/parts", "--output", "/data/c4", "--tokenizer", trained, "--force")
    assert pretrain.words({"merge": 12})[:2] == ["--dependency=afterok:12", "--kill-on-invalid-dep=yes"]
    assert export.arguments == ("/runs/a b",) and "--partition=gpu" in export.options


def test_validation_files_are_tokenized_apart():
    text = dataclasses.replace(TEXT, tokenizer="/t.model", valid_inputs=("/valid.gz",), valid_tasks=2)
    tokenize, valid, merge, _ = plan_jobs(dataclasses.replace(REQUEST, text=text))
    assert (valid.script, valid.after, merge.after) == ("launch/slurm/tokenize.sbatch", (), ("tokenize", "tokenize-valid"))
    assert "--array=0-1" in valid.options and merge.words({"tokenize": 1, "tokenize-valid": 2})[0] == "--dependency=afterok:1:2"
    assert tokenize.arguments[-2:] == ("--valid-fraction", "0") and valid.arguments[-2:] == ("--valid-fraction", "1")
    assert valid.arguments[1] == "/valid.gz" and merge.arguments[:3] == ("--parts", "/data/c4.work/parts", "/data/c4.work/parts-valid")
    assert "afterok:${tokenize}:${tokenize_valid} " in shell_line(merge) and shell_line(valid).startswith(
        "tokenize_valid=$(sbatch --parsable "
    )


def test_a_sweep_is_an_array_and_a_summary_that_comes_in_any_case():
    points = tuple(parse_sweep(["optim.lr=1,2"]))
    sweep, summary = plan_jobs(dataclasses.replace(REQUEST, points=points))
    assert "--array=0-1" in sweep.options
    assert sweep.arguments == ("/runs/a b/launch/1/points.txt", "/runs/a b", "--config", "/runs/a b/launch/1/recipe.yaml")
    assert summary.words({"sweep": 5})[0] == "--dependency=afterany:5"
    assert summary.arguments == ("/runs/a b", "--output", "/runs/a b/summary")
    assert str(log_path(sweep, REQUEST, 5)) == "/runs/a b/launch/1/sweep-5_*.log"


def test_every_script_of_a_job_exists():
    text = dataclasses.replace(TEXT, valid_inputs=("/valid.gz",))
    jobs = [
        *plan_jobs(dataclasses.replace(REQUEST, text=text, export=True)),
        *plan_jobs(dataclasses.replace(REQUEST, points=(Point("a", ()),))),
    ]
    assert all((ROOT / job.script).is_file() for job in jobs) and len({job.script for job in jobs}) == 7


def test_lines_for_the_shell_are_quoted():
    line = shell_line(Job("export", ("--output=/a b/%j",), ("it's",), after=("pretrain",)))
    assert line == (
        "export=$(sbatch --parsable --dependency=afterok:${pretrain} --kill-on-invalid-dep=yes '--output=/a b/%j' "
        "launch/slurm/export.sbatch 'it'\"'\"'s')"
    )


def test_every_submission_has_a_folder_of_its_own(tmp_path: Path):
    assert next_folder(tmp_path / "new") == tmp_path / "new" / "launch" / "1"
    first = next_folder(tmp_path)
    write_snapshot(first, "recipe", "points", ["launch", "--nodes=1"], ROOT)
    write_jobs(first, {"merge": 5, "pretrain": 6})
    (tmp_path / "launch" / "notes").mkdir()
    second = next_folder(tmp_path)
    assert (first.name, second.name) == ("1", "2")
    write_snapshot(second, "recipe 2", "", ["launch"], ROOT)
    assert earlier_jobs(tmp_path) == [5, 6]
    assert (first / "recipe.yaml").read_text() == "recipe" and (first / "points.txt").read_text() == "points"
    assert not (second / "points.txt").exists()
    record = json.loads((first / "launch.json").read_text())
    assert record["command"] == ["launch", "--nodes=1"] and record["jobs"] == {"merge": 5, "pretrain": 6} and "git_revision" in record
    (first / "launch.json").write_text("{")
    assert earlier_jobs(tmp_path) == []


def test_a_run_directory_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory; choose another train.run_dir"):
        write_snapshot(tmp_path / "file" / "launch" / "1", "", "", [], ROOT)
