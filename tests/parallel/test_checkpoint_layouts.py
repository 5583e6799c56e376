"""A checkpoint saved in one parallel layout, by one optimizer, is continued in another; cases_checkpoints.py has the cases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from cases_checkpoints import BATCH, LAST, LOADS, PROCESSES, SAVED, Case, copies, missing, run_dir, settings
from conftest import train_losses
from transformers import AutoModelForCausalLM

from poet_megatron.config.load import load_config
from poet_megatron.errors import UserError
from poet_megatron.train.convert_run import convert_run
from poet_megatron.train.evaluate_run import evaluate_run
from poet_megatron.train.export_run import export_run
from poet_megatron.train.restore import open_run
from poet_megatron.train.run import pretrain

ROOT = Path(__file__).parents[2]
STEP = f"step-{SAVED:08d}"
# fp32 layouts add the same numbers in another order: 2^-24 each time, and no sum here amplifies it (see optim.eps of the cases).
# bf16 layouts round partial results in other places, 2^-9 each time; over 16 steps that moved these losses by up to 2e-3.
TOLERANCE = {"fp32": 2e-6, "bf16": 5e-3}


@pytest.fixture(scope="module")
def folder(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case has been run below this folder."""
    folder = tmp_path_factory.mktemp("layouts")
    script = Path(__file__).with_name("cases_checkpoints.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([*command, str(folder), str(tiny_data)], capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    (folder / "stderr").write_text(done.stderr)
    return folder


def check_ran(folder: Path, case: Case) -> None:
    """Skip a case that cannot run here; fail with its traceback if a rank raised."""
    if reason := missing(case):
        pytest.skip(reason)
    results = [json.loads((folder / f"results-{rank}.json").read_text()) for rank in range(PROCESSES)]
    errors = [result[case.name]["error"] for result in results if case.name in result]
    assert len(errors) == case.layout.ranks
    assert not any(errors), "\n".join(error for error in errors if error)


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole: weights, skews, masters, moments."""
    reader = torch_checkpoint.FileSystemReader(checkpoint)
    entries = reader.read_metadata().state_dict_metadata
    whole = {name: torch.full(entry.size, torch.nan, dtype=entry.properties.dtype) for name, entry in entries.items()}
    torch_checkpoint.load(whole, storage_reader=reader, no_dist=True)
    return whole


def plain(checkpoint: Path) -> dict:
    """Adam's steps, schedule, counters, position in the data."""
    common = torch.load(checkpoint / "common.pt", weights_only=True)["common"]
    return {name: value for name, value in common.items() if name != "layout"}


def precision(case: Case) -> str:
    return "bf16" if case.variant == "bf16" else "fp32"


@pytest.mark.parametrize("case", LOADS, ids=lambda case: case.name)
def test_the_next_ten_losses_are_those_of_an_uninterrupted_run(folder: Path, case: Case):
    """On one rank throughout; with merges before and after the checkpoint (adamw: none)."""
    check_ran(folder, Case(case.variant, case.source))
    check_ran(folder, case)
    expected = {step: loss for step, loss in train_losses(run_dir(folder, Case(case.variant, "1"))).items() if step > SAVED}
    assert len(expected) == LAST - SAVED == 10
    assert train_losses(run_dir(folder, case)) == pytest.approx(expected, rel=TOLERANCE[precision(case)])


@pytest.mark.parametrize("case", LOADS, ids=lambda case: case.name)
def test_everything_is_loaded_bit_for_bit(folder: Path, case: Case):
    """Saved again by the ranks that loaded it, a checkpoint has the same whole tensors, Adam steps and counters."""
    check_ran(folder, case)
    source = run_dir(folder, Case(case.variant, case.source)) / "checkpoints" / STEP
    before, after = tensors(source), tensors(copies(folder, case) / STEP)
    kinds = {name.split(".")[1] for name in before if name.startswith("optimizer.")}
    assert kinds == {"exp_avg", "exp_avg_sq"} | ({"master"} if precision(case) == "bf16" else set())
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert plain(source) == plain(copies(folder, case) / STEP)


def test_masters_of_frozen_weights_are_saved_in_fp32_from_the_ranks_that_have_them(folder: Path):
    """bf16: W0 is not rounded; skews, embedding and the like are saved in bf16 beside their masters, which round to them."""
    case = Case("bf16", "tp2-dp2-sharded")
    check_ran(folder, case)
    saved = tensors(run_dir(folder, case) / "checkpoints" / STEP)
    dtypes = {name: tensor.dtype for name, tensor in saved.items()}
    w0 = [name for name in dtypes if ".matrices." in name and name.endswith(".weight")]
    assert len(w0) == 7
    assert {dtypes[name] for name in w0} == {torch.float32}
    assert {dtypes[name] for name in dtypes if not name.startswith("optimizer.") and name not in w0} == {torch.bfloat16}
    assert {dtypes[name] for name in dtypes if name.startswith("optimizer.")} == {torch.float32}
    masters = {name.removeprefix("optimizer.master."): master for name, master in saved.items() if "master" in name}
    assert len(masters) == len([name for name in dtypes if name not in w0]) // 4  # and two moments
    assert [name for name, master in masters.items() if not torch.equal(master.bfloat16(), saved[name])] == []


@pytest.mark.parametrize("source", ["tp2-sp-dp2", "dp2-sharded"])
def test_replicas_share_the_writing(folder: Path, source: str):
    """Data-parallel ranks hold the same tensors; no rank writes more than its share and the largest tensor."""
    case = Case("fp32", source)
    checkpoint = run_dir(folder, case) / "checkpoints" / STEP
    written = [sum(path.stat().st_size for path in checkpoint.glob(f"__{rank}_*.distcp")) for rank in range(case.layout.ranks)]
    assert max(written) < 1.4 * sum(written) / len(written)


def test_no_warnings_but_of_changed_settings(folder: Path):
    """A rank that did not exist when the checkpoint was written is no reason for one, and only rank 0 of a case warns."""
    lines = [line for line in (folder / "stderr").read_text().splitlines() if "parallel" in line or "random" in line or "rng" in line]
    unexpected = [line for line in lines if "resuming with changed settings" not in line]
    assert unexpected == []


def changed(folder: Path, tmp_path: Path, tiny_data: Path, case: Case, changes: dict[str, object], source: str = "tp2-sp-dp2"):
    """Settings of `case` in a run directory with the checkpoint of `source`, changed."""
    own = tmp_path / "run"
    shutil.copytree(run_dir(folder, Case(case.variant, source)) / "checkpoints", own / "checkpoints", dirs_exist_ok=True)
    more = {"train.run_dir": own, **changes}
    return load_config(None, [*settings(folder, tiny_data, case), *(f"--{key}={value}" for key, value in more.items())])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.num_layers": 3}, r"model\.num_layers: 2 -> 3.*another train\.run_dir"),
        ({"poet.shard_groups": 2}, r"poet\.shard_groups: 4 -> 2.*[Uu]ndo the change"),
        ({"poet.share_input_rotation": True}, r"poet\.share_input_rotation: false -> true"),
        ({"train.global_batch_size": 2 * BATCH}, r"train\.global_batch_size: 8 -> 16"),
        ({"train.precision": "bf16"}, r"train\.precision: 'fp32' -> 'bf16'"),
        ({"method": "adamw"}, r"method: 'poet' -> 'adamw'"),
        ({"parallel.tensor_parallel": 2}, "1 processes cannot be split into groups of .* = 2: launch"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_continued_is_named(folder: Path, tmp_path: Path, tiny_data: Path, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        pretrain(changed(folder, tmp_path, tiny_data, Case("fp32", "1"), changes))


def test_a_tensor_parallel_size_that_does_not_divide_the_shard_groups_is_refused(
    folder: Path, tmp_path: Path, tiny_data: Path, monkeypatch
):
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(UserError, match=r"parallel\.tensor_parallel is 8, which does not divide .*"):
        pretrain(changed(folder, tmp_path, tiny_data, Case("fp32", "1"), {"parallel.tensor_parallel": 8}))


def test_shard_groups_that_are_left_open_are_those_of_the_checkpoint(folder: Path, tmp_path: Path, tiny_data: Path):
    """The default, 0, means the tensor-parallel size of the first start: here 4 groups go on, on one rank."""
    run = changed(folder, tmp_path, tiny_data, Case("fp32", "1"), {"poet.shard_groups": 0, "train.stop_at_step": SAVED + 1})
    assert pretrain(run) == 0
    assert load_config(tmp_path / "run" / "config.yaml").poet.shard_groups == 4


SOURCES = ["tp2-sp-dp2", "pp2-interleaved", "deepspeed-dp2", "dp2-sharded"]


@pytest.mark.parametrize("source", SOURCES)
def test_evaluate_in_one_process(folder: Path, tmp_path: Path, source: str):
    """The loss of the uninterrupted run's checkpoint of the same step (the reference protocol depends on the micro-batch)."""
    case = Case("deep" if source == "pp2-interleaved" else "fp32", source)
    check_ran(folder, case)
    ours, expected = (evaluate_run(run_dir(folder, c), SAVED, None, 512) for c in (case, Case(case.variant, "1")))
    assert ours["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE["fp32"])
    assert (ours["step"], ours["tokens"]) == (SAVED, 512)


@pytest.mark.parametrize("source", SOURCES)
def test_export_in_one_process(folder: Path, tmp_path: Path, source: str):
    """Logits through transformers are those of the uninterrupted run's model, between two merges; they are of order 1."""
    case = Case("deep" if source == "pp2-interleaved" else "fp32", source)
    check_ran(folder, case)
    tokens = torch.randint(4, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    with open_run(run_dir(folder, Case(case.variant, "1")), SAVED) as (engine, _), torch.no_grad():
        ours = engine.chunks[0](tokens, torch.arange(32).expand(2, -1), None)[..., :320]
    exported = export_run(run_dir(folder, case), tmp_path / "exported", SAVED, "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(tokens).logits
    assert (ours - theirs).abs().max() < 2e-5


@pytest.mark.parametrize("source", SOURCES)
def test_convert_and_continue_on_one_rank(folder: Path, tmp_path: Path, source: str):
    case = Case("deep" if source == "pp2-interleaved" else "fp32", source)
    check_ran(folder, case)
    said: list[str] = []
    directory = convert_run(run_dir(folder, case), tmp_path / "one", None, said.append)
    assert f"step {SAVED}" in said[-1]
    assert f"{case.layout.ranks} rank(s)" in said[-1]
    assert list(directory.checkpoints_path.glob(f"{STEP}/rng-*")) == [directory.checkpoints_path / STEP / "rng-0.pt"]
    source_checkpoint = run_dir(folder, case) / "checkpoints" / STEP
    before, after = tensors(source_checkpoint), tensors(directory.checkpoints_path / STEP)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    run = load_config(directory.config_path, [f"--train.stop_at_step={LAST}"])
    assert run.engine == "megatron"
    assert (run.parallel.tensor_parallel, run.parallel.pipeline_parallel, run.parallel.virtual_stages) == (1, 1, 1)
    assert pretrain(run) == 0
    expected = train_losses(run_dir(folder, Case(case.variant, "1")))
    assert train_losses(directory.path) == pytest.approx(expected, rel=TOLERANCE["fp32"])  # steps 1..6 came along


def test_convert_leaves_what_is_there_alone(folder: Path, tmp_path: Path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    run = run_dir(folder, Case("fp32", "1"))
    with pytest.raises(UserError, match="taken exists; choose an --output that does not"):
        convert_run(run, tmp_path / "taken", None, print)
    with pytest.raises(UserError, match="file/new cannot be written: Not a directory; choose another --output"):
        convert_run(run, tmp_path / "taken" / "file" / "new", None, print)
    with pytest.raises(UserError, match=r"no checkpoint of step 7 .* it has \[6, 12, 16\]"):
        convert_run(run, tmp_path / "new", 7, print)
    assert not (tmp_path / "new").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_convert_runs_in_one_process(folder: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="runs in one process and was started in 2: start it without torchrun"):
        convert_run(run_dir(folder, Case("fp32", "1")), tmp_path / "new", None, print)
