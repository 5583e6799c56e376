r"""Training and using a SentencePiece tokenizer whose ids survive a conversion to a Hugging Face fast tokenizer.

Options of the models trained here, and why:

- BPE with byte fallback: every text has tokens, and its export has the same ids on every text. (`prepare train-tokenizer --model unigram`
  trains the other kind, whose export may choose the other of two splits with equal scores.)
- `normalization_rule_name=identity`, `remove_extra_whitespaces=False`: newlines, tabs and runs of spaces survive a round trip. Only
  U+2581, SentencePiece's own space mark, decodes to a space.
- `add_dummy_prefix=False`: SentencePiece puts its prefix before every text, Hugging Face's Metaspace only before texts that do not begin
  with a space, so their ids would differ. **Convert with `add_prefix_space=False`** (`LlamaTokenizer`'s default is True), and with
  `split_special_tokens=True` if a literal `</s>` in a text must stay text, as it does here.
- `split_digits`, `allow_whitespace_only_pieces` (indentation costs one token), `character_coverage` 0.9995 (rarer characters become bytes).
- ids: unk 0, bos 1, eos 2, no pad (-1): no id is spent on a token that training never sees. The vocabulary is exactly the size asked for.

Training is deterministic: the same documents in the same order give the same file. It always uses one thread (2.5 s for 20 MB), because
SentencePiece records the number of threads in the model, and with it in its hash.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from data_prep.tokenizer_file import read_content
from poet_megatron.errors import UserError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, -1
SMALLEST_VOCAB = 300
"""256 bytes, three special tokens and a few characters."""
MAX_TRAIN_BYTES = 256 * 1024**2
"""A vocabulary is learned from at most this much text, the first of the documents."""


class Tokenizer:
    """A SentencePiece model: `encode`, `decode` and what the data files need to know of it."""

    def __init__(self, model: bytes, origin: str):
        self._processor = load_processor(model, origin)
        self.model = model
        self.vocab_size: int = self._processor.vocab_size()
        self.eos_id: int = self._processor.eos_id()
        self.bos_id: int = self._processor.bos_id()
        self.sha256 = hashlib.sha256(model).hexdigest()
        if self.eos_id < 0:
            raise UserError(f"{origin} has no end-of-sequence token, which separates documents: use a model trained with eos_id >= 0")

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without bos and eos."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without bos and eos."""
        return self._processor.encode(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        return self._processor.decode([int(token) for token in ids])


def load_processor(model: bytes, origin: str) -> Any:
    """SentencePiece's own object for a serialized model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except (RuntimeError, TypeError, OSError) as error:
        raise UserError(f"{origin} is not a SentencePiece model ({error}): give a tokenizer.model file") from error
    return processor


def load_tokenizer(path: Path) -> Tokenizer:
    """The SentencePiece model in a file."""
    model = read_content(path)
    if model.startswith(b"{"):
        raise UserError(f"tokenizer {path} is no SentencePiece model: use poet-megatron prepare tokenize and merge, which take other kinds")
    return Tokenizer(model, str(path))


def train_tokenizer(
    texts: Iterable[str], output: Path, vocab_size: int, max_bytes: int = MAX_TRAIN_BYTES, model_type: str = "bpe"
) -> Tokenizer:
    """Learn a vocabulary of exactly `vocab_size` from `texts`, write it to `output` and return it; `model_type` is bpe or unigram."""
    import sentencepiece

    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"vocab_size is {vocab_size}; it must be at least {SMALLEST_VOCAB} (256 bytes, special tokens and characters)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_limited(texts, max_bytes),
            model_writer=model,
            vocab_size=vocab_size,
            **_options(model_type),
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from error
    write_atomically(output, model.getvalue())
    return Tokenizer(model.getvalue(), str(output))


def _options(model_type: str) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "add_dummy_prefix": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.9995,
        "max_sentence_length": 2**30,
        "unk_id": UNK_ID,
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": PAD_ID,
        "num_threads": 1,
        "minloglevel": 2,
    }


def _limited(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    """The first texts up to `max_bytes`; a leading newline stands for the trailing one, which SentencePiece would strip."""
    used = 0
    for text in texts:
        used += len(text.encode("utf-8"))
        yield "\n" + text
        if used >= max_bytes:
            return


def _explain(error: str, vocab_size: int) -> str:
    """A message for the two ways in which a vocabulary size does not fit the text."""
    if bound := re.search(r"value <= (\d+)", error):
        return f"vocab_size is {vocab_size}; this text supports at most {bound[1]}: lower --vocab-size or give more text"
    if bound := re.search(r"required_chars\D*\d+ vs (\d+)", error):
        return f"vocab_size is {vocab_size}; the characters of this text alone need {bound[1]}: raise --vocab-size"
    return f"SentencePiece could not learn a vocabulary of {vocab_size}: {error}"
