"""A tokenizer.json and a .tiktoken file, exported and opened by transformers, give the ids that the data has."""

from __future__ import annotations

import base64
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from data_prep import encoders
from data_prep.tokenizer_file import read_tokenizer
from poet_megatron.checkpoint import hf_other_tokenizers
from poet_megatron.checkpoint.hf_export import export_hf
from poet_megatron.checkpoint.hf_layout import tensor_specs
from poet_megatron.checkpoint.hf_probes import SpecialIds
from poet_megatron.checkpoint.hf_tokenizer import convert_tokenizer
from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig
from tests.unit.checkpoint.test_hf_tokenizer import ADVERSARIAL, corpus

CL100K = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
"""tiktoken's pattern, given to tiktoken itself: the oracle knows nothing of our translation of it."""
TRICKY = (
    *ADVERSARIAL,
    *(
        "I'll we've YOU'RE it's 'S '\u017f don'T'ss 'll'",
        "1234567 12 3\u0661\u0662\u0663\u0664 \u00bd\u00b2\u2167",
        "a\n\nb\n \n\tc\r\n\r\nd  \n",
    ),
    *("x" * 3000, " " * 3000 + "y", "\n" * 999, "...!!!\n\n\n???", "a \u0085\u00a0\u1680\u2003\u2028\u202f\u3000b", "\u180e\u200b\ufeff"),
    *("e\u0301\u0928\u093f\u0e33", "\U0001f1e9\U0001f1ea\U0001f44d\U0001f3fd", "</s><|endoftext|>", "a<|endoftext|>b", "the the\n"),
)


@cache
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|begin|>", "</s>", "<|endoftext|>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(markup=True), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A </s>", special_tokens=[("<|begin|>", 0), ("</s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50, pad_id=3, pad_token="<pad>")
    return tokenizer


@cache
def wordpiece() -> Tokenizer:
    """Not reversible, with its own normalization and an unknown token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=5000))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        corpus(), trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "<eos>"], show_progress=False)
    )
    return tokenizer


@cache
def ranks() -> dict[bytes, int]:
    """Ranks that training made: those of a byte-level BPE over words cut as tiktoken cuts them. The last is a token no merge reaches."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(hf_other_tokenizers.TIKTOKEN_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus(markup=True), trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    found = {bytes(letters[letter] for letter in token): rank for token, rank in tokenizer.get_vocab().items()}
    return found | {b" orthogonal": len(found)}


def write_ranks(path: Path, found: dict[bytes, int]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in found.items()))
    return path


