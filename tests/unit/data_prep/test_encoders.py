import base64
import sys

import numpy as np
import pytest

from data_prep import encoders
from data_prep.indexed import token_dtype
from data_prep.settings import Settings
from data_prep.tokenizer import load_tokenizer
from poet_megatron.errors import UserError
from tests.unit.data_prep.tokenize_samples import make_texts, make_tokenizer

TRICKY = ["a\n\n b\t\tc  d\n", "  lead", "trail  \n\n\n", "\r\n", "x", "\u65e5\u672c \U0001f600\u0301", "</s><s>", "a" * 5000]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_trained_models_keep_whitespace_and_encode_bytes(tmp_path, model_type):
    encoder = encoders.load(make_tokenizer(tmp_path, model_type=model_type, vocab_size=310))
    ids, offsets = encoder.encode_batch(TRICKY)
    assert ids.dtype == np.int32 and len(offsets) == len(TRICKY) + 1
    for i, text in enumerate(TRICKY):
        assert encoder.decode(ids[offsets[i] : offsets[i + 1]]) == text
    assert (encoder.eos_id, encoder.bos_id, encoder.vocab_size) == (2, 1, 310)


def test_ids_are_those_of_sentencepiece_with_and_without_the_compiled_encoder(tmp_path):
    path = make_tokenizer(tmp_path)
    texts = TRICKY + make_texts(50)
    expected = [load_tokenizer(path).encode(text) for text in texts]
    for native in (True, False):
        ids, offsets = encoders.load(path, native=native).encode_batch(texts)
        assert [ids[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == expected


def hugging_face(path, names=("</s>",), extra=0):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=list(names), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(make_texts(300), trainer)
    if extra:
        tokenizer.add_tokens([f"extra{i}" for i in range(extra)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(path))
    return tokenizer


def test_a_tokenizer_json_is_used_without_its_truncation(tmp_path):
    hugging_face(tmp_path / "tokenizer.json")
    encoder = encoders.load(tmp_path / "tokenizer.json")
    texts = [text for text in TRICKY if "</s>" not in text]
    ids, offsets = encoder.encode_batch(texts)
    assert [encoder.decode(ids[a:b]) for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == texts
    assert encoder.eos_id == 0 and encoder.bos_id == -1 and encoder.engine == "tokenizers"


def test_special_tokens_of_a_tokenizer_json_must_be_clear(tmp_path):
    path = tmp_path / "tokenizer.json"
    hugging_face(path, ("</s>", "<|endoftext|>"))
    with pytest.raises(UserError, match=r"has </s> and <\|endoftext\|>: say with --eos-token which one to use"):
        encoders.load(path)
    assert encoders.load(path, eos_token="<|endoftext|>").eos_id == 1
    with pytest.raises(UserError, match=r"--eos-token '<end>' is not in the vocabulary of .*: check its spelling"):
        encoders.load(path, eos_token="<end>")
    hugging_face(path, ())
    encoder = encoders.load(path)
    with pytest.raises(UserError, match=r"has no end-of-sequence token: name it with --eos-token, or give --no-eos"):
        Settings(tokenizer=str(path)).check(encoder)
    with pytest.raises(UserError, match=r"has no begin-of-sequence token: name it with --bos-token, or leave out --bos"):
        Settings(tokenizer=str(path), eos=False, bos=True).check(encoder)
    Settings(tokenizer=str(path), eos=False).check(encoder)


def test_more_than_65535_tokens_are_stored_as_int32(tmp_path):
    hugging_face(tmp_path / "tokenizer.json", extra=66_000)
    encoder = encoders.load(tmp_path / "tokenizer.json")
    ids, _ = encoder.encode_batch(["extra65999"])
    assert encoder.vocab_size > 65_535 and ids.tolist() == [encoder.vocab_size - 1] and token_dtype(encoder.vocab_size) is np.int32


def test_a_tiktoken_file(tmp_path):
    ranks = [bytes([byte]) for byte in range(256)] + [b"th", b"the"]
    (tmp_path / "small.tiktoken").write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(ranks)))
    encoder = encoders.load(tmp_path / "small.tiktoken")
    ids, offsets = encoder.encode_batch(["the\n\nx", "\u65e5"])
    assert ids[: offsets[1]].tolist() == [257, 10, 10, 120] and encoder.eos_id == 258 and encoder.vocab_size == 259
    assert encoder.decode(ids[offsets[1] :]) == "\u65e5"


def test_tiktoken_not_installed(tmp_path, monkeypatch):
    (tmp_path / "a.tiktoken").write_text("x")
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match=r"needs the tiktoken package: pip install 'poet-megatron\[data\]'"):
        encoders.load(tmp_path / "a.tiktoken")


def test_a_file_that_is_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer.json is not a tokenizer.json .*give the file of a Hugging Face fast tokenizer"):
        encoders.load(tmp_path / "tokenizer.json")
    (tmp_path / "empty.model").touch()
    with pytest.raises(UserError, match=r"empty.model is empty \(0 bytes\): copy it again"):
        encoders.load(tmp_path / "empty.model")
    with pytest.raises(UserError, match=r"cannot be read \(No such file or directory\): check --tokenizer"):
        encoders.load(tmp_path / "missing.model")
