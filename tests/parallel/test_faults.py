"""What a run of several ranks does about faults that are planted on one of them (faults.py): each ends as docs/faults.md says.

Every case is `poet-megatron pretrain` on forked ranks over gloo, in one launch of cases_pretrain.py. The ranks believe to be on machines
of their own (SLURMD_NODENAME).
"""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, train_losses
from faults import FAULTY_STEP, SPIKE_STEP
from test_training_layouts import environment

from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.errors import EXIT_DIVERGED, EXIT_HANG, EXIT_NOT_FINITE, EXIT_USER_ERROR
from poet_megatron.monitor.metrics import read_metrics

HANG_SECONDS = 12
SETTINGS = {
    **TINY,
    "poet.block_size": "16",
    "poet.shard_groups": "2",
    "poet.merge_interval": "4",
    "train.steps": "8",
    "train.eval_tokens": "64",
    "checkpoint.interval": "2",
    "parallel.check_replicas_interval": "0",
    "guard.straggler_interval": "0",
}
THREE = {"train.global_batch_size": "6", "parallel.check_replicas_interval": "1"}
PIPELINE = {"parallel.pipeline_parallel": "2"}
SKIP = {"guard.on_nonfinite": "skip"}
SHARDED = {"parallel.distributed_optimizer": "true", "train.precision": "bf16"}
SLOW = {"guard.straggler_interval": "2", "train.stop_at_step": "6", "checkpoint.interval": "0"}
HANG = {"guard.hang_minutes": str(HANG_SECONDS / 60), "checkpoint.interval": "0"}
SPIKE = {"guard.spike_window": "8", "train.steps": "14"}
CASES = {  # name: (fault, its rank, ranks, settings)
    "no fault": (None, 0, 2, {}),
    "hang in data": ("hang in data", 1, 2, HANG),
    "hang of a stage": ("hang in forward", 1, 2, {**HANG, **PIPELINE}),
    "hang of one of four": ("hang in forward", 2, 4, {**HANG, "parallel.tensor_parallel": "2"}),
    "slow forward": ("slow forward", 2, 4, {**SLOW, "parallel.tensor_parallel": "2"}),
    "slow stage": ("slow forward", 1, 2, {**SLOW, **PIPELINE}),
    "slow data": ("slow data", 1, 3, {**SLOW, "train.global_batch_size": "6"}),
    "nobody slow": (None, 0, 2, {**SLOW, "guard.straggler_ratio": "50"}),
    "gradient, skip": ("gradient", 1, 2, SKIP),
    "loss, rollback": ("loss", 1, 2, {"guard.on_nonfinite": "rollback"}),
    "sharded bf16, skip": ("loss", 1, 2, {**SKIP, **SHARDED}),
    "sharded bf16, rollback": ("loss", 1, 2, {"guard.on_nonfinite": "rollback", **SHARDED}),
    "gradient, skip never": ("gradient", 1, 2, {**SKIP, "guard.max_interventions": "0"}),
    "spike, warn": ("spike", 1, 2, SPIKE),
    "spike, stop": ("spike", 1, 2, {**SPIKE, "guard.on_spike": "stop"}),
    "spike, rollback": ("spike", 1, 2, {**SPIKE, "guard.on_spike": "rollback"}),
    "flipped factor": ("flipped factor", 2, 3, THREE),
    "flipped moment": ("flipped moment", 1, 3, THREE),
    "flipped before a checkpoint": ("flipped factor", 0, 2, {"checkpoint.interval": "3", "poet.merge_interval": "5"}),
    "short files": ("short files", 1, 2, {}),
    "no common part": ("no common part", 0, 2, {}),
    "short files to the end": ("short files", 1, 2, {"checkpoint.interval": "6"}),
    "short files, no patience": ("short files", 0, 2, {"checkpoint.max_failures": "2"}),
}


