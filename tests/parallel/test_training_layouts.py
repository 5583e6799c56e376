"""What training in a parallel layout needs besides equal losses: initial weights, counts, recomputation, the user's command, faults."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases_training import BUILT, COMPUTE, INITS, METHODS, RECOMPUTE_LAYOUTS
from conftest import TINY, train_losses

from poet_megatron.cli.main import main as poet_megatron

ROOT = Path(__file__).parents[2]
LAYOUTS = [layout.name for layout in BUILT]


def environment() -> dict[str, str]:
    """One thread per rank, and no warnings of importing megatron-core, which the command silences and our scripts do not."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore:Transformer Engine and Apex"}


# -- inside the engine (cases_training.py) --


@functools.cache
def cases() -> dict[str, dict]:
    """Results of cases_training.py; run once."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.jsonl"
        command = [sys.executable, str(Path(__file__).with_name("cases_training.py")), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
        results = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
        return {"stderr": {"text": done.stderr}, **{result.pop("case"): result for result in results}}


def case(name: str) -> dict:
    assert name in cases(), cases()["stderr"]["text"][-3000:]
    return cases()[name]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_initial_weights_are_the_same_bits_in_every_layout(layout: str, method: str):
    """By every scheme, for POET (whose W0 is stored permuted) and for dense layers."""
    found, expected = case(f"built|{layout}|{method}")["hashes"], case("built|1 rank|adamw")["hashes"]
    assert set(found) == set(INITS)
    assert len({hashes["layers.0.q"] for hashes in found.values()}) == len(INITS)
    assert found == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_flops_add_up_to_those_of_one_rank(layout: str, method: str):
    found, expected = case(f"built|{layout}|{method}"), case(f"built|1 rank|{method}")
    assert (found["total"], found["trainable"]) == (expected["total"], expected["trainable"])
    assert found["flops"] == pytest.approx(expected["flops"], rel=1e-12)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("layout", RECOMPUTE_LAYOUTS)
def test_recomputation_changes_no_bit(layout: str, compute: str, mode: str):
    """Losses, norms and gradients of three steps of two micro-batches; increments are computed once per step in every mode."""
    found, plain = (case(f"recompute|{layout}|{compute}|{which}") for which in (mode, "none"))
    assert found["increments"] == plain["increments"] == [plain["runs"]] * 3
    assert found["losses"] == plain["losses"]
    assert found["grad_norms"] == plain["grad_norms"]
    assert found["gradients"] == plain["gradients"]


# -- the user's command --

SETTINGS = {**TINY, "model.num_layers": "4", "poet.block_size": "16", "poet.shard_groups": "2", "train.steps": "12"}
LAUNCHED = {
    "TP2 + SP": {"parallel.tensor_parallel": "2", "parallel.sequence_parallel": "true"},
    "PP2 interleaved": {"parallel.pipeline_parallel": "2", "parallel.virtual_stages": "2"},
}
FAULTS = {
    "gradient on a pipeline stage": {"parallel.pipeline_parallel": "2"},
    "gradient under tensor parallelism": {"parallel.tensor_parallel": "2"},
    "loss on a replica": {},
    "data on a pipeline stage": {"parallel.pipeline_parallel": "2"},
    "data on a replica": {},
}


def argv(run_dir: Path, data: Path, changes: dict[str, str]) -> list[str]:
    settings = {**SETTINGS, "data.path": str(data), "train.run_dir": str(run_dir), **changes}
    return [f"--{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def launches(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every run on one and two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("launches")
    requests = [{"name": "one", "ranks": 1, "fault": None, "rank": 0, "argv": argv(folder / "runs" / "one", tiny_data, {})}]
    for name, changes in LAUNCHED.items():
        requests.append({"name": name, "ranks": 2, "fault": None, "rank": 0, "argv": argv(folder / "runs" / name, tiny_data, changes)})
    for name, changes in FAULTS.items():
        fault = name.split()[0]
        requests.append({"name": name, "ranks": 2, "fault": fault, "rank": 1, "argv": argv(folder / "runs" / name, tiny_data, changes)})
    (folder / "requests.json").write_text(json.dumps(requests))
    script = Path(__file__).with_name("cases_pretrain.py")
    command = [sys.executable, str(script), str(folder / "requests.json"), str(folder / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1200)
    assert (folder / "results.json").exists(), done.stderr[-3000:]
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


def validation(run_dir: Path) -> dict[str, float]:
    """Every number of every evaluation, {"<step> <name>": value}."""
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {f"{entry['step']} {name}": value for entry in entries for name, value in entry.items() if name.startswith("eval/")}


def shown_count(output: str) -> str:
    """The line on parameters, without the number of ranks and the folder."""
    (line,) = re.findall(r"^poet: (.* trainable);", output, re.MULTILINE)
    return line


@pytest.mark.parametrize("layout", LAUNCHED)
def test_pretrain_in_a_layout(launches, layout: str):
    """Evaluation before the first step and after the last one, a merge after 10 steps; only rank 0 speaks."""
    found, one, runs = launches[layout], launches["one"], launches["folder"] / "runs"
    assert found["statuses"] == [0, 0], found["stderr"]
    assert found["stdout"][1] == found["stderr"][1] == found["stderr"][0] == ""
    assert shown_count(found["stdout"][0]) == shown_count(one["stdout"][0])
    assert train_losses(runs / layout) == pytest.approx(train_losses(runs / "one"), rel=1e-5)
    assert validation(runs / layout) == pytest.approx(validation(runs / "one"), rel=1e-5)
    assert {"0 eval/loss", "12 eval/loss", "12 eval/ppl_reference_protocol"} <= set(validation(runs / layout))


@pytest.mark.parametrize("name", [name for name in FAULTS if not name.startswith("data")])
def test_what_is_not_finite_on_one_rank_stops_all_with_the_same_message(launches, name: str):
    found = launches[name]
    assert found["statuses"] == [3, 3], found["stderr"]
    messages = {text.strip().splitlines()[-1] for text in found["stderr"]}
    assert len(messages) == 1
    (message,) = messages
    assert message.startswith("error: not finite: ")
    assert ("rank 1: gradients of 0." in message) == name.startswith("gradient")
    assert ("loss = nan" in message) == name.startswith("loss")
    assert set(train_losses(launches["folder"] / "runs" / name)) == {1, 2}


@pytest.mark.parametrize("name", [name for name in FAULTS if name.startswith("data")])
def test_an_error_on_one_rank_ends_the_others_soon(launches, name: str):
    """The others find its connections closed; none is killed, none waits for a timeout."""
    found = launches[name]
    assert found["statuses"][1] == 1 and "the disk is gone" in found["stderr"][1]
    assert found["statuses"][0] == 1, found["stderr"][0]
    assert found["seconds"] < 120


def test_torchrun(launches, tiny_data: Path):
    """Four ranks, two tensor-parallel in each of two stages, as a user starts them."""
    folder = launches["folder"]
    changes = {"parallel.tensor_parallel": "2", "parallel.pipeline_parallel": "2"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "poet_megatron", "pretrain"]
    done = subprocess.run(
        [*command, *argv(folder / "runs" / "four", tiny_data, changes)], capture_output=True, text=True, env=environment(), timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert shown_count(done.stdout) == shown_count(launches["one"]["stdout"][0])
    assert len(re.findall(r"^step +\d+/12 \|", done.stdout, re.MULTILINE)) == 12
    assert train_losses(folder / "runs" / "four") == pytest.approx(train_losses(folder / "runs" / "one"), rel=1e-5)
    assert validation(folder / "runs" / "four") == pytest.approx(validation(folder / "runs" / "one"), rel=1e-5)


# -- layouts that cannot be --

IMPOSSIBLE = [
    (3, {"parallel.tensor_parallel": "2"}, "3 processes cannot be split into groups of .* 2 x 1 = 2"),
    (4, {"parallel.tensor_parallel": "4"}, r"parallel.tensor_parallel is 4, which does not divide model.num_query_groups"),
    (2, {"parallel.tensor_parallel": "2", "poet.shard_groups": "1"}, "does not divide poet.shard_groups = 1"),
    (3, {"parallel.pipeline_parallel": "3"}, "model.num_layers is 4, not a multiple of"),
    (4, {"train.global_batch_size": "4"}, r"train.global_batch_size is 4; it must be a multiple of .* 2 x 4 = 8"),
    (2, {"parallel.pipeline_parallel": "2", "parallel.virtual_stages": "2", "train.global_batch_size": "6"}, "there are 3 micro-batches"),
    (2, {"engine": "deepspeed", "parallel.tensor_parallel": "2"}, "it is data-parallel only"),
    (1, {"parallel.virtual_stages": "2"}, "interleaving needs at least 2 stages"),
    (1, {"parallel.sequence_parallel": "true"}, "parallel.sequence_parallel is true with parallel.tensor_parallel 1"),
]


@pytest.mark.parametrize("mode", ["pretrain", "dry run", "estimate"])
@pytest.mark.parametrize(("ranks", "changes", "message"), IMPOSSIBLE)
def test_an_impossible_layout_is_refused_before_ranks_wait_for_each_other(
    ranks: int, changes: dict[str, str], message: str, mode: str, tiny_data: Path, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", "0")
    words = {"pretrain": ["pretrain"], "dry run": ["pretrain", "--dry-run"], "estimate": ["estimate"]}[mode]
    assert poet_megatron([*words, *argv(tmp_path / "run", tiny_data, changes)]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
