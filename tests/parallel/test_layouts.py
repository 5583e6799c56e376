"""Training does not depend on the parallel layout: losses, gradient norms and collectives as measured by `python -m benchmarks.layouts`."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from benchmarks.layout_cases import LAYOUTS, MODEL, ONE_RANK, STEPS, VARIANTS
from benchmarks.layouts import why_not

ROOT = Path(__file__).parents[2]
LAYOUT = {layout.name: layout for layout in LAYOUTS}
NORM_BOUND = 1e-4  # an error d in the weights changes the loss by its gradient's product with d, the norm by the Hessian's: far more here
FIRST_NORM_BOUND = 1e-6  # before Adam has amplified anything: rounding
LAYERS, FFN, HIDDEN = (int(MODEL[f"model.{name}"]) for name in ("num_layers", "ffn_hidden_size", "hidden_size"))
KEYS = HIDDEN * int(MODEL["model.num_query_groups"]) // int(MODEL["model.num_attention_heads"])
MICRO_BATCHES = int(MODEL["train.global_batch_size"]) // int(MODEL["train.micro_batch_size"])
TOKENS = int(MODEL["train.micro_batch_size"]) * int(MODEL["model.seq_length"])
FP32 = 4


@functools.cache
def benchmark() -> dict:
    """The benchmark's JSON; run once."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.layouts", "--collectives", "--json", "--output", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800)
        path = Path(folder) / "layouts.json"
        assert path.exists(), done.stderr[-3000:]
        return {**json.loads(path.read_text()), "stdout": done.stdout, "stderr": done.stderr}


def row(layout: str, variant: str) -> dict:
    if reason := why_not(LAYOUT[layout]):
        pytest.skip(reason)
    rows = [row for row in benchmark()["results"] if (row["layout"], row["variant"]) == (layout, variant)]
    assert rows, f"no result: {benchmark()['stderr'][-3000:]}"
    return rows[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUT)
def test_losses_are_those_of_one_rank(layout: str, variant: str):
    """Fp32, 30 steps, merges after 10 and 20."""
    found = row(layout, variant)
    assert found["steps"] == STEPS
    assert found["max_relative_difference"] <= found["bound"] == (1e-4 if LAYOUT[layout].data_parallel else 1e-5)
    assert found["last_loss"] < 0.93 * found["first_loss"]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", LAYOUT)
def test_gradient_norms_are_those_of_one_rank(layout: str, variant: str):
    """Before clipping, which every step needs."""
    found = row(layout, variant)
    assert found["smallest_norm"] > 2 * float(MODEL["optim.clip_grad"])
    assert found["relative_difference_of_first_norm"] <= FIRST_NORM_BOUND
    assert found["max_relative_difference_of_norm"] <= NORM_BOUND


def test_json_is_a_list_of_layouts_with_their_bounds():
    printed = json.loads(benchmark()["stdout"])
    assert {"layout", "variant", "max_relative_difference", "bound"} <= set(printed[0])
    assert printed[0]["layout"] == ONE_RANK and printed[0]["max_relative_difference"] == 0


# -- collectives of the first step on rank 0 --


def collectives(layout: str, method: str) -> dict[str, tuple[int, int]]:
    counts = benchmark()["collectives"].get(f"{layout}|{method}")
    assert counts, f"no counts: {benchmark()['stderr'][-3000:]}"
    return {kind: tuple(numbers) for kind, numbers in counts["collectives"].items()}


def extra(layout: str, placement: str) -> dict[str, tuple[int, int]]:
    """What POET's step issues beyond the dense step's, {kind: (calls, bytes)}."""
    poet, dense = collectives(layout, f"poet, {placement}"), collectives(layout, "adamw")
    found = {}
    for kind in sorted({*poet, *dense}):
        (calls, size), (dense_calls, dense_size) = poet.get(kind, (0, 0)), dense.get(kind, (0, 0))
        if (calls, size) != (dense_calls, dense_size):
            found[kind] = (calls - dense_calls, size - dense_size)
    return found


