"""The estimate of a layout against what gloo processes really communicate and allocate (cases_estimate.py has the layouts)."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from cases_estimate import CASES, QUICK, ranks_of, run_of

from poet_megatron.estimate.estimate import Estimate, estimate
from poet_megatron.estimate.memory import PARTS
from poet_megatron.estimate.profile import hidden_shape
from poet_megatron.estimate.schedule import peak_in_flight
from poet_megatron.estimate.traffic import MERGE
from poet_megatron.parallel.layout import micro_batches

ROOT = Path(__file__).parents[2]
MESSAGES = ("send", "recv")
FP32_BYTES = 4
KEPT = ("frozen W0", "fp32 master of W0", "trainable weights", "gradients", "optimizer")
NAMES = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in CASES]


@functools.cache
def measured(quick: bool, ranks: int) -> dict[str, list[dict]]:
    """Run the quick cases on so many ranks, or the others, once."""
    names = [name for name in CASES if (name in QUICK) == quick and ranks_of(name) == ranks]
    script = Path(__file__).with_name("cases_estimate.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([*command, str(output), *names], capture_output=True, text=True, env=environment, timeout=600)
        assert output.exists(), f"no results:\n{done.stderr[-3000:]}"
        return json.loads(output.read_text())


@functools.cache
def estimated(name: str) -> Estimate:
    return estimate(run_of(name), ranks_of(name), fused_norms=False)


def seen_by(name: str) -> list[dict]:
    """What each rank of a case measured."""
    if run_of(name).engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed: pip install '.[deepspeed]'")
    results = measured(name in QUICK, ranks_of(name))
    assert name in results, f"{name}: the processes failed"
    return results[name]


def totals(calls: list[tuple[str, str, int, int]]) -> dict[tuple[str, str], tuple[int, int]]:
    """{(kind, group): (calls, bytes)} of (kind, group, calls, bytes); messages are between pipeline stages whatever group carries them."""
    sums: dict[tuple[str, str], tuple[int, int]] = defaultdict(lambda: (0, 0))
    for kind, group, count, size in calls:
        key = (kind, "pipeline" if kind in MESSAGES else group)
        sums[key] = (sums[key][0] + count, sums[key][1] + size)
    return dict(sums)


@pytest.mark.parametrize("name", NAMES)
def test_communication(name: str):
    """Calls and bytes of every kind and group, exactly, on every rank."""
    for rank in seen_by(name):
        traffic = estimated(name).stages[rank["stage"]].traffic
        for when, of_merge in (("step", False), ("merge", True)):
            expected = totals([(t.collective, t.group, t.calls, t.bytes) for t in traffic if (t.purpose == MERGE) == of_merge])
            found = totals([(kind, group, times, size * times) for kind, group, size, times in rank[when]])
            assert found == expected, f"{when} of rank {rank['rank']}"


@pytest.mark.parametrize("name", NAMES)
def test_memory(name: str):
    """Weights, masters, factors and gradients exactly, on the largest rank of the stage; optimizer state up to padding.

    Weights, gradients and optimizer together within 3 %.
    """
    for stage in estimated(name).stages:
        ranks = [rank["memory"] for rank in seen_by(name) if rank["stage"] == stage.stage]
        largest = {part: max(memory[part] for memory in ranks) for part in ranks[0]}
        for part in ("frozen W0", "fp32 master of W0", "gradients"):
            assert largest[part] == stage.memory_bytes[part], part
        assert largest["factors"] == stage.memory_bytes["factors"] - kept_by_megatron(name, stage.stage)
        measured_sum = max(sum(memory[part] for part in KEPT) for memory in ranks)
        assert abs(sum(stage.memory_bytes[part] for part in KEPT) - measured_sum) <= 0.03 * measured_sum
        if run_of(name).engine == "deepspeed":
            assert all(largest[part] == stage.memory_bytes[part] for part in KEPT)
            continue  # its gradients are not one padded buffer
        padding = stage.memory_bytes["gradients"] - FP32_BYTES * sum_trainable(stage.shapes, run_of(name).method)
        for part in ("trainable weights", "optimizer"):
            assert 0 <= stage.memory_bytes[part] - largest[part] <= 3 * padding, part


def kept_by_megatron(name: str, stage: int) -> int:
    """What the estimate counts with the factors: rotary embeddings of each chunk, [s, head size], with their frequencies, and under
    sequence parallelism the buffer [s, micro, h] into which dense layers and lm_head gather their input."""
    run, (_, micro, hidden) = run_of(name), hidden_shape(run_of(name))
    rotary = FP32_BYTES * (run.model.seq_length * run.model.head_size + run.model.head_size // 2)
    gathered = run.model.seq_length * micro * hidden * (2 if run.train.precision == "bf16" else FP32_BYTES)
    gathers = run.parallel.sequence_parallel and (run.method == "adamw" or stage == run.parallel.pipeline_parallel - 1)
    return run.parallel.virtual_stages * rotary + (gathered if gathers else 0)


def sum_trainable(shapes: list, method: str) -> int:
    """Elements of the parameters that are trained."""
    elements = 0
    for name, shape in shapes:
        size = 1
        for length in shape:
            size *= length
        elements += 0 if method == "poet" and ".matrices." in name and name.endswith("weight") else size
    return elements


@pytest.mark.parametrize("name", NAMES)
def test_activations(name: str):
    """The peak of what autograd keeps, over all micro-batches in flight, within 0.1 %.

    Pipeline schedules hold the inputs they received, which autograd keeps too, or only a cast of them; and the last one for a little longer
    than the estimate says. Recomputed layers are workspace in the estimate.
    """
    run, parallel = run_of(name), run_of(name).parallel
    length, micro, hidden = hidden_shape(run)
    message = length * micro * hidden * (2 if run.train.precision == "bf16" else FP32_BYTES)
    for stage in estimated(name).stages:
        memory = stage.memory_bytes
        below = message if parallel.pipeline_parallel > 1 else 0
        batches = micro_batches(run, ranks_of(name))
        inputs = peak_in_flight(stage.stage, parallel.pipeline_parallel, batches, [below] * parallel.virtual_stages)
        recomputed = memory["workspace"] if parallel.recompute == "full" else 0
        for peak in {rank["memory"]["activations"] for rank in seen_by(name) if rank["stage"] == stage.stage}:
            assert -0.001 * peak - below - recomputed <= memory["activations"] - peak <= 0.001 * peak + inputs


def test_every_part_is_described():
    assert list(estimated("outside").largest.memory_bytes) == list(PARTS)
