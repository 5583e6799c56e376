"""The kernel and throughput benchmarks run and report what their help says. What they measure is never asserted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import kernels, throughput
from benchmarks.timing import Samples
from poet_megatron.ops import native


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_kernels_compare_every_op_with_the_library(tmp_path, capsys):
    if not native.native_available("cpu"):
        pytest.skip("there are no compiled ops")
    output = tmp_path / "kernels.json"
    arguments = ["--widths", "64", "--block-sizes", "16", "--tokens", "8", "--threads", "1", "--repeats", "1", "--json"]
    assert kernels.main([*arguments, "--output", str(output)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(output.read_text())
    ops = [(row["op"], row["dtype"]) for row in content["results"]]
    assert len(ops) == len(set(ops)) == 11
    assert "merge" in kernels.table(content["results"])


def test_the_library_side_takes_no_compiled_op(monkeypatch):
    seen = []
    kernels.Reference(lambda: seen.append(native.native_available("cpu")))()
    assert seen == [False]


def test_throughput_trains_every_method(monkeypatch, capsys):
    tiny = throughput.Model(layers=1, hidden=256, ffn=256, heads=2, seq_length=16, vocab=64, micro_batch=2, micro_batches=2)
    monkeypatch.setattr(throughput, "MODELS", {"tiny": tiny})
    assert throughput.main(["--models", "tiny", "--repeats", "1", "--threads", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["method"] for row in rows] == ["adamw", "poet_bs 64", "poet_bs 256"]
    assert all(row["tokens"] == 64 and row["tokens_per_s"] > 0 for row in rows)


def test_ratios_are_of_tokens_per_second():
    model = throughput.MODELS["demo"]
    found = throughput.row("demo", "bf16", "poet_bs 64", model, Samples(seconds=[2.0], ratios=[0.5]))
    assert found["ratio"] == 2.0 and found["tokens_per_s"] == model.tokens / 2