def packed(width: int) -> int:
    """Skew numbers of a side: blocks of 16 in four groups."""
    group, block = width // 4, 16
    return 4 * (group // block * (block * (block - 1) // 2) + (group % block) * (group % block - 1) // 2)


INPUTS = {"q": HIDDEN, "k": HIDDEN, "v": HIDDEN, "gate": HIDDEN, "up": HIDDEN}
"""Width of the replicated R of every matrix of a column-parallel layer."""
REPLICATED_OUT = 2 * packed(HIDDEN)
"""Skew numbers of the replicated P of o and down, whose gradients Megatron adds up under sequence parallelism."""
GATHER = TOKENS * HIDDEN * FP32
"""Bytes of an activation gathered along the sequence, or copied."""


@pytest.mark.parametrize(("placement", "factors"), [("inside", INPUTS), ("shared", {"qkv": HIDDEN, "fc1": HIDDEN})])
def test_without_sequence_parallelism_activation_collectives_are_megatrons(placement: str, factors: dict[str, int]):
    """Inside: one small all-reduce per R and step on top. Shared: R's gradient is whole."""
    partial = factors if placement == "inside" else {}
    expected = (LAYERS * len(partial), LAYERS * FP32 * sum(map(packed, partial.values())))
    assert extra("TP2", placement) == ({"all_reduce over tensor": expected} if partial else {})


def test_outside_every_rotated_input_is_copied_by_itself():
    """3 + 2 copies instead of 1 + 1 per layer and micro-batch, each with an all-reduce of its gradient."""
    calls = 3 * LAYERS * MICRO_BATCHES
    assert extra("TP2", "outside") == {"all_reduce over tensor": (calls, calls * GATHER)}


@pytest.mark.parametrize("placement", ["inside", "shared"])
def test_under_sequence_parallelism_a_frozen_weight_saves_a_gather(placement: str):
    """The dense layer gathers its input again for the weight gradient: one gather fewer per column-parallel layer and micro-batch."""
    saved = 2 * LAYERS * MICRO_BATCHES
    factors = list(INPUTS.values()) if placement == "inside" else [HIDDEN, HIDDEN]
    reduced = LAYERS * FP32 * (sum(map(packed, factors)) + REPLICATED_OUT)
    calls = LAYERS * len(factors) if placement == "inside" else 0  # shared: added up by Megatron, with the norms
    assert extra("TP2 + SP", placement) == {
        "all_gather over tensor": (-saved, -saved * GATHER),
        "all_reduce over tensor": (calls, reduced),
    }


def test_data_parallel_gradients_are_those_of_trainable_parameters_only():
    """To the byte: besides them replicas only add up the number of tokens (int32), and loss, tokens and faults (three float64)."""
    scalars, parameters = 4 + 3 * 8, rotated_weights() + other_weights()
    assert collectives("DP2", "adamw") == {"all_reduce over data": (3, FP32 * parameters + scalars)}
    assert collectives("DP2", "poet, inside") == {
        "all_reduce over data": (3, FP32 * (parameters - rotated_weights() + rotated_skews()) + scalars)
    }


def test_the_distributed_optimizer_communicates_trainable_parameters_only():
    """Reduce-scatter of gradients, all-gather of parameters, with Megatron's padding of a buffer (at most 63 elements per parameter)."""
    for method, parameters, tensors in (
        ("adamw", rotated_weights() + other_weights(), 6 * LAYERS + 3),
        ("poet, inside", rotated_skews() + other_weights(), 16 * LAYERS + 3),
    ):
        found = collectives("DP2, distributed optimizer", method)
        assert found["reduce_scatter over data"] == found["all_gather over data"]
        calls, size = found["reduce_scatter over data"]
        assert calls == 1 and 0 <= size - FP32 * parameters <= FP32 * (63 * tensors + 255)


def other_weights() -> int:
    """Embedding, lm_head and norms."""
    return 2 * HIDDEN * int(MODEL["model.vocab_size"]) + (2 * LAYERS + 1) * HIDDEN


def rotated_weights() -> int:
    return LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KEYS + 3 * HIDDEN * FFN)


def rotated_skews() -> int:
    sides = [HIDDEN, HIDDEN, HIDDEN, KEYS, HIDDEN, KEYS, HIDDEN, HIDDEN, HIDDEN, FFN, HIDDEN, FFN, FFN, HIDDEN]
    return LAYERS * sum(map(packed, sides))


# -- real widths --


@pytest.mark.slow
def test_eight_ranks_split_a_layer_of_the_1b3_recipe(tmp_path: Path, capsys):
    """2048 x 5376, blocks of 256, eight shard groups: forward, backward, update, merge, and a step after it, as on one rank."""
    output = tmp_path / "results.json"
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("cases_wide.py")), str(output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=3600)
    assert output.exists(), done.stderr[-3000:]
    found = json.loads(output.read_text())
    with capsys.disabled():
        for name, result in found.items():
            print(f"\n{name}: {result['seconds']:.1f} s, {result['peak_bytes'] / 2**30:.2f} GiB on rank 0, losses {result['losses']}")
    assert found["TP8"]["losses"] == pytest.approx(found["TP1"]["losses"], rel=1e-5)
    assert found["TP8"]["grad_norms"] == pytest.approx(found["TP1"]["grad_norms"], rel=NORM_BOUND)
