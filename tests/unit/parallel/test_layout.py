"""Layouts that cannot be: the error names the value, the bound and a fix that works."""

from __future__ import annotations

import pytest

from poet_megatron.config.load import load_config
from poet_megatron.parallel.layout import check_layout, data_parallel_size, micro_batches

BASE = {
    "model.num_layers": "8",
    "model.hidden_size": "512",
    "model.ffn_hidden_size": "1280",
    "model.num_attention_heads": "8",
    "model.num_query_groups": "4",
    "model.seq_length": "256",
    "model.vocab_size": "32000",
    "poet.block_size": "64",
    "train.micro_batch_size": "2",
    "train.global_batch_size": "64",
}


def make(**changes: object):
    settings = {**BASE, **{key.replace("__", "."): str(value) for key, value in changes.items()}}
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 1),
        ({}, 32),
        ({"parallel__tensor_parallel": 4, "parallel__sequence_parallel": "true", "parallel__pipeline_parallel": 2}, 16),
        ({"parallel__pipeline_parallel": 4, "parallel__virtual_stages": 2}, 4),
        ({"parallel__tensor_parallel": 2, "poet__shard_groups": 4}, 2),
        ({"engine": "deepspeed"}, 4),
    ],
)
def test_layouts_that_work(changes: dict, world_size: int):
    check_layout(make(**changes), world_size)


IMPOSSIBLE = [
    # changes, world size, what the message says, changes that it advises
    ({"parallel__tensor_parallel": 2, "parallel__pipeline_parallel": 2}, 6, "6 processes.*2 x 2 = 4: launch 4 or 8", {}, 8),
    ({"parallel__tensor_parallel": 4}, 2, "2 processes.*4 x 1 = 4: launch 4", {}, 4),
    ({}, 0, "world size is 0; at least 1", {}, 1),
    (
        {"parallel__tensor_parallel": 8},
        8,
        "tensor_parallel is 8.*does not divide model.num_query_groups.* = 4: choose 4",
        {"parallel__tensor_parallel": 4},
        8,
    ),
    (
        {"parallel__tensor_parallel": 3},
        3,
        "tensor_parallel is 3.*does not divide model.num_attention_heads = 8: choose 2 or 4",
        {"parallel__tensor_parallel": 2},
        2,
    ),
    (
        {"parallel__tensor_parallel": 4, "model__ffn_hidden_size": 1282},
        4,
        "tensor_parallel is 4.*model.ffn_hidden_size = 1282: choose 2 or 641",
        {"parallel__tensor_parallel": 2},
        2,
    ),
    (
        {"parallel__tensor_parallel": 4, "model__vocab_size": 321, "model__vocab_divisible_by": 2},
        4,
        "tensor_parallel is 4.*padded vocabulary.*321.* = 322: choose 2 or 7",
        {"parallel__tensor_parallel": 2},
        2,
    ),
    (
        {"parallel__tensor_parallel": 4, "parallel__sequence_parallel": "true", "model__seq_length": 250},
        4,
        "tensor_parallel is 4.*model.seq_length .* = 250: choose 2 or 5",
        {"parallel__tensor_parallel": 2},
        2,
    ),
    (
        {"parallel__tensor_parallel": 4, "poet__shard_groups": 6},
        4,
        "tensor_parallel is 4.*poet.shard_groups = 6: choose 3 or 6",
        {"poet__shard_groups": 4},
        4,
    ),
    (
        {"poet__shard_groups": 3},
        1,
        "shard_groups is 3.*model.hidden_size = 512: choose 2 or 4",
        {"poet__shard_groups": 4},
        1,
    ),
    (
        {"parallel__pipeline_parallel": 3},
        3,
        "num_layers is 8.*3 x 1 = 3.*divides 8",
        {"parallel__pipeline_parallel": 2},
        2,
    ),
    (
        {"parallel__pipeline_parallel": 4, "parallel__virtual_stages": 4},
        4,
        "num_layers is 8.*4 x 4 = 16.*divides 8",
        {"parallel__virtual_stages": 2},
        4,
    ),
    (
        {"train__global_batch_size": 62},
        3,
        "global_batch_size is 62.*2 x 3 = 6: set it to 66",
        {"train__global_batch_size": 66},
        3,
    ),
    (
        {"parallel__pipeline_parallel": 4, "parallel__virtual_stages": 2, "train__global_batch_size": 12},
        4,
        "6 micro-batches.*multiple of parallel.pipeline_parallel = 4.*multiple of 8",
        {"train__global_batch_size": 16},
        4,
    ),
    (
        {"engine": "deepspeed", "parallel__tensor_parallel": 2},
        2,
        "deepspeed.*2 x 1.*data-parallel only",
        {"engine": "megatron"},
        2,
    ),
]


@pytest.mark.parametrize(("changes", "world_size", "message", "advice", "advised_world"), IMPOSSIBLE)
def test_layouts_that_cannot_be(changes: dict, world_size: int, message: str, advice: dict, advised_world: int):
    with pytest.raises(ValueError, match=message):
        check_layout(make(**changes), world_size)
    check_layout(make(**{**changes, **advice}), advised_world)


def test_dense_runs_have_no_shard_groups():
    check_layout(make(method="adamw", poet__shard_groups=3), 1)


def test_sizes_of_a_layout():
    run = make(parallel__tensor_parallel=2, parallel__pipeline_parallel=2)
    assert data_parallel_size(run, 16) == 4
    assert micro_batches(run, 16) == 8
