"""Inputs and helpers for the tests of `prepare tokenize`."""

import gzip
import hashlib
import json
import random

from data_prep.settings import Settings
from data_prep.sources import find_files
from data_prep.tokenizer import train_tokenizer
from data_prep.tokenizing import tokenize

WORDS = [
    "the",
    "of",
    "matrix",
    "orthogonal",
    "training",
    "weight",
    "spectrum",
    "rotate",
    "permute",
    "block",
    "gr\u00fcn",
    "\u65e5\u672c",
    "\U0001f600",
]


def make_texts(count, seed=0, words=30):
    source = random.Random(seed)
    return [f"{seed}.{i}\n" + " ".join(source.choices(WORDS, k=source.randint(1, words))) + ".\n" for i in range(count)]


def make_tokenizer(folder, **settings):
    path = folder / "tokenizer.model"
    train_tokenizer(make_texts(300), path, **{"vocab_size": 400, **settings})
    return path


def jsonl(texts):
    return "".join(json.dumps({"text": text, "url": ""}) + "\n" for text in texts).encode()


def write_corpus(folder, files=4, documents=50, words=30):
    """Gzipped files like C4's; returns the glob and the texts of each."""
    texts = [make_texts(documents, seed, words) for seed in range(files)]
    for number, content in enumerate(texts):
        (folder / f"c4-train.{number:05d}.json.gz").write_bytes(gzip.compress(jsonl(content), mtime=0))
    return str(folder / "*.json.gz"), texts


def run(pattern, output, tokenizer, workers=1, strict=False, shard=None, **settings):
    options = {"valid_fraction": 0.0, **settings}
    return tokenize(
        find_files([str(pattern)]), output, Settings(tokenizer=str(tokenizer), **options), workers=workers, strict=strict, shard=shard
    )


def hashes(folder, endings=(".bin", ".idx", ".json")):
    """SHA-256 of every file of a folder; what is hidden shows up too."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir()) if path.name.endswith(endings)}


def part(folder, number=0):
    return json.loads((folder / f"part-{number:05d}.json").read_text())
