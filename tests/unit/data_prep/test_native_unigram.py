"""Where unigram models need care: roundings, equal sums, sums that are counted anew, other releases."""

from __future__ import annotations

import itertools
import random

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from data_prep import native_encoder
from data_prep.native_encoder import PROBES, Encoder, compile_model
from tests.unit.data_prep.encoder_samples import ADVERSARIAL, differences, documents, needs_extension, processor, unigram_of

pytest_plugins = ("encoder_fixtures",)


@needs_extension
@pytest.mark.parametrize("letters", ["abcdefghijklmnopqrstuvwxyz", "aeiou nrst", "a ", ".,;:!? \n", "qxz\u00fc\u6f22\u0416"])
def test_sums_of_long_texts_are_rounded_as_sentencepiece_does(unigram: bytes, letters: str) -> None:
    """Without structure, nearly equal splits are frequent, and which one wins depends on the last bit of sums down to -910,000."""
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
@pytest.mark.parametrize(
    ("scores", "text"),
    [
        ({"A": -200000.0, "AAAA": -1.0, "B": -1.0, "C": -1.0, "BC": -2.001, "z": -1.0}, "AAAABC"),
        ({"x": -20.0, "x" * 7000: -1.0, "b": -1.0, "c": -1.0, "bc": -2.001, "z": -19.0}, "x" * 7000 + "bc"),
        ({"A": -3e38, "AAAA": -1.0, "B": -1.0, "C": -1.0, "BC": -2.001, "z": -1.0}, "AAAABCAABC" * 3),
    ],
)
def test_sums_that_are_very_high_or_infinite(scores: dict[str, float], text: str) -> None:
    """A long piece that was begun before sums were counted anew stands far above 0 after it: then, too, they are counted anew."""
    model = unigram_of(scores)
    assert differences(model, [text, text[:-1], text * 2, "z" + text]) == []


@needs_extension
def test_random_scores_of_every_size() -> None:
    """Few letters, so that most splits compete; sums that leave the range within a few characters, and ties."""
    source = random.Random(7)
    for size in (1.0, 1e3, 4e4, 3e5, 1e30, 3e38) * 12:
        pieces = dict.fromkeys("abc", 0.0) | {"".join(source.choices("abc", k=source.randint(2, 7))): 0.0 for _ in range(12)}
        scores = {piece: -size * source.choice([source.random(), 1.0, 0.25, 1e-5]) for piece in pieces}
        model = unigram_of(scores)
        texts = ["".join(source.choices("abc" if number % 4 else "abcd", k=60)) for number in range(60)]
        assert differences(model, texts) == [], (size, scores)


@needs_extension
def test_older_releases_encode_for_themselves(unigram: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece, "__version__", "0.2.1")
    encoder = Encoder(unigram, "unigram")
    assert encoder.reason == "SentencePiece before 0.2.2 rounds a unigram's sums in another way"
    monkeypatch.setattr(sentencepiece, "__version__", "0.2.2")
    assert Encoder(unigram, "unigram").native


@needs_extension
def test_a_vocabulary_of_all_strings_is_loaded_in_its_time() -> None:
    """88,572 pieces over three letters, a trie whose nodes nearly all have three children. Looking at every hole took minutes of visits."""
    pieces = ["".join(letters) for length in range(1, 11) for letters in itertools.product("abc", repeat=length)]
    model = unigram_of({piece: -1.5 * len(piece) - 1 for piece in pieces})
    texts = ["".join(random.Random(seed).choices("abc", k=300)) for seed in range(50)]
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
