"""Flops of a step: by hand for a dense model, and the same sum over any layout."""

from __future__ import annotations

import pytest

from poet_megatron.config.load import load_config
from poet_megatron.layers.cost import input_centric_flops, weight_centric_flops
from poet_megatron.model.build import build_chunks, transformer_config
from poet_megatron.model.flops import flop_parts, step_flops
from poet_megatron.optim.merge import rotated_matrices
from poet_megatron.parallel.simulate import simulated_world

BASE = {
    "model.num_layers": 4,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.num_attention_heads": 4,
    "model.seq_length": 32,
    "model.vocab_size": 256,
    "poet.block_size": 8,
    "poet.shard_groups": 4,
    "poet.compute": "input",
    "train.micro_batch_size": 2,
    "train.global_batch_size": 16,
}
TOKENS = 16 * 32


def make(**changes: object):
    settings = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


def chunks_of(run, stage: int = 0):
    ranks = run.parallel.tensor_parallel * run.parallel.pipeline_parallel
    with simulated_world(run.parallel, ranks, stage * run.parallel.tensor_parallel):
        return build_chunks(run, transformer_config(run))


def test_dense_by_hand():
    run = make(method="adamw")
    weights = 4 * (4 * 64 * 64 + 3 * 64 * 96)
    assert flop_parts(run, chunks_of(run), TOKENS) == {
        "linear layers": 6 * TOKENS * weights,
        "rotations": 0,
        "attention": 6 * TOKENS * 4 * 32 * 64,
        "lm_head": 6 * TOKENS * 64 * 256,
    }


@pytest.mark.parametrize(("compute", "model"), [("input", input_centric_flops), ("weight", weight_centric_flops)])
def test_rotated_matrices_follow_the_flop_model(compute: str, model):
    run = make(poet__compute=compute)
    chunks = chunks_of(run)
    parts = flop_parts(run, chunks, TOKENS)
    matrices = rotated_matrices(chunks)
    assert parts["linear layers"] + parts["rotations"] == sum(model(TOKENS, m.rotation_in.layout, m.rotation_out.layout) for m in matrices)
    assert step_flops(run, chunks, TOKENS) == sum(parts.values())


def test_a_shared_rotation_is_done_once():
    own, shared = (flop_parts(run, chunks_of(run), TOKENS)["rotations"] for run in (make(), make(poet__share_input_rotation="true")))
    assert own - shared == 6 * TOKENS * 4 * (2 + 1) * 64 * 8  # R of k, v and up, in 4 layers


@pytest.mark.parametrize("method", ["poet", "adamw"])
@pytest.mark.parametrize(
    "layout",
    [
        {"parallel__tensor_parallel": 4},
        {"parallel__tensor_parallel": 2, "parallel__sequence_parallel": "true", "parallel__pipeline_parallel": 2},
        {"parallel__pipeline_parallel": 2, "parallel__virtual_stages": 2},
    ],
    ids=str,
)
def test_ranks_add_up_to_the_model(method: str, layout: dict):
    whole = make(method=method)
    expected = flop_parts(whole, chunks_of(whole), TOKENS)
    run = make(method=method, **layout)
    stages = [flop_parts(run, chunks_of(run, stage), TOKENS) for stage in range(run.parallel.pipeline_parallel)]
    assert {part: run.parallel.tensor_parallel * sum(stage[part] for stage in stages) for part in expected} == expected
