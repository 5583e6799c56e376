"""The compiled encoder against SentencePiece itself, on texts made to find a difference."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from data_prep import native_encoder
from data_prep.corpus import embedded_documents
from data_prep.native_encoder import PROBES, UNUSED, Encoder, NotNativeError, compile_model, load_encoder
from data_prep.tokenizer import train_tokenizer
from poet_megatron.errors import UserError

needs_extension = pytest.mark.skipif(native_encoder.extension() is None, reason="poet_megatron._text was not built")

FEW, MANY = 3_000, 50_000
MISTRAL = "POET_MISTRAL_MODEL"
"""Environment variable with the path of tokenizer.model.v1, for where the wheel mistral-common is not installed."""

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


@pytest.fixture(scope="module")
def small() -> list[str]:
    lines = [line for text in corpus(300_000) for line in text.split("\n")]
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `poet-megatron prepare train-tokenizer` makes."""
    path = tmp_path_factory.mktemp("own") / "tokenizer.model"
    train_tokenizer(corpus(2_000_000), path, 6000)
    return path.read_bytes()


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same of the other kind."""
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.model"
    train_tokenizer(corpus(2_000_000), path, 6000, model_type="unigram")
    return path.read_bytes()


@pytest.fixture(scope="module")
def mistral() -> bytes:
    named = os.environ.get(MISTRAL)
    spec = importlib.util.find_spec("mistral_common")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(named)] if named else [Path(folder) / "data" / "tokenizer.model.v1" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        pytest.skip(f"no tokenizer.model.v1: pip install mistral-common, or set {MISTRAL}")
    return path.read_bytes()


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


@needs_extension
def test_an_encoder_that_fails_its_probes_is_not_used(own: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_encoder, "compile_model", lambda model: compile_model(model, split_at_every_space=True))
    encoder = Encoder(own, "own")
    assert not encoder.native and "other ids than SentencePiece for" in encoder.reason
    assert encoder.encode("a   b").tolist() == processor(own).encode("a   b")


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


def test_other_models_are_left_to_sentencepiece(own: bytes, unigram: bytes, small: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    likely = sentencepiece_model_pb2.ModelProto.FromString(unigram)
    next(piece for piece in likely.pieces if piece.type == native_encoder.NORMAL).score = 1.0
    unused = sentencepiece_model_pb2.ModelProto.FromString(own)
    unused.pieces[1000].type = UNUSED
    spaces = sentencepiece_model_pb2.ModelProto.FromString(own)
    spaces.normalizer_spec.escape_whitespaces = False
    cases = {
        "neither BPE nor unigram": train(small, model_type="char", byte_fallback=False),
        "no logarithms of probabilities": likely.SerializeToString(),
        "unused pieces": unused.SerializeToString(),
        "U+2581": spaces.SerializeToString(),
        "'q' is a single character": train(small, control_symbols=["q"]),
    }
    texts = [text[:2000] for text in ADVERSARIAL]
    for words, model in cases.items():
        encoder = Encoder(model, "model")
        if native_encoder.extension() is not None:
            assert not encoder.native and words in encoder.reason
        batch = encoder.encode_batch(texts)
        assert batch.ids.tolist() == [token for row in processor(model).encode(texts) for token in row]
        assert batch.ids.dtype == np.int32 and batch.offsets.dtype == np.int64 and len(batch.offsets) == len(texts) + 1
        assert encoder.encode_batch([]).offsets.tolist() == [0]
    monkeypatch.setattr(native_encoder, "extension", lambda: None)
    with pytest.raises(NotNativeError, match="was not built"):
        compile_model(own)
    assert Encoder(own, "own").reason == "poet_megatron._text was not built"


@needs_extension
def test_damaged_character_maps_are_refused(small: list[str]) -> None:
    proto = sentencepiece_model_pb2.ModelProto.FromString(train(small))
    for damage in (b"\x00", b"\x05\x00\x00\x00abcdefgh", b"\xff\xff\xff\x7f" + bytes(8), bytes(12), b"\x04\x00\x00\x00abcdxy"):
        proto.normalizer_spec.precompiled_charsmap = damage
        with pytest.raises(NotNativeError, match="damaged character map"):
            compile_model(proto.SerializeToString())


@pytest.mark.parametrize("native", [True, False])
def test_lone_surrogates_are_refused_by_both(own: bytes, native: bool) -> None:
    encoder = Encoder(own, "own", native)
    for text in ("\ud800", "a\udfffb"):
        with pytest.raises(UnicodeEncodeError):
            encoder.encode(text)
    assert encoder.encode("a").tolist() == processor(own).encode("a")


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["own", "unigram"])
def test_threads_and_batches_change_nothing(name: str, native: bool, own: bytes, request: pytest.FixtureRequest) -> None:
    encoder = Encoder(request.getfixturevalue(name), name, native)
    texts = [*documents(own, 300), "", "a" * 30_000, *[""] * 5]
    expected = [encoder.encode(text).tolist() for text in texts]
    for threads in (1, 2, 3, 7, 400):
        ids, offsets = encoder.encode_batch(texts, threads)
        assert [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)] == expected
    for sizes in ((10_000, 10_000, 40_000), (40_000, 10, 10), (10, 10, 40_000), (9000, 9000, 9000, 9000)):  # more threads than shares
        texts = [chr(97 + number) * size for number, size in enumerate(sizes)]
        expected = encoder.encode_batch(texts)
        for threads in (2, 3, 4, 9):
            found = encoder.encode_batch(texts, threads)
            assert found.ids.tolist() == expected.ids.tolist() and found.offsets.tolist() == expected.offsets.tolist()
    assert encoder.encode_batch([""] * 9, 4).offsets.tolist() == [0] * 10
    assert encoder.encode_batch(["x"], 4).ids.tolist() == encoder.encode("x").tolist()


@needs_extension
def test_one_encoder_serves_several_python_threads(own: bytes) -> None:
    encoder, texts = Encoder(own, "own"), list(documents(own, 400))
    expected = encoder.encode_batch(texts).ids.tolist()
    found: list[list[int]] = []
    workers = [threading.Thread(target=lambda: found.append(encoder.encode_batch(texts, 2).ids.tolist())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [expected] * 4


@needs_extension
def test_other_threads_run_meanwhile(own: bytes) -> None:
    """The GIL is free while texts are encoded: another thread counts on."""
    encoder, texts = Encoder(own, "own"), ["".join(random.Random(3).choices("abcdefgh ", k=400_000))] * 20
    encoder.encode("x")
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)  # with the GIL held, the other thread would wait this long at least
    other = threading.Thread(target=count)
    try:
        other.start()
        before = counted[0]
        encoder.encode_batch(texts)
        assert counted[0] > before
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)


@needs_extension
def test_other_types_are_refused(own: bytes) -> None:
    encoder = Encoder(own, "own")
    for wrong in ([b"a"], [None], ["a", 1]):
        with pytest.raises(TypeError, match="texts must be strings"):
            encoder.encode_batch(wrong)  # type: ignore[arg-type]


def test_files_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("no model")
    for name, words in {"missing": "cannot be read", "empty": "is empty", "text": "is not a SentencePiece model"}.items():
        with pytest.raises(UserError, match=words):
            load_encoder(tmp_path / name)


def test_what_a_manifest_needs(own: bytes, tmp_path: Path) -> None:
    (tmp_path / "m").write_bytes(own)
    encoder = load_encoder(tmp_path / "m", native=False)
    assert not encoder.native and encoder.reason == "not wanted" and encoder.vocab_size == processor(own).vocab_size()
    assert len(encoder.sha256) == 64
