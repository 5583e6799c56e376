"""The tokenizer benchmark runs and reports what its help says. What it measures is never asserted."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import tokenize

TEXTS = [f"line {i}: the quick brown fox\n    indented {i * 37} words, caf\u00e9\n" for i in range(700)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, " "]))
    return path


def test_all_encoders_are_reported(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    output = tmp_path / "results" / "tokenize.json"
    arguments = ["--corpus", str(corpus), "--megabytes", "0", "--vocab-size", "340", "--repeats", "1", "--json", "--output", str(output)]
    assert tokenize.main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    assert content == json.loads(output.read_text())
    assert content["documents"] == len(TEXTS) and content["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert content["identical_to_sentencepiece"] is True
    rows = {(row["encoder"], row["threads"]): row for row in content["results"]}
    assert set(rows) == {(name, threads) for name in ("ours", "sentencepiece", "hf_tokenizers") for threads in (1, 2)}
    for name in ("ours", "sentencepiece", "hf_tokenizers"):
        assert content[f"{name}_mb_per_s"] == rows[name, 2]["mb_per_s"] > 0
    assert "700 documents" in output.with_suffix(".txt").read_text()


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
