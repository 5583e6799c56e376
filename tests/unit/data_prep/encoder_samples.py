"""Models, and texts made to find a difference between the compiled encoder and SentencePiece."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep import native_encoder
from data_prep.corpus import embedded_documents
from data_prep.native_encoder import PROBES, compile_model

needs_extension = pytest.mark.skipif(native_encoder.extension() is None, reason="poet_megatron._text was not built")

SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\u2581", "\u2581\u2581", " \u2581 ", "\u00a0", "\u3000", "\u2003", "\u200b", "\ufeff"]
ODD = [
    "\x00", "\x01", "\x0b", "\x7f", "\x85", "\u0301", "\u0308\u0301", "e\u0301", "\u212b", "\ufb01", "\u2460", "\ufdfa", "\u1e9b\u0323",
    "\uac00", "\u1100\u1161\u11a8", "\u05e9\u05dc\u05d5\u05dd", "\u0627\u0644\u0633\u0644\u0627\u0645", "\u202e\u200f", "\u0e01\u0e33",
    "\u0915\u094d", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\ufe0f", "\U0010ffff",
    "\ud7ff", "\ufffd", "\ufffe", "\ue000", "\U000e0041", "\u6f22\u5b57", "\uff21\uff22", "\u4ea4\u3058\u308a", "\U00020000",
    "<s>", "</s>", "<unk>", "<0x0A>",
]  # fmt: skip
ADVERSARIAL = [
    *("", " ", " " * 1000, "\n" * 500, "\t" * 77, "\x00" * 9, "\u2581" * 100, " \u2581" * 50, "\u0301" * 40, "a" * 100_000),
    *("ab" * 50_000, "\u6f22" * 30_000, "\U0001f600" * 10_000, "x" + " " * 50_000 + "y", "e\u0301" * 20_000, "." * 40_001),
    *("".join(chr(c) for c in range(1, 0x3000)), "".join(chr(c) for c in range(0x3000, 0x11000) if not 0xD800 <= c < 0xE000)),
    "".join(random.Random(5).choices("abcdefghijklmnopqrstuvwxyz", k=100_000)),
    "\n".join(" " * i + "x" for i in range(120)),
    *("".join(ODD), " ".join(ODD), "".join(SPACES), "x".join(SPACES)),
    *PROBES,
]


@functools.cache
def corpus(limit: int) -> list[str]:
    """The first `limit` bytes of the standard library's documentation, with some words of other scripts."""
    texts, used = [], 0
    for number, text in enumerate(embedded_documents()):
        used += len(text)
        if used > limit:
            break
        odd = ODD[number % len(ODD)]
        texts.append(f"{text}\n\n  {odd} \u00fcber na\u00efve \u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u6f22\u5b57\u304b\u306a")
    return texts


def train(texts: Iterable[str], vocab_size: int = 1000, **options: object) -> bytes:
    """A model of SentencePiece's own trainer, by default with its own defaults."""
    model = io.BytesIO()
    options = {"model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1, "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **options)
    return model.getvalue()


def unigram_of(scores: dict[str, float]) -> bytes:
    """A unigram model of these pieces that leaves texts as they are."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.trainer_spec.model_type = native_encoder.UNIGRAM
    proto.normalizer_spec.add_dummy_prefix = proto.normalizer_spec.remove_extra_whitespaces = False
    for piece, kind in (("<unk>", native_encoder.UNKNOWN), ("<s>", native_encoder.CONTROL), ("</s>", native_encoder.CONTROL)):
        proto.pieces.add(piece=piece, score=0.0, type=kind)
    for piece, score in scores.items():
        proto.pieces.add(piece=piece, score=score, type=native_encoder.NORMAL)
    return proto.SerializeToString()


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    loaded = sentencepiece.SentencePieceProcessor()
    loaded.LoadFromSerializedProto(model)
    return loaded


def fragments(model: bytes) -> list[str]:
    """The model's pieces as they stand in texts: what it is made of finds its edges."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    return [piece.piece.replace("\u2581", " ") for piece in proto.pieces]


def documents(model: bytes, count: int, seed: int = 0) -> Iterator[str]:
    """Texts of pieces, words, odd characters and any characters, joined and cut at random."""
    source, pieces = random.Random(seed), fragments(model)
    spaced = [piece for piece in pieces if "  " in piece or piece.startswith(" ")] or pieces
    words = " ".join(corpus(200_000)).split(" ")

    def anything() -> str:
        top = source.choice([0x80, 0x250, 0x800, 0x3000, 0xD800, 0x20000, 0x110000])
        return "".join(chr(c) for c in (source.randrange(top) for _ in range(source.randrange(1, 9))) if not 0xD800 <= c < 0xE000)

    kinds = [
        lambda: source.choice(pieces),
        lambda: source.choice(spaced),
        lambda: source.choice(pieces)[source.randrange(3) :],
        lambda: source.choice(words) + source.choice(["", " ", ". ", "\n"]),
        lambda: source.choice(SPACES) * source.choice([1, 1, 2, 3, 7, 16]),
        lambda: source.choice(ODD),
        lambda: source.choice("aeiou .,0") * source.randrange(1, 60),
        anything,
    ]
    for _ in range(count):
        weights = [source.random() ** 3 for _ in kinds]
        yield "".join(kind() for kind in source.choices(kinds, weights, k=source.randrange(40)))


def differences(model: bytes, texts: list[str], encoder: object = None) -> list[str]:
    """Texts whose ids are not SentencePiece's. Encoded in one call, then in reverse: what leaks from text to text is found."""
    text = encoder or compile_model(model)
    expected = processor(model).encode(texts, num_threads=1)
    wrong = []
    for order in (range(len(texts)), range(len(texts) - 1, -1, -1)):
        ids, offsets = text.encode([texts[i] for i in order], 1)  # type: ignore[attr-defined]
        assert ids.dtype == np.int32 and offsets.dtype == np.int64 and offsets[0] == 0 and offsets[-1] == len(ids)
        rows = [ids[offsets[at] : offsets[at + 1]].tolist() for at in range(len(texts))]
        wrong += [texts[i] for i, row in zip(order, rows, strict=True) if row != expected[i]]
    return wrong
