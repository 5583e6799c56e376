"""The estimate as text and as JSON, through the command."""

from __future__ import annotations

import json

import pytest

from poet_megatron.cli import main as cli
from poet_megatron.estimate.memory import PARTS
from poet_megatron.estimate.report import _size

SETTINGS = [
    "--model.num_layers=4",
    "--model.hidden_size=64",
    "--model.ffn_hidden_size=96",
    "--model.num_attention_heads=4",
    "--model.seq_length=32",
    "--model.vocab_size=320",
    "--method=adamw",
    "--train.micro_batch_size=2",
    "--train.global_batch_size=16",
    "--parallel.pipeline_parallel=2",
]


def test_text_explains_every_row(capsys):
    assert cli.main(["estimate", "--world-size", "4", *SETTINGS]) == 0
    text = capsys.readouterr().out
    assert "layout: 4 rank(s) = 1 tensor x 2 pipeline x 2 data; 4 micro-batch(es) of 2 sequences" in text
    for part, meaning in PARTS.items():
        assert part in text and meaning in text
    assert "largest: stage" in text and "pipeline: activations to the next stage" in text
    assert "stage1.decoder.layers.1.mlp.linear_fc2.weight" in text
    assert "attention" in text and "1.000 of the same model with dense linear layers" in text


def test_json_has_the_whole_model_and_every_stage(capsys):
    assert cli.main(["estimate", "--json", "--world-size", "4", *SETTINGS]) == 0
    found = json.loads(capsys.readouterr().out)
    hidden, vocabulary = 64, 384
    assert found["rotated_parameters"] == 4 * (4 * hidden * hidden + 3 * hidden * 96)
    assert found["total_parameters"] == found["rotated_parameters"] + 2 * vocabulary * hidden + 9 * hidden == found["trainable_parameters"]
    assert (found["world_size"], found["data_parallel"], found["micro_batches"]) == (4, 2, 4)
    assert [stage["layers"] for stage in found["stages"]] == [[0, 1], [2, 3]]
    sums = [sum(stage["memory_bytes"].values()) for stage in found["stages"]]
    assert sum(found["memory_bytes"].values()) == max(sums)
    assert {
        "stage": 0,
        "purpose": "pipeline",
        "collective": "send",
        "group": "pipeline",
        "calls": 4,
        "bytes": 4 * 32 * 2 * 64 * 2,
    } in found["stages"][0]["traffic"]


def test_the_world_size_comes_from_the_launcher(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.main(["estimate", "--json", *SETTINGS]) == 0
    assert json.loads(capsys.readouterr().out)["data_parallel"] == 4


def test_a_layout_that_cannot_be(capsys):
    assert cli.main(["estimate", "--world-size", "3", *SETTINGS]) == 2
    assert "error: 3 processes cannot be split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (3 * 2**19, "1.50 MiB"), (2**30, "1.00 GiB"), (2**62, "4194304.00 TiB")],
)
def test_sizes(count: int, text: str):
    assert _size(count) == text


@pytest.mark.parametrize("stage", ["1", "2"])
def test_deepspeed_is_counted_by_its_own_rules(capsys, stage: str):
    """All-reduces instead of reduce-scatters, once per step or once per micro-batch."""
    settings = ["--engine=deepspeed", f"--deepspeed.zero_stage={stage}", *SETTINGS[:-1], "--world-size", "4"]
    assert cli.main(["estimate", "--json", *settings]) == 0
    found = json.loads(capsys.readouterr().out)
    (gradients,) = [entry for entry in found["stages"][0]["traffic"] if entry["purpose"] == "gradients"]
    assert (gradients["collective"], gradients["calls"]) == ("all_reduce", 1 if stage == "1" else found["micro_batches"])
    assert cli.main(["estimate", *settings]) == 0
    assert f"engine deepspeed, ZeRO-{stage}" in capsys.readouterr().out
