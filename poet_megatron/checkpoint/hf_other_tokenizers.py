"""Writes tokenizers that are no SentencePiece models for transformers: a tokenizer.json, and the ranks of a .tiktoken file.

Both end up as a tokenizer.json whose ids are those of the data (`data_prep.encoders`), which is checked on probe texts after transformers
has opened the folder:

- nothing is added around a text and nothing is cut off or padded, whatever the file given says about that;
- text such as "</s>" stays text (`split_special_tokens`), as in the data;
- a .tiktoken file becomes a byte-level BPE: a merge rule for every way to split a token in two tokens, by rank; a piece that is a token as
  a whole is taken as it is (`ignore_merges`), as tiktoken does; the text is cut by tiktoken's pattern, written for the other library.
  Where two overlapping pairs make the same token, tiktoken takes the left one and Hugging Face the rule that stands first. No file of
  ranks that training made is known to come there.

Of a tokenizer_config.json only what cannot change ids is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import encoders
from data_prep.encoders import TIKTOKEN_EOS, Encoder
from data_prep.tokenizer_file import HUGGING_FACE, TokenizerFile
from poet_megatron.checkpoint.hf_probes import PROBES, SpecialIds, check_vocabulary
from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig

KEPT_SETTINGS = ("chat_template", "clean_up_tokenization_spaces", "padding_side", "model_input_names")
TIKTOKEN_PATTERN = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++\z|\s*[\r\n]|\s+(?!\S)|\s"
"""`data_prep.encoders.TIKTOKEN_PATTERN` for Oniguruma, where `$` ends a line and `{1,3}+` repeats."""


def convert_other(path: Path, file: TokenizerFile, folder: Path, config: ModelConfig | None) -> SpecialIds:
    """Write tokenizer.json and tokenizer_config.json into `folder`; return the special tokens' ids.

    path: where `file` was read from.
    config: if given, the tokenizer must not have more tokens than `config.vocab_size`.
    """
    encoder = encoders.load(path)
    if config is not None:
        check_vocabulary(path, encoder.vocab_size, config)
    content = _without_extras(file.content) if file.kind == HUGGING_FACE else json.loads(_from_ranks(file.ranks(path)).to_str())
    names = _names(content)
    settings = _settings(file, encoder, names)
    if config is not None:
        settings["model_max_length"] = config.seq_length
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _check_same_ids(path, encoder, folder)
    ids = {name: number for number, name in names.items()}
    return SpecialIds(*(ids.get(settings.get(f"{role}_token", "")) for role in ("bos", "eos", "pad", "unk")))


def _without_extras(content: bytes) -> dict[str, Any]:
    """A tokenizer.json that gives the ids of the text and nothing else."""
    return json.loads(content) | {"post_processor": None, "truncation": None, "padding": None}


def _names(content: dict[str, Any]) -> dict[int, str]:
    """Id -> token of a tokenizer.json."""
    from tokenizers import Tokenizer

    vocabulary: dict[str, int] = Tokenizer.from_str(json.dumps(content)).get_vocab(with_added_tokens=True)
    return {number: name for name, number in vocabulary.items()}


def _settings(file: TokenizerFile, encoder: Encoder, names: dict[int, str]) -> dict[str, Any]:
    """tokenizer_config.json's content: special tokens are the data's, and only such as the tokenizer has."""
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False, "padding_side": "left"}
    settings |= {name: file.config[name] for name in KEPT_SETTINGS if name in file.config}
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "split_special_tokens": True}
    for role, number in (("bos", encoder.bos_id), ("eos", encoder.eos_id)):
        if number >= 0:
            settings[f"{role}_token"] = names[number]
    for role in ("pad", "unk"):
        if (name := _text_of(file.config.get(f"{role}_token"))) in names.values():
            settings[f"{role}_token"] = name
    if "pad_token" not in settings and encoder.eos_id >= 0:
        settings["pad_token"] = names[encoder.eos_id]
    return settings


def _text_of(token: Any) -> str | None:
    """A special token as tokenizer_config.json has it: a string, or an object with its content."""
    return token.get("content") if isinstance(token, dict) else token


def _from_ranks(ranks: dict[bytes, int]) -> Any:
    """A `tokenizers.Tokenizer` with the ids of tiktoken."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = _byte_letters()
    text = {token: "".join(letters[byte] for byte in token) for token in ranks}
    merges = [(text[left], text[right]) for token in sorted(ranks, key=ranks.__getitem__) for left, right in _splits(token, ranks)]
    tokenizer = Tokenizer(BPE({text[token]: rank for token, rank in ranks.items()}, merges, ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(TIKTOKEN_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(TIKTOKEN_EOS, normalized=False, special=True)])
    return tokenizer


def _splits(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The ways to split a token in two tokens, those of the lowest ranks first."""
    ways = [(token[:place], token[place:]) for place in range(1, len(token))]
    return iter(sorted(((a, b) for a, b in ways if a in ranks and b in ranks), key=lambda way: (ranks[way[0]], ranks[way[1]])))


def _byte_letters() -> dict[int, str]:
    """The letter that stands for each byte in byte-level vocabularies: itself if it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(0x100 + place) for place, byte in enumerate(hidden)}


def _check_same_ids(path: Path, encoder: Encoder, folder: Path) -> None:
    """Raise UserError at the first probe whose ids transformers and the data's encoder disagree on."""
    from transformers import AutoTokenizer

    opened = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in PROBES:
        expected, got = encoder.encode_batch([text])[0].tolist(), opened.encode(text)
        if expected != got:
            raise UserError(
                f"{path} cannot be exported exactly: {text!r} is {expected} in the data but {got} in transformers; "
                "export the weights without it, as docs/tokenizing.md shows, and use the tokenizer's own library"
            )