@pytest.fixture(scope="module")
def launches(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Every case, in one launch."""
    folder = tmp_path_factory.mktemp("faults")
    requests = []
    for name, (fault, rank, ranks, changes) in CASES.items():
        settings = {**SETTINGS, "data.path": str(tiny_data), "train.run_dir": str(folder / "runs" / name), **changes}
        argv = [f"--{key}={value}" for key, value in settings.items()]
        requests.append({"name": name, "ranks": ranks, "fault": fault, "rank": rank, "argv": argv, "env": {"SLURMD_NODENAME": "n{rank}"}})
    (folder / "requests.json").write_text(json.dumps(requests))
    script = Path(__file__).with_name("cases_pretrain.py")
    command = [sys.executable, str(script), str(folder / "requests.json"), str(folder / "results.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=1800)
    assert (folder / "results.json").exists(), done.stderr[-3000:]
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


def run_of(launches: dict, name: str) -> Path:
    return launches["folder"] / "runs" / name


def losses_of(launches: dict, name: str) -> dict[int, float | None]:
    return train_losses(run_of(launches, name))


def error_of(found: dict) -> str:
    """The message with which all ranks ended."""
    messages = {text.strip().splitlines()[-1] for text in found["stderr"]}
    assert len(messages) == 1, found["stderr"]
    return messages.pop()


# -- hangs --


@pytest.mark.parametrize(
    ("name", "rank", "place"),
    [("hang in data", 1, "step 3"), ("hang of a stage", 1, "step "), ("hang of one of four", 2, "step ")],
)
def test_a_hang_ends_the_run_and_names_the_rank(launches, name: str, rank: int, place: str):
    """The others wait for it in collectives, or for messages from its stage."""
    found = launches[name]
    assert found["statuses"] == [EXIT_HANG] * len(found["statuses"]), found["stderr"]
    (folder,) = (run_of(launches, name) / "hangs").iterdir()
    verdict = (folder / "verdict.txt").read_text()
    assert re.match(rf"hang: rank {rank} \(n{rank}, pid \d+\) has been in {place}", verdict), verdict
    assert "in sleep_for_ever" in verdict and verdict.count("rank") == 2, verdict  # the second: "stacks of every rank"
    assert [text.count("error: hang:") for text in found["stderr"]] == [1] + [0] * (len(found["statuses"]) - 1)
    assert "sleep_for_ever" in (folder / f"rank-{rank}.stacks.txt").read_text()
    assert "sleep_for_ever" not in (folder / f"rank-{(rank + 1) % 2}.stacks.txt").read_text()
    assert found["seconds"] < 120


def test_the_flight_recorder_shows_the_collective_that_the_rank_did_not_join(launches):
    (folder,) = (run_of(launches, "hang in data") / "hangs").iterdir()
    recorded = [pickle.loads((folder / f"nccl_trace_rank_{rank}").read_bytes()) for rank in (0, 1)]
    entries = [[entry for entry in found["entries"] if entry["profiling_name"].startswith("gloo:")] for found in recorded]
    assert len(entries[0]) > len(entries[1]) > 10
    assert any(frame["name"] == "accumulate" for frame in entries[0][-1]["frames"])


# -- stragglers --


@pytest.mark.parametrize(
    ("name", "rank", "part"), [("slow forward", 2, "forward and backward"), ("slow stage", 1, "forward"), ("slow data", 1, "loading data")]
)
def test_a_slow_rank_is_named(launches, name: str, rank: int, part: str):
    found = launches[name]
    assert not any(found["statuses"]), found["stderr"]
    lines = [line for line in found["stdout"][0].splitlines() if line.startswith("straggler:")]
    assert len(lines) == 2, found["stdout"][0]  # measured in steps 2, 4 and 6; said when it was so twice in a row
    assert all(line.startswith(f"straggler: rank {rank} (n{rank}) took") and f"mostly in {part}" in line for line in lines)


def test_own_times_are_in_the_metrics_and_change_no_loss(launches):
    rows = read_metrics(run_of(launches, "slow data") / "metrics.jsonl")
    measured = {int(row["step"]): row["perf/own_seconds_max"] for row in rows if "perf/own_seconds_max" in row}
    assert set(measured) == {2, 4, 6} and min(measured.values()) > 0.1
    assert "straggler" not in launches["nobody slow"]["stdout"][0]
    assert losses_of(launches, "nobody slow") == {step: loss for step, loss in losses_of(launches, "no fault").items() if step <= 6}


# -- losses and gradients --


def test_a_batch_with_a_gradient_that_is_not_finite_is_skipped(launches):
    found, clean = losses_of(launches, "gradient, skip"), losses_of(launches, "no fault")
    assert launches["gradient, skip"]["statuses"] == [0, 0], launches["gradient, skip"]["stderr"]
    assert f"warning: step {FAULTY_STEP}: not finite: rank 1 (n1): gradients of" in launches["gradient, skip"]["stdout"][0]
    assert {step: found[step] for step in (1, 2)} == {step: clean[step] for step in (1, 2)}
    assert found[FAULTY_STEP] is None and all(found[step] is not None for step in range(4, 9))
    assert found[4] != clean[4]  # the update is missing
    rows = {int(row["step"]): row for row in read_metrics(run_of(launches, "gradient, skip") / "metrics.jsonl") if "train/loss" in row}
    assert "train/skipped" not in rows[2] and rows[8]["train/skipped"] == 1


def test_rollback_takes_the_weights_of_the_last_checkpoint_and_the_next_batches(launches):
    """Of step 2: the update of step 3 is not made, which is all that was after it. So the run goes on as one that skipped step 3."""
    assert "back to the weights of step 2, the batches of steps 3 to 3 are passed over" in launches["loss, rollback"]["stdout"][0]
    assert losses_of(launches, "loss, rollback") == losses_of(launches, "gradient, skip")
    assert losses_of(launches, "sharded bf16, rollback") == losses_of(launches, "sharded bf16, skip")
    assert launches["sharded bf16, rollback"]["statuses"] == [0, 0]


def test_too_many_interventions_stop_the_run(launches):
    found = launches["gradient, skip never"]
    assert found["statuses"] == [EXIT_NOT_FINITE] * 2
    assert "after 0 skips and rollbacks without 64 good steps in between (guard.max_interventions)" in error_of(found)


def test_a_spike_is_said_or_stops_the_run_before_its_update(launches):
    warned, stopped = launches["spike, warn"], launches["spike, stop"]
    assert warned["statuses"] == [0, 0] and stopped["statuses"] == [EXIT_NOT_FINITE] * 2
    assert re.search(rf"warning: step {SPIKE_STEP}: the loss \d\.\d+ is a spike \(median \d\.\d+ of the last 8", warned["stdout"][0])
    assert warned["stdout"][0].count("is a spike") == 1
    assert error_of(stopped).startswith("error: the loss ")
    assert CheckpointStore(run_of(launches, "spike, stop") / "checkpoints").steps() == [8, 10]


def test_a_spike_rolls_back_across_a_merge(launches):
    """From step 12 to the checkpoint of step 10; the merges of step 8 and, later, of 12 count as they did then."""
    found = launches["spike, rollback"]
    assert found["statuses"] == [0, 0], found["stderr"]
    assert "back to the weights of step 10, the batches of steps 11 to 12 are passed over" in found["stdout"][0]
    rows = {int(row["step"]): row for row in read_metrics(run_of(launches, "spike, rollback") / "metrics.jsonl") if "train/loss" in row}
    assert [rows[step]["poet/merge_index"] for step in (8, 9, 11, 13)] == [1, 2, 2, 3]


# -- bits --


@pytest.mark.parametrize(("name", "rank", "what"), [("flipped factor", 2, "rotation_in.skew"), ("flipped moment", 1, "exp_avg_sq of 0.")])
def test_a_flipped_bit_ends_the_run_at_the_next_comparison(launches, name: str, rank: int, what: str):
    found = launches[name]
    assert found["statuses"] == [EXIT_DIVERGED] * 3, found["stderr"]
    others = ", ".join(str(number) for number in range(3) if number != rank)
    message = error_of(found)
    assert message.startswith(f"error: after step {FAULTY_STEP}, ranks that must hold the same bits do not: ")
    assert what in message and f"on rank {rank} (n{rank}) differs from ranks {others}" in message
    assert "Traceback" not in found["stderr"][0]
    assert CheckpointStore(run_of(launches, name) / "checkpoints").steps() == [2]


def test_replicas_that_differ_are_not_saved(launches):
    found = launches["flipped before a checkpoint"]
    assert found["statuses"] == [EXIT_DIVERGED] * 2
    assert "before the checkpoint of step 3, ranks" in error_of(found) and "differs between rank 0 (n0) and rank 1 (n1)" in error_of(found)
    assert CheckpointStore(run_of(launches, "flipped before a checkpoint") / "checkpoints").steps() == []


# -- disks --


@pytest.mark.parametrize(
    ("name", "what"), [("short files", "rank 1 (n1): File too large"), ("no common part", "rank 0 (n0): OSError: the disk is gone")]
)
def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(launches, name: str, what: str):
    """In steps 2 and 4, on one rank; the other does not wait for it, nothing is left over, and the losses are as ever."""
    found = launches[name]
    assert found["statuses"] == [0, 0], found["stderr"]
    for number, step in ((1, 2), (2, 4)):
        expected = (
            f"warning: the checkpoint of step {step} could not be written ({what}); there is none yet. "
            f"Training goes on; failure {number} of checkpoint.max_failures 3"
        )
        assert expected in found["stdout"][0].splitlines(), found["stdout"][0]
    store = CheckpointStore(run_of(launches, name) / "checkpoints")
    assert sorted(path.name for path in store.root.iterdir()) == ["step-00000006", "step-00000008"]
    assert [store.damage(step) for step in store.steps()] == [None, None]
    assert losses_of(launches, name) == losses_of(launches, "no fault")


@pytest.mark.parametrize(("name", "step"), [("short files to the end", 8), ("short files, no patience", 4)])
def test_the_last_checkpoint_must_be_written(launches, name: str, step: int):
    found = launches[name]
    assert found["statuses"] == [EXIT_USER_ERROR] * 2, found["stderr"]
    assert error_of(found).startswith(f"error: the checkpoint of step {step} could not be written (rank ")
    assert list((run_of(launches, name) / "checkpoints").iterdir()) == []
