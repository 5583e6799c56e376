import random

import pytest

from data_prep.tokenizer import load_tokenizer, train_tokenizer
from poet_megatron.errors import UserError

WORDS = ["the", "of", "matrix", "orthogonal", "training", "weight", "spectrum", "rotate", "permute", "block", "neuron", "gradient"]
TRICKY = [
    "", " a", "  a", "a  ", "\n", "\n\n\n  x\t\ty\n", "\t", "     \n      \n", "\u00fcn\u00efc\u00f6d\u00e9 \u6f22\u5b57",
    "emoji \U0001f600\U0001f469\u200d\U0001f467 x", "a\r\nb", "\x00 nul", "1234 56.7", "   ", "</s> <s> <unk> <0x0A>",
    "a" * 200, " " * 75 + "x",
    "\u00a0\u200b\ufeff", "e\u0301",
]  # fmt: skip


def texts(count=300):
    source = random.Random(0)
    return ["\n".join("  " * source.randrange(4) + " ".join(source.choices(WORDS, k=9)) + " 1234." for _ in range(4)) for _ in range(count)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(texts(), path, 400)
    return path


def random_texts(count=300):
    source = random.Random(1)
    alphabet = " \n\tabcdethe of.,'<>/s_1290\u00e9\U0001f600\u6f22\r-=#"
    return ["".join(source.choices(alphabet, k=source.randrange(60))) for _ in range(count)]


def test_every_text_survives_a_round_trip(model):
    tokenizer = load_tokenizer(model)
    for text in TRICKY + random_texts() + texts(5):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_vocabulary_and_ids(model):
    tokenizer = load_tokenizer(model)
    assert tokenizer.vocab_size == 400 and tokenizer.eos_id == 2
    assert [tokenizer._processor.unk_id(), tokenizer._processor.bos_id(), tokenizer._processor.pad_id()] == [0, 1, -1]
    assert not {0, 1, 2} & set(tokenizer.encode("</s> <s> <unk>"))
    assert len(tokenizer.encode("the matrix\n")) < 6
    assert len(tokenizer.encode("1234")) == 4  # one token per digit
    assert len(tokenizer.encode(".\n")) == 1  # newlines take part in merges


def test_training_is_deterministic_and_depends_on_the_text(model, tmp_path):
    assert train_tokenizer(texts(), tmp_path / "again.model", 400).sha256 == load_tokenizer(model).sha256
    assert train_tokenizer(texts(200), tmp_path / "other.model", 400).sha256 != load_tokenizer(model).sha256


def test_batches_and_threads_give_the_same_ids(model):
    tokenizer = load_tokenizer(model)
    expected = [tokenizer.encode(text) for text in TRICKY]
    assert tokenizer.encode_batch(TRICKY) == tokenizer.encode_batch(TRICKY, threads=2) == expected


def test_hugging_face_gives_the_same_ids(model):
    transformers = pytest.importorskip("transformers")
    fast = transformers.LlamaTokenizer.from_pretrained(
        str(model.parent), add_prefix_space=False, add_bos_token=False, split_special_tokens=True
    )
    tokenizer = load_tokenizer(model)
    for text in TRICKY + random_texts() + texts(20):
        assert fast(text)["input_ids"] == tokenizer.encode(text), repr(text)


def test_vocabulary_sizes_that_do_not_fit_the_text(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(UserError, match="vocab_size is 100; it must be at least 300"):
        train_tokenizer(texts(), path, 100)
    with pytest.raises(UserError, match=r"vocab_size is 60000; this text supports at most \d+"):
        train_tokenizer(texts(), path, 60000)
    with pytest.raises(UserError, match=r"vocab_size is 300; the characters of this text alone need \d{3}"):
        train_tokenizer(["".join(map(chr, range(0x4E00, 0x4E00 + 200)))] * 9, path, 300)
    assert not path.exists() and not list(tmp_path.iterdir())


def test_unusable_models(tmp_path):
    (tmp_path / "bad.model").write_bytes(b"no model")
    (tmp_path / "empty.model").write_bytes(b"")
    for name, message in {"bad.model": "is not a SentencePiece model", "empty.model": "is empty", "none.model": "cannot be read"}.items():
        with pytest.raises(UserError, match=message) as caught:
            load_tokenizer(tmp_path / name)
        assert name in str(caught.value)
