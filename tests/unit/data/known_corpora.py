"""Corpora whose every token a test knows: what stands in for prepared folders where no tokenizer is needed."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import numpy as np

from data_prep.indexed import IndexedWriter
from poet_megatron.data.corpora import Corpus

EOS = 2
SEQ = 6


def make_documents(count, start=10, longest=11):
    """`count` documents of 2 to `longest` tokens; each has a first token of its own, so that one can be told from another."""
    return [[start + number, *(5 + (number + place) % 4 for place in range(number % (longest - 1))), EOS] for number in range(count)]


def write_corpus(folder, documents, weight=1.0):
    """Write `documents` as a training split and open it."""
    folder.mkdir(parents=True)
    with IndexedWriter(folder / "train", np.uint16) as writer:
        for document in documents:
            writer.add(document)
    tokens = sum(len(document) for document in documents)
    counts = SimpleNamespace(bin_sha256=hashlib.sha256(repr(documents).encode()).hexdigest(), documents=len(documents), tokens=tokens)
    manifest = SimpleNamespace(splits={"train": counts}, tokenizer_sha256="0" * 64)
    facts = {"manifest": manifest, "vocab_size": 1000, "eos_id": EOS, "train_tokens": tokens}
    return Corpus(SimpleNamespace(path=folder, train_prefix=folder / "train", **facts), weight)


def expected_sample(document, seq_length=SEQ):
    """(tokens, labels, loss_mask) of a document by the reference protocol, written out: cut before its last token, then filled up."""
    kept = document if len(document) <= seq_length else document[: seq_length - 1] + document[-1:]
    filled = kept + [None] * (seq_length - len(kept))
    tokens = [0 if place >= len(kept) - 1 else filled[place] for place in range(seq_length)]
    labels = [filled[place + 1] if place + 1 < len(kept) else 0 for place in range(seq_length)]
    return tuple(tokens), tuple(labels), tuple(float(place + 1 < len(kept)) for place in range(seq_length))


def as_tuple(sample):
    return tuple(tuple(sample[key].tolist()) for key in ("tokens", "labels", "loss_mask"))
