"""One command each: from text to a model that transformers loads, and from a recipe to a table and a picture of four runs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import train_losses
from desk import SETTINGS, Desk

from data_prep.corpus import embedded_documents

pytest_plugins = ("slurm_fixtures",)
pytestmark = pytest.mark.slurm

VOCAB_SIZE = 512  # the text has 343 characters and bytes


def real_text(folder: Path, files: int = 3, documents: int = 60) -> list[str]:
    """Files of Python's documentation, which is English text."""
    texts = list(itertools.islice(embedded_documents(), files * documents))
    paths = [folder / f"text-{number}.jsonl" for number in range(files)]
    for number, path in enumerate(paths):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[number::files]))
    return [str(path) for path in paths]


def mean_loss(model: Any, path: Path, eos: int) -> tuple[float, int]:
    """Loss per token of all tokens in a file by transformers, in windows of the training length, and their number."""
    tokens = torch.from_numpy(np.fromfile(path, np.uint16).astype(np.int64))
    inputs, length = torch.cat([torch.tensor([eos]), tokens[:-1]]), int(SETTINGS["model.seq_length"])
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(tokens), length):
            window = slice(first, first + length)
            logits = model(inputs[None, window]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, tokens[window], reduction="sum").item()
    return total / len(tokens), len(tokens)


def test_one_command_from_text_to_a_hugging_face_model(desk: Desk):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    real_text(desk.folder)
    text = ("--input", f"{desk.folder}/text-*.jsonl", f"--vocab-size={VOCAB_SIZE}", "--tokenize-tasks=2", "--valid-fraction=0.05")
    settings = desk.settings("job", **{"data.path": str(desk.folder / "data"), "model.vocab_size": str(VOCAB_SIZE), "train.steps": "6"})
    jobs = desk.launch(*text, "--export", *settings)
    assert list(jobs) == ["tokenizer", "tokenize", "merge", "pretrain", "export"]
    desk.wait_for_end("job", jobs["export"], "COMPLETED", kind="export")
    assert len(list((desk.folder / "job" / "launch" / "1").glob("tokenize-*_*.log"))) == 2
    assert len(list((desk.folder / "data.work" / "parts").glob("part-*.json"))) == 3
    assert "0 problems" in desk.log("job", jobs["merge"], kind="merge")
    assert len(train_losses(desk.folder / "job")) == 6

    export = desk.folder / "job" / "export"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(export), AutoTokenizer.from_pretrained(export)
    evaluation = json.loads((desk.folder / "job" / "evaluation.json").read_text())
    loss, tokens = mean_loss(model, desk.folder / "data" / "valid.bin", tokenizer.eos_token_id)
    assert (evaluation["step"], evaluation["tokens"]) == (6, tokens)
    assert evaluation["loss"] == pytest.approx(loss, rel=1e-5)  # means of thousands of fp32 losses, each exact to some 1e-7


def test_a_sweep_of_four_points_is_an_array_with_one_table_and_one_picture(desk: Desk):
    points = ("--sweep", "optim.poet_lr=1e-3,5e-3", "poet.block_size=8,16")
    jobs = desk.launch(*points, *desk.settings("sweep", **{"train.steps": "4"}))
    desk.wait_for_end("sweep", jobs["summary"], "COMPLETED", kind="summary")
    names = [f"poet_lr-{rate}_block_size-{size}" for rate in ("1e-3", "5e-3") for size in (8, 16)]
    finals = {name: train_losses(desk.folder / "sweep" / name)[4] for name in names}
    assert len(set(finals.values())) == 4  # each has its own settings
    assert len(list((desk.folder / "sweep" / "launch" / "1").glob(f"sweep-{jobs['sweep']}_?.log"))) == 4
    table = desk.log("sweep", jobs["summary"], kind="summary")
    rows = re.findall(r"^[ *]*(poet_lr\S+) .* 4/4 .* complete$", table, re.MULTILINE)
    assert sorted(rows) == sorted(names), table
    for name in ("compare.svg", "compare.png"):
        assert (desk.folder / "sweep" / "summary" / name).stat().st_size > 1000
