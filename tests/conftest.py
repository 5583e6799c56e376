"""Fixtures shared by the tests: a tiny corpus, its prepared data, and a configuration that trains on it in seconds."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCAB_SIZE = 320
TINY = {
    "model.num_layers": "2",
    "model.hidden_size": "64",
    "model.ffn_hidden_size": "96",
    "model.num_attention_heads": "4",
    "model.num_query_groups": "2",
    "model.seq_length": "32",
    "model.vocab_size": str(VOCAB_SIZE),
    "poet.block_size": "24",
    "poet.merge_interval": "10",
    "optim.lr": "5e-3",
    "optim.poet_lr": "5e-3",
    "optim.clip_grad": "1.0",
    "train.steps": "30",
    "train.micro_batch_size": "2",
    "train.global_batch_size": "4",
    "train.precision": "fp32",
    "train.eval_tokens": "512",
    "monitor.log_interval": "1",
    "checkpoint.interval": "15",
}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Fixed thread count, so that sums have one order and golden losses one value."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 documents of made-up sentences with a little grammar to learn."""
    words = random.Random(0)
    nouns = ["model", "weight", "matrix", "tensor", "gradient", "layer", "token", "corpus", "signal", "spectrum", "block", "index"]
    verbs = ["rotates", "freezes", "learns", "merges", "scales", "permutes", "trains"]
    lines = []
    for number in range(400):
        sentences = [f"The {words.choice(nouns)} {words.choice(verbs)} the {words.choice(nouns)}." for _ in range(words.randint(3, 12))]
        lines.append(json.dumps({"text": f"Note {number}\n" + " ".join(sentences)}))
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny_data(corpus: Path) -> Path:
    """The corpus, prepared."""
    from data_prep.prepare import prepare

    output = corpus.parent / "prepared"
    prepare([str(corpus)], output, vocab_size=VOCAB_SIZE, valid_fraction=0.05)
    return output


@pytest.fixture
def tiny_run(tiny_data: Path, tmp_path: Path) -> Callable:
    """Make a RunConfig for the tiny model: tiny_run("run name", {"dotted.key": "value"})."""
    from poet_megatron.config.load import load_config

    def make(name: str = "run", changes: dict[str, str] | None = None):
        settings = {**TINY, "data.path": str(tiny_data), "train.run_dir": str(tmp_path / name), **(changes or {})}
        return load_config(None, [f"--{key}={value}" for key, value in settings.items()])

    return make


def train_losses(run_dir: str | Path) -> dict[int, float]:
    """{step: train/loss} of a run's metrics.jsonl."""
    entries = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return {entry["step"]: entry["train/loss"] for entry in entries if "train/loss" in entry}


@pytest.fixture
def losses() -> Callable[[str | Path], dict[int, float]]:
    return train_losses