CONFIG = {
    "tokenizer_class": "LlamaTokenizerFast",
    "add_bos_token": True,
    "bos_token": {"content": "<s>", "special": True},
    "eos_token": "<|endoftext|>",
    "pad_token": {"content": "<pad>"},
    "unk_token": "<not there>",
    "model_max_length": 7,
    "chat_template": "{{ messages }}",
    "added_tokens_decoder": {"9000": {"content": "<new>", "special": True}},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Kind -> what a folder of prepared data keeps."""
    folder = tmp_path_factory.mktemp("files")
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG))
    (folder / "other").mkdir()
    wordpiece().save(str(folder / "other" / "tokenizer.json"))
    sources = {
        "byte level": (folder / "tokenizer.json", {"eos_token": "</s>", "bos_token": "<|begin|>"}),
        "wordpiece": (folder / "other" / "tokenizer.json", {}),
        "tiktoken": (write_ranks(folder / "x.tiktoken", ranks()), {}),
    }
    kept = {}
    for kind, (path, names) in sources.items():
        encoder = encoders.load(path, **names)
        kept[kind] = folder / kind / "tokenizer.model"
        kept[kind].parent.mkdir()
        kept[kind].write_bytes(read_tokenizer(path).kept(encoder.eos_id, encoder.bos_id))
    return kept


@pytest.fixture(scope="module")
def exported(files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Kind -> the tokenizer that transformers opens."""
    found = {}
    for kind, path in files.items():
        folder = tmp_path_factory.mktemp("exported")
        convert_tokenizer(path, folder)
        assert sorted(file.name for file in folder.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
        alone = Tokenizer.from_file(str(folder / "tokenizer.json"))  # without transformers, which overrules some of it
        assert alone.encode(corpus()[0]).ids == oracle(kind)(corpus()[0])
        found[kind] = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return found


@cache
def oracle(kind: str) -> Any:
    """Ids of a text by the library that the file was made for, without what data leaves out."""
    if kind == "tiktoken":
        encoding = tiktoken.Encoding("x", pat_str=CL100K, mergeable_ranks=ranks(), special_tokens={"<|endoftext|>": len(ranks())})
        return encoding.encode_ordinary
    tokenizer = Tokenizer.from_str((byte_level() if kind == "byte level" else wordpiece()).to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


KINDS = ("byte level", "wordpiece", "tiktoken")


def assert_same(kind: str, exported: dict[str, Any], encoder: encoders.Encoder, text: str) -> None:
    expected = oracle(kind)(text)
    assert exported[kind].encode(text) == expected, ascii(text[:100])
    assert encoder.encode_batch([text])[0].tolist() == expected
    if kind != "wordpiece":
        assert exported[kind].decode(expected) == encoder.decode(expected) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_data_and_of_the_library(kind: str, files: dict[str, Path], exported: dict[str, Any]) -> None:
    encoder = encoders.load(files[kind])
    for text in (*TRICKY, *corpus(), *corpus(markup=True)):
        assert_same(kind, exported, encoder, text)
    source = random.Random(1)
    parts = [*TRICKY, *(token.decode(errors="ignore") for token in ranks())]
    for _ in range(1500):
        assert_same(kind, exported, encoder, "".join(source.choice(parts)[:30] for _ in range(source.randrange(12))))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_ids_on_generated_text(kind: str, files: dict[str, Path], exported: dict[str, Any], text: str) -> None:
    assert exported[kind].encode(text) == oracle(kind)(text)


def test_tokens_of_several_bytes_occur(exported: dict[str, Any]) -> None:
    """The equality above is not vacuous."""
    used = {token for text in (*corpus(), *TRICKY) for token in oracle("tiktoken")(text)}
    assert sum(token >= 256 for token in used) > 200
    assert oracle("tiktoken")("an orthogonal") == [*oracle("tiktoken")("an"), len(ranks()) - 1]


def test_special_tokens_are_the_datas(exported: dict[str, Any]) -> None:
    tokenizer = exported["byte level"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 1, 3, None)
    assert len(tokenizer) == 700 and tokenizer.chat_template == "{{ messages }}" and "<new>" not in tokenizer.get_vocab()
    assert tokenizer.decode([0, *tokenizer.encode("the end"), 1], skip_special_tokens=True) == "the end"
    batch = tokenizer(["the", "the the of"], padding=True)
    assert batch["attention_mask"][0][0] == 0 and len(batch["input_ids"][0]) < 50
    other = exported["wordpiece"]
    assert (other.bos_token_id, other.eos_token, other.pad_token, other.unk_token_id) == (None, "<eos>", "<eos>", None)
    last = len(ranks())
    tokenizer = exported["tiktoken"]
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id, len(tokenizer)) == ("<|endoftext|>", last, last, last + 1)


def test_a_whole_export_with_one_of_them(files: dict[str, Path], tmp_path: Path) -> None:
    shape = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "seq_length": 24}
    config = ModelConfig(**shape, vocab_size=700)
    weights = {spec.canonical: torch.full(spec.shape, 0.1) for spec in tensor_specs(config)}
    for _ in range(2):  # its files are all listed: it can be replaced
        folder = export_hf(weights, config, files["byte level"], tmp_path / "hf", torch.float32)
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(folder), transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.bos_token_id, model.config.eos_token_id, tokenizer.model_max_length) == (0, 1, 24)
    inputs = tokenizer("the", return_tensors="pt")
    assert inputs["input_ids"].tolist() == [oracle("byte level")("the")]
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] <= inputs["input_ids"].shape[1] + 2
    assert convert_tokenizer(files["byte level"], tmp_path, config) == SpecialIds(0, 1, 3, None)
    with pytest.raises(UserError, match=r"tokenizer.model has 700 tokens, more than model.vocab_size = 699; give the one that prepared"):
        convert_tokenizer(files["byte level"], tmp_path, ModelConfig(**shape, vocab_size=699))


@pytest.mark.parametrize("kind", ["byte level", "tiktoken"])
def test_an_export_with_other_ids_is_refused(kind: str, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepended = {"type": "Prepend", "prepend": "x"}
    monkeypatch.setattr(hf_other_tokenizers, "_without_extras", lambda content: json.loads(content) | {"normalizer": prepended})
    monkeypatch.setattr(hf_other_tokenizers, "TIKTOKEN_PATTERN", r"\s+|\S+")
    with pytest.raises(UserError, match=r"tokenizer.model cannot be exported exactly: '.*' is \[.*docs/tokenizing.md shows"):
        convert_tokenizer(files[kind], tmp_path)
