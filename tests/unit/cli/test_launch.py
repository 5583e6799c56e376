"""`poet-megatron launch` with and without a stand-in for Slurm: what it checks, prints, freezes and submits."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import TINY

from poet_megatron.cli.main import main
from poet_megatron.config.load import load_config

ROOT = Path(__file__).parents[3]
SCONTROL = """\
case $3 in
    partition) echo "PartitionName=batch Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00" ;;
    *) echo "MaxArraySize = 1001" ;;
esac
"""
SINFO = 'for number in 1 2 3 4 5 6 7 8; do echo "n$number idle gpu:8"; done\n'
SBATCH = """\
echo "$SBATCH_ACCOUNT $*" >> "$CALLS"
case $* in *--test-only*) echo "sbatch: Job 1 to start at noon" >&2; exit 0 ;; esac
[ -z "$REFUSE" ] || [[ $* != *$REFUSE* ]] || { echo "sbatch: error: too many jobs" >&2; exit 1; }
grep -vc test-only "$CALLS"
"""
SCANCEL = 'echo "scancel $*" >> "$CALLS"\n'
SQUEUE = "printf '%s' \"$ALIVE\"\n"


@pytest.fixture
def recipe(tmp_path: Path, tiny_data: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    sections: dict[str, list[str]] = {}
    for key, value in {**TINY, "data.path": str(tiny_data), "train.run_dir": str(tmp_path / "run")}.items():
        section, name = key.split(".")
        sections.setdefault(section, []).append(f"  {name}: {value}\n")
    path.write_text("".join(f"{section}:\n{''.join(lines)}" for section, lines in sections.items()))
    return path


@pytest.fixture
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with bash, git and env alone, and a site file."""
    (tmp_path / "bin").mkdir()
    for name in ("bash", "env", "git", "grep"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "site.sh").write_text("export SBATCH_ACCOUNT=project\n")
    for name in [name for name in os.environ if name.startswith(("SLURM_", "SBATCH_", "POET_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("POET_SITE", str(tmp_path / "site.sh"))
    return tmp_path


@pytest.fixture
def slurm(no_slurm: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same with a Slurm of eight nodes; it writes its calls to `calls`."""
    for name, text in {"scontrol": SCONTROL, "sinfo": SINFO, "sbatch": SBATCH, "scancel": SCANCEL, "squeue": SQUEUE}.items():
        (no_slurm / "bin" / name).write_text("#!/bin/bash\n" + text)
        (no_slurm / "bin" / name).chmod(0o755)
    monkeypatch.setenv("CALLS", str(no_slurm / "calls"))
    return no_slurm


def launch(recipe: Path, *words: str) -> int:
    return main(["launch", "--recipe", str(recipe), "--nodes=2", "--time=1:00:00", "--gpus-per-node=1", *words])


def submissions(folder: Path) -> list[str]:
    """Calls of sbatch that submit, and of scancel."""
    return [line for line in (folder / "calls").read_text().splitlines() if "--test-only" not in line]


def test_a_dry_run_needs_no_slurm_and_changes_nothing(recipe: Path, no_slurm: Path, tiny_data: Path, capsys):
    before = sorted(no_slurm.rglob("*"))
    assert launch(recipe, "--dry-run", "--partition=big", "--sbatch-option=--nice=5") == 0
    said = capsys.readouterr().out
    assert said.startswith("ok      layout    2 GPUs = 1 x 1 x 2 (tensor x pipeline x data parallel)")
    assert f"ok      data      {tiny_data}: " in said and f"ok      run       {no_slurm}/run: starts from the beginning\n" in said
    assert "sbatch is not here, so the cluster was not asked" in said
    assert f"export POET_SITE={no_slurm}/site.sh && . $POET_SITE && cd {ROOT}\n" in said
    folder = no_slurm / "run" / "launch" / "1"
    assert said.splitlines()[-1] == (
        f"pretrain=$(sbatch --parsable --job-name=pretrain-run --chdir={ROOT} --output={folder}/pretrain-%j.log --time=1:00:00 --nice=5 "
        f"--partition=big --nodes=2 --gpus-per-node=1 launch/slurm/pretrain.sbatch --config {folder}/recipe.yaml)"
    )
    assert sorted(no_slurm.rglob("*")) == before


def test_submitting_needs_slurm(recipe: Path, no_slurm: Path, capsys):
    assert launch(recipe) == 2
    assert capsys.readouterr().err == (
        "error: sbatch is not installed here: run this on a login node of the cluster, or add --dry-run to see what it would do\n"
    )


def test_a_submission_freezes_the_recipe(recipe: Path, slurm: Path, capsys):
    assert launch(recipe, "--train.steps", "7") == 0
    recipe.write_text("{}\n")
    folder = slurm / "run" / "launch" / "1"
    (call,) = submissions(slurm)
    assert call.startswith("project --parsable ") and call.endswith(f"pretrain.sbatch --config {folder}/recipe.yaml")
    frozen = load_config(folder / "recipe.yaml")
    assert (frozen.train.steps, frozen.model.hidden_size, frozen.train.run_dir) == (7, 64, f"{slurm}/run")
    record = json.loads((folder / "launch.json").read_text())
    assert record["jobs"] == {"pretrain": 1} and len(record["git_revision"]) == 40
    said = capsys.readouterr().out
    assert "ok      sbatch    pretrain: Job 1 to start at noon\n" in said
    assert f"  pretrain       job 1; log {folder}/pretrain-1.log\n" in said and "stop      scancel 1 " in said


def test_a_chain_is_submitted_job_by_job(recipe: Path, slurm: Path, corpus: Path):
    words = ("--input", str(corpus), "--vocab-size=320", "--data.path", str(slurm / "data"), "--export")
    assert launch(recipe, *words) == 0
    names = [re.search(r"launch/slurm/(\w+)\.sbatch", call)[1] for call in submissions(slurm)]
    waits = [re.findall(r"--dependency=(\S+)", call) for call in submissions(slurm)]
    assert names == ["tokenizer", "tokenize", "merge", "pretrain", "export"]
    assert waits == [[], *([f"afterok:{number}"] for number in (1, 2, 3, 4))]
    assert "--array=0-0" in submissions(slurm)[1]  # one task per file


def test_jobs_without_gpus_go_where_the_site_says(recipe: Path, slurm: Path, corpus: Path):
    (slurm / "site.sh").write_text("export SBATCH_CONSTRAINT=h100 POET_CPU_PARTITION=small\n")
    assert (
        launch(recipe, "--input", str(corpus), "--vocab-size=320", "--data.path", str(slurm / "data"), "--partition=batch", "--qos=q") == 0
    )
    tokenizer, *_, pretrain = submissions(slurm)
    assert "--qos=q --partition=small --constraint= " in tokenizer
    assert "--qos=q --partition=batch --nodes=2" in pretrain and "--constraint" not in pretrain


def test_all_jobs_are_submitted_or_none(recipe: Path, slurm: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("REFUSE", "pretrain.sbatch")
    words = ("--input", str(corpus), "--vocab-size=320", "--data.path", str(slurm / "data"))
    assert launch(recipe, *words) == 2
    assert capsys.readouterr().err == "error: sbatch refused the job: sbatch: error: too many jobs\n"
    assert submissions(slurm)[-1] == "scancel 1 2 3"


def test_nine_nodes_of_eight_are_refused_before_sbatch_is_called(recipe: Path, slurm: Path, capsys):
    assert main(["launch", "--config", str(recipe), "--nodes=9", "--time=10", "--train.global_batch_size=144"]) == 2
    assert capsys.readouterr().err == (
        "error: nothing was submitted: --nodes is 9; partition batch has 8 nodes with 8 GPUs: ask for at most 8, or name another "
        "partition with --partition\n"
    )
    assert not (slurm / "calls").exists() and not (slurm / "run").exists()


def test_every_refusal_is_listed(recipe: Path, slurm: Path, capsys):
    assert launch(recipe, "--model.vocab_size=321", "--train.global_batch_size=6", "--time=3-0") == 2
    said = capsys.readouterr()
    assert re.findall(r"^(\w+) +(\w+)", said.out, re.MULTILINE) == [
        ("REFUSED", "layout"),
        ("REFUSED", "cluster"),
        ("ok", "queue"),
        ("REFUSED", "data"),
        ("ok", "run"),
    ]
    assert said.err.startswith("error: nothing was submitted: 2 nodes x 1 GPUs: ") and said.err.endswith(" (and 2 more, above)\n")


def test_a_run_that_has_jobs_is_left_alone(recipe: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    assert launch(recipe) == 0
    monkeypatch.setenv("ALIVE", "PENDING\n")
    capsys.readouterr()
    assert launch(recipe) == 2
    assert "has jobs already: 1 (PENDING); wait for them, cancel them (scancel 1), or set another" in capsys.readouterr().err


def checkpoint(recipe: Path, run_dir: Path, *changes: str) -> None:
    """What launch looks at of a checkpoint."""
    from poet_megatron.config.dump import to_yaml

    folder = run_dir / "checkpoints" / "step-00000005"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config(recipe, [*changes, "--poet.shard_groups=1"])))


def test_a_run_of_this_model_continues(recipe: Path, slurm: Path, capsys):
    checkpoint(recipe, slurm / "run", "--optim.lr=1")
    assert launch(recipe) == 0
    assert f"ok      run       {slurm}/run: continues from step 5 of 30\n" in capsys.readouterr().out


def test_a_run_of_another_model_is_left_alone(recipe: Path, slurm: Path, capsys):
    checkpoint(recipe, slurm / "run", "--poet.block_size=16", "--optim.lr=1")
    assert launch(recipe) == 2
    assert "step-00000005 was written by another model and cannot continue with: poet.block_size: 16 -> 24; undo" in capsys.readouterr().err
    assert launch(recipe, "--method=adamw") == 2
    assert "cannot continue with: method: 'poet' -> 'adamw'; undo" in capsys.readouterr().err


def test_a_file_where_the_run_directory_should_be(recipe: Path, slurm: Path, capsys):
    (slurm / "run").touch()
    assert launch(recipe) == 2
    assert f"train.run_dir {slurm}/run cannot be written ({slurm}/run is in the way); choose another" in capsys.readouterr().err
    assert launch(recipe, f"--train.run_dir={slurm}/run/below") == 2
    assert f"run/below cannot be written ({slurm}/run is in the way)" in capsys.readouterr().err


def test_a_sweep_checks_every_point(recipe: Path, slurm: Path, capsys):
    assert launch(recipe, "--sweep", "optim.poet_lr=1e-3,2e-3", "poet.block_size=16,32", "--train.run_dir", str(slurm / "sweep")) == 0
    sweep, summary = submissions(slurm)
    assert "--array=0-3" in sweep and "--dependency=afterany:1" in summary
    points = (slurm / "sweep" / "launch" / "1" / "points.txt").read_text().splitlines()
    assert points[2] == "poet_lr-2e-3_block_size-16 --optim.poet_lr=2e-3 --poet.block_size=16"
    assert launch(recipe, "--sweep", "poet.block_size=16,65") == 2
    assert "error: --sweep, point block_size-65: " in capsys.readouterr().err
    assert launch(recipe, "--sweep", "train.micro_batch_size=1,4") == 2
    assert "nothing was submitted: micro_batch_size-4: 2 nodes x 1 GPUs: train.global_batch_size is 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nodes=0"], "--nodes is 0; give a number of at least 1"),
        (["--gpus-per-node=0"], "--gpus-per-node is 0; it must be at least 1"),
        (["--train.run_dir="], "train.run_dir is empty"),
        (["--sweep", "optim.lr=1,2", "--export"], "--export with --sweep: export the best run afterwards"),
        (["--vocab-size=320"], "--vocab-size is for text: give --input FILES too"),
        (["--data-time=5"], "--data-time is for text: give --input FILES too"),
        (["--input=a.jsonl"], "--input needs one of --tokenizer FILE and --vocab-size N"),
        (["--input=a.jsonl", "--vocab-size=9", "--tokenizer=t"], "--input needs one of --tokenizer FILE and --vocab-size N"),
        (["--input=a", "--vocab-size=9", "--valid-input=b", "--valid-fraction=0.1"], "--valid-input takes its place"),
        (["--input=a", "--vocab-size=9", "--data.path="], "data.path is empty: name the folder that --input becomes"),
        (["--input=none.jsonl", "--vocab-size=9"], "input none.jsonl matches no file"),
        (["--scripts=/nowhere"], "/nowhere has no launch/slurm"),
        (["--noddes=3"], "unknown option --noddes; did you mean --nodes?"),
    ],
)
def test_mistakes(words: list[str], message: str, recipe: Path, slurm: Path, capsys):
    assert launch(recipe, *words) == 2
    assert message in capsys.readouterr().err
    assert not (slurm / "calls").exists()


def test_help_shows_a_chain_and_a_sweep(capsys):
    assert main(["launch", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--sweep optim.poet_lr=1e-3,2e-3" in said and "--valid-input" in said


def test_the_guide_names_files_and_options_that_exist(capsys):
    guide = (ROOT / "docs" / "cluster.md").read_text()
    paths = set(re.findall(r"(?:launch/slurm|configs|tests)/[\w/]+\.\w+|launch/env\.sh", guide))
    assert len(paths) > 10 and [path for path in paths if not (ROOT / path).exists()] == []
    main(["launch", "--help"])
    known = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    commands = re.findall(r"poet-megatron launch (.*?[^\\])\n", guide, re.DOTALL)
    used = {option for command in commands for option in re.findall(r"(?<!\S)--[a-z-]+(?=[= \n]|$)", command)}
    assert len(used) > 9 and used <= known
