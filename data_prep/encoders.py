"""Tokenizers of several kinds behind one interface: texts to token ids, with what a manifest has to know of them.

- `.model`: SentencePiece (T5, Llama, Mistral, or from `prepare train-tokenizer`)
- `.json`: a Hugging Face tokenizer.json, through the tokenizers library
- `.tiktoken`: ranks of a byte-level BPE, through tiktoken; the pre-tokenizer's pattern is not in such a file, see `TIKTOKEN_PATTERN`
- what a folder of prepared data keeps as its `tokenizer.model`, of any kind (`data_prep.tokenizer_file`)

Ids come without special tokens: `data_prep.worker` adds the end-of-sequence and, if asked for, the begin-of-sequence token. A text that
looks like a special token, such as `</s>`, stays text with all kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_prep.ids import Ids, Offsets, flat
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_file import HUGGING_FACE, SENTENCEPIECE, TIKTOKEN, TokenizerFile, read_tokenizer
from poet_megatron.errors import UserError

EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|eos|>")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>")
TIKTOKEN_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
"""How cl100k_base cuts text before its BPE."""
TIKTOKEN_EOS = "<|endoftext|>"
"""The one special token of a .tiktoken file, behind its ranks."""


class EncodeBatch(Protocol):
    """What encoders have in common."""

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Ids of all texts, those of text i at offsets[i]:offsets[i + 1]."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


@dataclass(frozen=True)
class Encoder:
    """A loaded tokenizer; special ids are -1 where it has none."""

    kind: str
    sha256: str
    vocab_size: int
    eos_id: int
    bos_id: int
    engine: str
    """The code that encodes: native, sentencepiece, tokenizers or tiktoken."""
    backend: EncodeBatch

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """Ids of all texts, those of text i at offsets[i]:offsets[i + 1]."""
        return self.backend.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self.backend.decode([int(token) for token in ids])


def load(path: Path, eos_token: str = "", bos_token: str = "", native: bool = True) -> Encoder:
    """The tokenizer in a file; `eos_token` and `bos_token` name pieces of a tokenizer.json."""
    file = read_tokenizer(path)
    if file.kind == HUGGING_FACE:
        return _from_json(path, file, eos_token, bos_token)
    if eos_token or bos_token:
        raise UserError(f"--eos-token and --bos-token are for a tokenizer.json; {path} says itself which tokens these are")
    return _from_tiktoken(path, file) if file.kind == TIKTOKEN else _from_sentencepiece(path, file, native)


@dataclass(frozen=True)
class _SentencePiece:
    tokenizer: Tokenizer

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        return flat([self.tokenizer.encode(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


@dataclass(frozen=True)
class _Native:
    """The compiled encoder, whose ids are those of SentencePiece, which decodes."""

    encoder: Any
    tokenizer: Tokenizer

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        return self.encoder.encode_batch(texts)

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)


def _from_sentencepiece(path: Path, file: TokenizerFile, native: bool) -> Encoder:
    tokenizer = Tokenizer(file.content, str(path))
    compiled = native_encoder(path) if native else None
    backend: EncodeBatch = _SentencePiece(tokenizer) if compiled is None else _Native(compiled, tokenizer)
    return Encoder(
        kind=SENTENCEPIECE,
        sha256=file.sha256,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        bos_id=tokenizer.bos_id,
        engine="native" if compiled is not None and compiled.native else "sentencepiece",
        backend=backend,
    )


def native_encoder(path: Path) -> Any:
    """The encoder that is compiled where it can be, or None without its module; its ids are SentencePiece's in any case."""
    try:
        from data_prep.native_encoder import load_encoder
    except ImportError:
        return None
    return load_encoder(path)


@dataclass(frozen=True)
class _HuggingFace:
    tokenizer: Any

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        return flat([found.ids for found in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)])

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)


def _from_json(path: Path, file: TokenizerFile, eos_token: str, bos_token: str) -> Encoder:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(file.content.decode("utf-8"))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{path} is not a tokenizer.json ({error}): give the file of a Hugging Face fast tokenizer") from error
    tokenizer.no_truncation()  # what the file says about lengths is meant for a model's input, not for data
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    vocabulary: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
    return Encoder(
        kind=HUGGING_FACE,
        sha256=file.sha256,
        vocab_size=max(vocabulary.values()) + 1,
        eos_id=file.eos_id if file.packed and not eos_token else _special(path, vocabulary, eos_token, EOS_NAMES, "--eos-token"),
        bos_id=file.bos_id if file.packed and not bos_token else _special(path, vocabulary, bos_token, BOS_NAMES, "--bos-token"),
        engine="tokenizers",
        backend=_HuggingFace(tokenizer),
    )


def _special(path: Path, vocabulary: dict[str, int], given: str, usual: Sequence[str], option: str) -> int:
    """Id of a special token: the one given, or the only usual one that the vocabulary has; -1 if there is none."""
    if given:
        if given not in vocabulary:
            raise UserError(f"{option} {given!r} is not in the vocabulary of {path}: check its spelling")
        return vocabulary[given]
    found = [name for name in usual if name in vocabulary]
    if len(found) > 1:
        raise UserError(f"{path} has {' and '.join(found)}: say with {option} which one to use")
    return vocabulary[found[0]] if found else -1


@dataclass(frozen=True)
class _Tiktoken:
    encoding: Any

    def encode_batch(self, texts: list[str]) -> tuple[Ids, Offsets]:
        return flat([self.encoding.encode_ordinary(text) for text in texts])

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode(list(ids))


def _from_tiktoken(path: Path, file: TokenizerFile) -> Encoder:
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f"{path} needs the tiktoken package: pip install 'poet-megatron[data]'") from error
    ranks = file.ranks(path)
    eos_id = max(ranks.values()) + 1
    encoding = tiktoken.Encoding(
        path.stem, pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens={TIKTOKEN_EOS: eos_id}, explicit_n_vocab=None
    )
    return Encoder(TIKTOKEN, file.sha256, eos_id + 1, eos_id, -1, "tiktoken", _Tiktoken(encoding))
