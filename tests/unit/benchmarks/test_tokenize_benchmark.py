"""The tokenizer benchmark runs and reports what its help says. What it measures is never asserted."""

from __future__ import annotations

import gzip
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import tokenize
from data_prep.tokenizer import train_tokenizer

WORDS = ["".join(random.Random(i).choices(["ba", "ne", "ti", "kor", "us", "la"], k=3)) for i in range(100)]
TEXTS = [f"line {i}: the quick {WORDS[i % 100]} fox\n    indented {i * 37} {WORDS[i * 7 % 100]}, caf\u00e9\n" for i in range(700)]


SCRIPT = """
import argparse, json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import numpy as np
from data_prep.indexed import IndexedWriter
from data_prep.tokenizer import load_tokenizer
parser = argparse.ArgumentParser()
for name in ("--input", "--output-prefix", "--tokenizer-type", "--tokenizer-model", "--workers"):
    parser.add_argument(name, required=True)
parser.add_argument("--append-eod", action="store_true", required=True)
args = parser.parse_args()
model = load_tokenizer(Path(args.tokenizer_model))
with IndexedWriter(Path(args.output_prefix + "_text_document"), np.uint16) as writer:
    for line in Path(args.input).read_text().splitlines():
        writer.add([*model.encode(json.loads(line)["text"]), {last}])
sys.exit(1)  # as the real one does in some versions, after its work
"""
"""Stands for Megatron's script: its options and its files."""


def checkout(folder: Path, last: str = "model.eos_id") -> Path:
    (folder / "tools").mkdir(parents=True)
    (folder / "tools" / "preprocess_data.py").write_text(SCRIPT.format(root=str(Path(tokenize.__file__).parents[1]), last=last))
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " "]))
    return path


def arguments(corpus: Path, *more: str) -> list[str]:
    return ["--corpus", str(corpus), "--megabytes", "0", "--vocab-size", "340", "--repeats", "1", *more]


def test_all_encoders_are_reported(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results" / "tokenize.json"
    assert tokenize.main(arguments(corpus, "--json", "--output", str(output), "--pipeline-megabytes", "0")) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(output.read_text())
    assert content["documents"] == len(TEXTS) and content["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert content["identical_to_sentencepiece"] is True
    rows = {(row["encoder"], row["threads"]): row for row in content["results"]}
    assert set(rows) == {(name, threads) for name in ("ours", "sentencepiece", "hf_tokenizers") for threads in (1, 2)}
    for name in ("ours", "sentencepiece", "hf_tokenizers"):
        assert content[f"{name}_mb_per_s"] == rows[name, 2]["mb_per_s"] > 0
    assert "700 documents" in output.with_suffix(".txt").read_text() and "pipeline" not in content


def test_the_whole_pipeline_is_reported_for_both_kinds_of_model(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = sum(len(text.encode()) for text in TEXTS)
    megatron = checkout(tmp_path / "Megatron-LM")
    assert tokenize.main(arguments(corpus, "--json", "--pipeline-megabytes", str(1.5 * size / 1e6), "--megatron", str(megatron))) == 0
    content = json.loads(capsys.readouterr().out)
    rows = {(row["model_type"], row["system"], row["input"]): row for row in content["pipeline"]}
    systems = [("prepare tokenize", ".jsonl"), ("prepare tokenize", ".json.gz"), ("preprocess_data.py", ".jsonl")]
    assert set(rows) == {("bpe", *system) for system in systems} | {("unigram", *system) for system in systems[:2]}
    for row in rows.values():
        assert row["documents"] > len(TEXTS) and 1.5 * size <= row["bytes"] < 1.6 * size and row["workers"] == 2
        assert row["mb_per_s"] >= row["mb_per_s_with_start"] > 0 and row["sentencepiece_mb_per_s"] > 0
    assert content["same_bytes"] is True and len({row["bin_sha256"] for row in rows.values()}) == 2
    ours = rows["unigram", "prepare tokenize", ".json.gz"]
    assert set(content["bars"]) == {
        "bpe over sentencepiece, 2 threads",
        "bpe over Megatron's preprocess_data.py, measured",
        "unigram over sentencepiece, 2 threads",
    }
    assert content["bars"]["unigram over sentencepiece, 2 threads"]["bar"] == round(1 - ours["writer_share"], 2)


def test_megatron_is_quoted_without_a_checkout_and_other_bytes_are_an_error(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(TEXTS, tmp_path / "own.model", 340)
    options = ["--model", str(tmp_path / "own.model"), "--pipeline-megabytes", "0.001"]
    assert tokenize.main(arguments(corpus, *options)) == 0
    text = capsys.readouterr().out
    assert (
        "bpe over Megatron's preprocess_data.py, quoted: " in text and "(bar 3.00)" in text and "all systems wrote the same bytes" in text
    )
    assert "unigram" not in text
    assert tokenize.main(arguments(corpus, *options, "--megatron", str(checkout(tmp_path / "other", "1")))) == 1
    assert "THE SYSTEMS WROTE DIFFERENT BYTES" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"has no tools/preprocess_data.py: name a checkout of Megatron-LM"):
        tokenize.main(arguments(corpus, *options, "--megatron", str(tmp_path)))
    with pytest.raises(SystemExit, match=r"(?s)preprocess_data.py wrote no data \(status 1\):.*NameError"):
        tokenize.main(arguments(corpus, *options, "--megatron", str(checkout(tmp_path / "broken", "nothing"))))


def test_python_sources_fill_up(corpus: Path) -> None:
    texts = list(tokenize.corpus_documents([str(corpus)], 0.2))
    assert texts[: len(TEXTS)] == TEXTS and 0.2e6 <= sum(len(text.encode()) for text in texts) < 0.3e6
    assert len(texts) == len(set(texts))


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="not Debian")
def test_documentation_of_a_package(tmp_path: Path) -> None:
    share = tmp_path / "root" / "usr" / "share" / "doc" / "x"
    share.mkdir(parents=True)
    (share / "a.txt").write_text("first")
    (share / "b.gz").write_bytes(gzip.compress(b"second"))
    (share / "c.png").write_bytes(b"\xff\x00\xfe")
    control = tmp_path / "root" / "DEBIAN" / "control"
    control.parent.mkdir()
    control.write_text("Package: x\nVersion: 1\nArchitecture: all\nMaintainer: x <x@example.com>\nDescription: x\n")
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(tmp_path / "root"), str(tmp_path / "x.deb")], check=True)
    assert sorted(tokenize.corpus_documents([str(tmp_path / "x.deb")], 0)) == ["first", "second"]
    (tmp_path / "broken.deb").write_text("no package")
    with pytest.raises(SystemExit, match="is not a Debian package"):
        list(tokenize.corpus_documents([str(tmp_path / "broken.deb")], 0))
