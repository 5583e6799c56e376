"""`prepare tokenize --dataset` through the real `datasets` and `huggingface_hub`, from a hub on this machine that breaks connections.

The address of the hub is read from the environment when these libraries are imported, hence the processes. Nobody waits in them: pauses are
written down instead.
"""

import base64
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.data_prep.hub_server import NAME, PIECE, serve
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, make_texts, make_tokenizer, run

WITHOUT_WAITING = """
import sys, time
time.sleep = lambda seconds: print(f"pause of {seconds:g} s", file=sys.stderr)
from poet_megatron.cli.main import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TEXTS = [make_texts(40 + seed, seed) for seed in range(3)]


def files_of(texts):
    files = {f"data/train-{number}.jsonl.gz": gzip.compress(jsonl(content), 1, mtime=0) for number, content in enumerate(texts)}
    return {"README.md": b"# Texts\n", **files}


def as_files(texts, tokenizer, folder):
    """Hashes of what the same texts give from files on disk."""
    for number, content in enumerate(texts):
        (folder / f"{number}.jsonl").write_bytes(jsonl(content))
    run(folder / "*.jsonl", folder / "local", tokenizer)
    return hashes(folder / "local", (".bin", ".idx"))


@pytest.fixture
def hub():
    with serve(files_of(TEXTS)) as server:
        yield server


def tokenize(address, tokenizer, folder, *options, name=NAME):
    words = ["prepare", "tokenize", "--dataset", name, "--tokenizer", str(tokenizer), "--output", str(folder / "out"), "--workers", "1"]
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and not key.lower().endswith("_proxy")}
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}
    script = folder / "command.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WITHOUT_WAITING}")
    command = [sys.executable, str(script), *words, "--valid-fraction", "0", *options]
    return subprocess.run(command, env=kept | settings, capture_output=True, text=True, timeout=300)


def test_a_dataset_of_the_hub_is_its_shards(hub, tokenizer, tmp_path):
    done = tokenize(hub.address, tokenizer, tmp_path, "--dataset-revision", "main")
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out", (".bin", ".idx")) == as_files(TEXTS, tokenizer, tmp_path)
    parts = [json.loads((tmp_path / "out" / f"part-{number:05d}.json").read_text()) for number in range(3)]
    assert [part["source"]["name"] for part in parts] == [f"hf://{NAME}/default/train@main#{number}" for number in range(3)]
    assert (tmp_path / "out" / "plan.json").exists() and "trying again" not in done.stderr


def test_connections_that_break_lose_and_double_no_document(tokenizer, tmp_path):
    """huggingface_hub tries a request 6 times; what it gives up is begun again by us, behind the rows that are here.

    The second shard takes three requests, and rows come from it before the third.
    """
    source = random.Random(0)
    texts = [TEXTS[0], [*TEXTS[1], *(base64.b64encode(source.randbytes(6000)).decode() for _ in range(1900))]]
    files = files_of(texts)
    assert 2 * PIECE < len(files["data/train-1.jsonl.gz"]) < 3 * PIECE
    with serve(files) as hub:
        hub.breaks = {("data/train-0.jsonl.gz", 0): 2, ("data/train-1.jsonl.gz", 2): 14}
        done = tokenize(hub.address, tokenizer, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "out", (".bin", ".idx")) == as_files(texts, tokenizer, tmp_path)
    again = [line for line in done.stderr.splitlines() if "; trying again in" in line]
    assert len(again) == 2 and all(f"hf://{NAME}/default/train@main#1: " in line for line in again), done.stderr
    assert int(again[0].rsplit("(row ")[1].rstrip(")")) > 100 and "trying again in 2 s" in again[0]
    assert [hub.asked.count(("data/train-1.jsonl.gz", piece)) for piece in range(3)] == [3, 3, 14 + 1]


def test_a_shard_that_cannot_be_read_keeps_the_others_and_is_continued(hub, tokenizer, tmp_path):
    hub.breaks = {("data/train-1.jsonl.gz", 0): 1000}
    done = tokenize(hub.address, tokenizer, tmp_path)
    assert done.returncode == 2
    assert (
        f"hf://{NAME}/default/train@main#1 cannot be read" in done.stderr
        and "tried 6 times after 0 rows: check the name and" in done.stderr
    )
    for seconds in (2, 4, 8, 16, 32):
        assert f"trying again in {seconds} s (row 1)" in done.stderr and f"pause of {seconds} s" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["part-00000.json", "plan.json"]
    assert not list((tmp_path / "out").glob(".*"))
    hub.breaks = {}
    done = tokenize(hub.address, tokenizer, tmp_path)
    assert done.returncode == 0 and "all 3 parts of shard 0/1 are finished (1 were there)" in done.stdout, done.stderr
    assert hashes(tmp_path / "out", (".bin", ".idx")) == as_files(TEXTS, tokenizer, tmp_path)


def test_a_name_that_the_hub_does_not_know_is_an_error_at_once(hub, tokenizer, tmp_path):
    done = tokenize(hub.address, tokenizer, tmp_path, name="someone/else")
    assert done.returncode == 2 and "trying again" not in done.stderr
    assert "error: dataset someone/else cannot be read (DatasetNotFoundError: " in done.stderr
    assert "check its name, files and your rights to them" in done.stderr and not (tmp_path / "out").exists()


def test_no_hub_at_all(tokenizer, tmp_path):
    with serve({}) as server:
        address = server.address  # of nobody, from now on
    done = tokenize(address, tokenizer, tmp_path)
    assert done.returncode == 2
    assert f"error: dataset {NAME} cannot be read (ConnectionError: " in done.stderr and "tried 6 times after 0 rows" in done.stderr
    assert "Files on disk go to --input" in done.stderr
