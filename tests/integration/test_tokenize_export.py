"""Data made with a tokenizer.json or a .tiktoken file: merged, verified, trained on, and exported with a tokenizer of the same ids."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_prep import encoders
from data_prep.indexed import read_indexed
from data_prep.manifest import Manifest
from data_prep.prepare import prepare
from poet_megatron.cli.main import main
from poet_megatron.errors import UserError
from poet_megatron.train.export_run import export_run
from poet_megatron.train.run import pretrain
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, make_texts

TEXTS = [*make_texts(300), "</s> is text, <|endoftext|> too", "  two\n\n\tlines\r\n", "I'll say 12345 things!!\n\n"]


def tokenizer_json(folder: Path) -> tuple[Path, list[str]]:
    """A byte-level BPE with two tokens that could end a document, and the options that say which one does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>", "<|endoftext|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json", ["--eos-token", "<|endoftext|>"]


def tiktoken_file(folder: Path) -> tuple[Path, list[str]]:
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" o", b" of", b"ti", b"tion"]
    path = folder / "small.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    return path, []


@pytest.fixture(scope="module", params=[tokenizer_json, tiktoken_file], ids=["tokenizer.json", "tiktoken"])
def merged(request, tmp_path_factory) -> tuple[Path, Path, list[str]]:
    """A merged folder, its tokenizer's own file, and the options that go with it."""
    folder = tmp_path_factory.mktemp("data")
    path, options = request.param(folder)
    (folder / "a.jsonl").write_bytes(jsonl(TEXTS))
    words = ["--input", str(folder / "a.jsonl"), "--output", str(folder / "parts"), "--tokenizer", str(path), "--workers", "1"]
    assert main(["prepare", "tokenize", *words, "--valid-fraction", "0.2", *options]) == 0
    assert main(["prepare", "merge", "--parts", str(folder / "parts"), "--output", str(folder / "merged")]) == 0
    return folder / "merged", path, options


def documents(folder: Path) -> list[list[int]]:
    data = [read_indexed(folder / split) for split in ("train", "valid")]
    return [one.document(number).tolist() for one in data for number in range(len(one))]


def test_a_run_on_it_exports_a_tokenizer_with_the_ids_of_the_data(merged, tmp_path, capsys):
    from conftest import TINY

    from poet_megatron.config.load import load_config

    folder, _, _ = merged
    manifest = Manifest.load(folder)
    settings = {**TINY, "data.path": str(folder), "train.run_dir": str(tmp_path / "run"), "model.vocab_size": str(manifest.vocab_size)}
    settings |= {"train.steps": "2", "checkpoint.interval": "2", "train.eval_tokens": "64"}
    pretrain(load_config(None, [f"--{key}={value}" for key, value in settings.items()]))
    exported = export_run(tmp_path / "run", None, None, "fp32")
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True)
    assert tokenizer.eos_token_id == manifest.eos_id
    expected = sorted([*tokenizer.encode(text), tokenizer.eos_token_id] for text in TEXTS)
    assert sorted(documents(folder)) == expected
    assert sorted(tokenizer.decode(ids[:-1]) for ids in documents(folder)) == sorted(TEXTS)
    assert json.loads((exported / "config.json").read_text())["eos_token_id"] == manifest.eos_id
    alone = export_run(tmp_path / "run", tmp_path / "alone", None, "fp32", tokenizer=False)
    assert not list(alone.glob("token*")) and AutoModelForCausalLM.from_pretrained(alone).config.vocab_size == manifest.vocab_size


def test_its_tokenizer_can_be_given_again(merged, tmp_path, capsys):
    """The file that the folder keeps is a tokenizer like the one that was given."""
    folder, path, options = merged
    names = {"eos_token": options[1]} if options else {}
    original, kept = encoders.load(path, **names), encoders.load(folder / "tokenizer.model")
    described = [(one.kind, one.sha256, one.vocab_size, one.eos_id, one.bos_id) for one in (original, kept)]
    assert described[0] == described[1]
    assert kept.encode_batch(TEXTS)[0].tolist() == original.encode_batch(TEXTS)[0].tolist()
    source = folder.parent / "a.jsonl"
    words = ["--input", str(source), "--output", str(tmp_path / "again"), "--tokenizer", str(folder / "tokenizer.model"), "--workers", "1"]
    assert main(["prepare", "tokenize", *words, "--valid-fraction", "0.2"]) == 0
    assert main(["prepare", "merge", "--parts", str(tmp_path / "again"), "--output", str(tmp_path / "merged")]) == 0
    names = ("train.bin", "train.idx", "valid.bin", "valid.idx")
    assert hashes(tmp_path / "merged", names) == hashes(folder, names)
    assert Manifest.load(tmp_path / "merged").eos_id == Manifest.load(folder).eos_id


def test_it_is_verified_with_samples(merged, tmp_path, capsys):
    folder, _, _ = merged
    capsys.readouterr()
    assert main(["prepare", "verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out.count(" tokens: '") == 3 and "0 problems" in out
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged, ignore=shutil.ignore_patterns("tokenizer.model"))
    assert main(["prepare", "verify", str(damaged)]) == 1
    assert "tokenizer.model: missing" in capsys.readouterr().err


def test_prepare_in_one_step_takes_sentencepiece_models_only(merged, tmp_path):
    folder, path, _ = merged
    message = r"is no SentencePiece model: use poet-megatron prepare tokenize and merge, which take other kinds"
    with pytest.raises(UserError, match=message):
        prepare([str(folder.parent / "a.jsonl")], tmp_path / "out", tokenizer=folder / "tokenizer.model")
    assert not (tmp_path / "out").exists()
