"""What people of Megatron and DeepSpeed may ask for and is not there: refused by name, with what to use instead."""

from __future__ import annotations

import pytest

from poet_megatron.config.load import load_config

REFUSED = [
    ("--engine=fsdp", r"engine is 'fsdp', which is not supported: .*W0.*distributed_optimizer"),
    ("--engine=zero3", r"engine is 'zero3', which is not supported: .*deepspeed\.zero_stage 1 or 2"),
    ("--parallel.fsdp=true", r"parallel\.fsdp is not supported: .*distributed_optimizer"),
    ("--parallel.use_megatron_fsdp=true", r"is not supported: .*distributed_optimizer"),
    ("--parallel.context_parallel=2", r"parallel\.context_parallel is not supported: .*parallel\.tensor_parallel"),
    ("--parallel.context-parallel-size=2", r"is not supported: .*parallel\.sequence_parallel"),
    ("--parallel.expert_parallel=2", r"is not supported: .*dense"),
    ("--parallel.expert_model_parallel_size=2", r"is not supported: .*dense"),
    ("--model.num_experts=8", r"is not supported: .*dense"),
    ("--model.moe_router_topk=2", r"is not supported: .*dense"),
    ("--train.fp8=true", r"train\.fp8 is not supported: .*train\.precision bf16"),
    ("--train.precision=fp8", r"train\.precision is 'fp8', which is not supported: .*bf16"),
    ("--model.transformer_engine=true", r"is not supported: .*leave the key out"),
]


@pytest.mark.parametrize(("word", "message"), REFUSED, ids=[word for word, _ in REFUSED])
def test_refused_by_name(word: str, message: str):
    with pytest.raises(ValueError, match=message):
        load_config(None, [word])


def test_also_in_a_recipe(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("parallel:\n  context_parallel: 2\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: parallel\.context_parallel is not supported"):
        load_config(recipe)


def test_a_misspelt_key_still_gets_the_nearest_one():
    with pytest.raises(ValueError, match=r"unknown key parallel\.tensor_paralel; did you mean parallel\.tensor_parallel\?"):
        load_config(None, ["--parallel.tensor_paralel=2"])
