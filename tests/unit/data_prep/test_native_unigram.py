"""Where unigram models need care: roundings, equal sums and sums that are counted anew."""

from __future__ import annotations

import random

import pytest
from sentencepiece import sentencepiece_model_pb2

from data_prep import native_encoder
from data_prep.native_encoder import PROBES, Encoder, compile_model
from tests.unit.data_prep.encoder_samples import ADVERSARIAL, differences, documents, needs_extension, processor, unigram_of

pytest_plugins = ("encoder_fixtures",)


@needs_extension
@pytest.mark.parametrize("letters", ["abcdefghijklmnopqrstuvwxyz", "aeiou nrst", "a ", ".,;:!? \n", "qxz\u00fc\u6f22\u0416"])
def test_sums_of_long_texts_are_rounded_as_sentencepiece_does(unigram: bytes, letters: str) -> None:
    """Without structure, nearly equal splits are frequent, and which one wins depends on the last bit of sums down to -600,000."""
    texts = ["".join(random.Random(seed).choices(letters, k=60_000)) for seed in range(4)]
    assert differences(unigram, texts) == []


@needs_extension
def test_equal_scores_of_a_unigram(unigram: bytes) -> None:
    """Whole numbers make splits of the same score: the one with the longest last piece is taken. Some characters are in pieces only."""
    proto, source = sentencepiece_model_pb2.ModelProto.FromString(unigram), random.Random(2)
    for piece in proto.pieces:
        if piece.type == native_encoder.NORMAL:
            piece.score = -float(len(piece.piece) + source.randrange(2))
    kept = [piece for piece in proto.pieces if piece.type != native_encoder.NORMAL or piece.piece not in ("e", "\u2581", "\u6f22")]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    model = proto.SerializeToString()
    assert Encoder(model, "model").native
    assert differences(model, [*(text[:2000] for text in ADVERSARIAL), *documents(model, 1000)]) == []


@needs_extension
def test_where_a_unigram_counts_anew() -> None:
    """Sums are -1000 for every x. "ab" is 0.003 worse than "a b", which is lost in them: "ab" is taken, except in a new count."""
    scores = {"x": -1000.0, "a": -1.0, "b": -1.0, "ab": -2.003, "\u2581": -1e-3}
    counts, model = (1, 50, 89, 90, 91, 95, 99, 100, 101, 102, 150, 199, 200, 201, 202, 300), unigram_of(scores)
    texts = ["x" * count + "ab" for count in counts]
    assert {len(row) - count for row, count in zip(processor(model).encode(texts), counts, strict=True)} == {1, 2}, "some of either kind"
    assert Encoder(model, "model").native
    assert differences(model, texts) == []


@needs_extension
def test_a_long_piece_over_the_place_where_a_unigram_counts_anew() -> None:
    """It was begun in the old count and ends in the new one."""
    scores = {**dict.fromkeys("xabcdefghijkl", -1000.0), "abcdefghijkl": -1500.0, "\u2581": -1e-3}
    texts = ["x" * count + "abcdefghijkl" * repeats for count in range(95, 106) for repeats in (1, 2)]
    model = unigram_of(scores)
    assert any(len(row) == 102 for row in processor(model).encode(texts)), "the long piece is the last of 102"
    assert differences(model, texts) == []


@needs_extension
def test_a_unigram_encoder_that_fails_its_probes_is_not_used(unigram: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one whose scores are so little off that no short text shows it. (Other roundings, as SentencePiece 0.2.0 has, show too.)"""
    proto = sentencepiece_model_pb2.ModelProto.FromString(unigram)
    for piece in proto.pieces:
        if piece.type == native_encoder.NORMAL:
            piece.score -= 0.1 * (len(piece.piece) % 2)
    almost = compile_model(proto.SerializeToString())
    assert [text for text in PROBES if almost.encode([text], 1)[0].tolist() != processor(unigram).encode(text)] == []
    monkeypatch.setattr(native_encoder, "compile_model", lambda model: almost)
    encoder = Encoder(unigram, "unigram")
    assert not encoder.native and "other ids than SentencePiece for" in encoder.reason and len(encoder.reason) < 200
