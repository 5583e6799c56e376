"""Ids of the compiled encoder are SentencePiece's, for every kind of model."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from data_prep import native_encoder
from data_prep.native_encoder import PROBES, Encoder, compile_model
from tests.unit.data_prep.encoder_samples import (
    ADVERSARIAL,
    ODD,
    SPACES,
    corpus,
    differences,
    documents,
    fragments,
    needs_extension,
    processor,
    train,
)

pytest_plugins = ("encoder_fixtures",)

FEW, MANY = 3_000, 50_000


@needs_extension
@pytest.mark.parametrize("name", ["own", "mistral", "unigram"])
def test_ids_are_those_of_sentencepiece(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    assert Encoder(model, name).native
    assert differences(model, [*ADVERSARIAL, *documents(model, FEW), *corpus(200_000)]) == []


@needs_extension
@pytest.mark.slow
@pytest.mark.parametrize("name", ["own", "mistral", "unigram"])
def test_ids_are_those_of_sentencepiece_on_many_documents(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    assert differences(model, list(documents(model, MANY, seed=1))) == []


VARIANTS: dict[str, dict[str, object]] = {
    "defaults of the trainer": {},
    "no byte fallback": {"byte_fallback": False},
    "no byte fallback, many unknown characters": {"byte_fallback": False, "character_coverage": 0.98},
    "no byte fallback, no prefix": {"byte_fallback": False, "add_dummy_prefix": False},
    "Llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "nfkc and case folding": {"normalization_rule_name": "nmt_nfkc_cf"},
    "nfkc, spaces kept": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "identity, spaces removed": {"normalization_rule_name": "identity", "add_dummy_prefix": False},
    "suffix": {"treat_whitespace_as_suffix": True},
    "suffix, spaces kept": {"treat_whitespace_as_suffix": True, "remove_extra_whitespaces": False, "normalization_rule_name": "identity"},
    "pieces of several words": {"split_by_whitespace": False, "max_sentencepiece_length": 24},
    "pieces of several words, spaces kept": {
        "split_by_whitespace": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True,
    },
    "pieces of several scripts": {"split_by_unicode_script": False, "split_by_number": False},
    "user-defined symbols": {
        "user_defined_symbols": ["<sep>", "<", "the", "\u2581\u2581", "\u2581a", "ing\u2581", "\u212b", "\ufb01x", "e\u0301", "a b"],
    },
    "user-defined symbols, spaces kept": {
        "user_defined_symbols": ["<sep>", "<s", "the", "\u2581\u2581\u2581", "\u2581a", "ing\u2581", "\n\n", "0", "\u6f22"],
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": False,
    },
    "control symbols": {"control_symbols": ["<sep>", "qu", "##"], "byte_fallback": False},
}


@needs_extension
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_model(name: str, kind: str, small: list[str]) -> None:
    model = train(small, **VARIANTS[name], model_type=kind)
    symbols = [str(symbol).replace("\u2581", " ") for symbol in VARIANTS[name].get("user_defined_symbols", [])]  # type: ignore[attr-defined]
    texts = ["".join(random.Random(i).choices([*symbols, " ", "a", "fi", "qq", "x"], k=12)) for i in range(200)]
    encoder = Encoder(model, name)
    if kind == "unigram" and symbols:
        assert encoder.reason == "a unigram model with user-defined symbols"
        return
    assert encoder.native, encoder.reason
    assert differences(model, [*texts, *(text[:5000] for text in ADVERSARIAL), *documents(model, 400)]) == []


@needs_extension
def test_equal_scores_and_pieces_that_cannot_be_reached(own: bytes) -> None:
    """Merges of equal rank go from left to right; a piece whose parts are no pieces is made of characters or not at all; a lone space is
    unknown, and becomes the bytes of U+2581."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(own)
    source = random.Random(2)
    for piece in proto.pieces:
        if piece.type == native_encoder.NORMAL and len(piece.piece) > 1:
            piece.score = -float(source.randrange(5))
    kept = [piece for piece in proto.pieces if piece.type != native_encoder.NORMAL or piece.piece not in ("e", "\u2581")]
    del proto.pieces[:]
    proto.pieces.extend(piece for piece in kept if len(piece.piece) != 2 or source.random() < 0.7)
    model = proto.SerializeToString()
    assert differences(model, [*(text[:2000] for text in ADVERSARIAL), *documents(model, 1000)]) == []


@needs_extension
@pytest.mark.parametrize("name", ["own", "unigram"])
def test_hypothesis_finds_no_difference(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    encoder, reference, pieces = compile_model(model), processor(model), fragments(model)
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
    joined = st.lists(st.one_of(text, st.sampled_from(pieces), st.sampled_from(SPACES + ODD)), max_size=15).map("".join)

    @settings(max_examples=400, deadline=None, database=None, derandomize=True)
    @given(joined)
    def check(sample: str) -> None:
        assert encoder.encode([sample], 1)[0].tolist() == reference.encode(sample)

    check()


@needs_extension
def test_a_naive_split_is_caught(own: bytes) -> None:
    naive = compile_model(own, split_at_every_space=True)
    assert differences(own, list(corpus(200_000)), naive), "plain documentation has indented lines"
    assert differences(own, list(documents(own, FEW)), naive)
    assert any(naive.encode([text], 1)[0].tolist() != processor(own).encode(text) for text in PROBES)


@needs_extension
def test_a_naive_split_of_mistrals_model_is_caught(mistral: bytes) -> None:
    naive = compile_model(mistral, split_at_every_space=True)
    assert differences(mistral, list(corpus(200_000)), naive) and differences(mistral, list(documents(mistral, FEW)), naive)
