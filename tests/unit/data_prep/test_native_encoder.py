"""The encoder around the compiled one: when it is used, in which threads, and what it refuses."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from data_prep import native_encoder
from data_prep.native_encoder import UNUSED, Encoder, NotNativeError, compile_model, load_encoder
from poet_megatron.errors import UserError
from tests.unit.data_prep.encoder_samples import ADVERSARIAL, documents, needs_extension, processor, train

pytest_plugins = ("encoder_fixtures",)


@needs_extension
def test_an_encoder_that_fails_its_probes_is_not_used(own: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_encoder, "compile_model", lambda model: compile_model(model, split_at_every_space=True))
    encoder = Encoder(own, "own")
    assert not encoder.native and "other ids than SentencePiece for" in encoder.reason
    assert encoder.encode("a   b").tolist() == processor(own).encode("a   b")


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


@needs_extension
@pytest.mark.parametrize("replacement", [b"x\xf0", b"\xf0\x9f", b"\xc3x", b"\x80x", b"\xed\xa0", b"\xffx"])
def test_strings_that_are_not_utf8_are_refused(replacement: bytes, tmp_path: Path) -> None:
    """SentencePiece takes such a map, and such pieces, and encodes with them."""
    (tmp_path / "rule.tsv").write_text("71\t100\n72\t78 79\n")
    rules = {"normalization_rule_tsv": str(tmp_path / "rule.tsv"), "model_type": "unigram", "byte_fallback": False}
    proto = sentencepiece_model_pb2.ModelProto.FromString(train(["qrab ba ab aab xy", "abab xy xy \u0100"] * 50, 12, **rules))
    whole = proto.normalizer_spec.precompiled_charsmap
    proto.normalizer_spec.precompiled_charsmap = whole.replace(b"\xc4\x80\0", replacement + b"\0")
    assert proto.normalizer_spec.precompiled_charsmap != whole
    encoder = Encoder(proto.SerializeToString(), "model")
    assert "its strings are not UTF-8" in encoder.reason
    assert encoder.encode("ab").tolist() == processor(proto.SerializeToString()).encode("ab")
    proto.normalizer_spec.precompiled_charsmap = whole
    content = proto.SerializeToString()
    piece = proto.pieces[-1].piece.encode()
    damaged = content.replace(b"\x0a" + bytes([len(piece)]) + piece, b"\x0a" + bytes([len(piece)]) + b"\xff" * len(piece), 1)
    assert damaged != content
    encoder = Encoder(damaged, "model")
    assert encoder.reason == "the model has a piece that is not UTF-8"
    assert encoder.encode("ab").tolist() == processor(damaged).encode("ab")


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
