"""Converts the tokenizer of a run to a Hugging Face fast tokenizer with the same ids: sentencepiece models here, others next door.

The tokenizer is built explicitly: transformers' own converters split off leading spaces, let text such as "<s>" become a control token,
or (unigram) let the text "<0x0A>" become a byte. What sentencepiece does, and how it is said here:

- BPE merges the adjacent pair whose union has the best score, leftmost first: one merge rule per way to split a piece, ranked by score.
- Control, unknown and byte pieces never match text: no merge rule makes them (BPE), or they score worse than any spelling (unigram).
- Where the model has `add_dummy_prefix`, every text gets one leading space, even one that starts with a space: a Prepend normalizer.
- Characters outside the vocabulary become their UTF-8 bytes.

BPE ids are equal on every text. Unigram compares sums of scores, sentencepiece in float32 and Hugging Face in float64: where two splits tie
("000" as "0" "00" or "00" "0"), they may choose differently.
Every conversion is checked against sentencepiece on probe texts before it is written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.tokenizer_file import SENTENCEPIECE, read_tokenizer
from poet_megatron.checkpoint.hf_other_tokenizers import convert_other
from poet_megatron.checkpoint.hf_probes import PROBES, SpecialIds, check_vocabulary
from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig

SPACE = "\u2581"
"""Sentencepiece's visible space."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Piece types of a sentencepiece model."""
UNIGRAM, BPE = 1, 2
"""Algorithms (trainer_spec.model_type) that can be converted."""


def convert_tokenizer(model: Path, folder: Path, config: ModelConfig | None = None) -> SpecialIds:
    """Write tokenizer.json, tokenizer_config.json and, if it is a sentencepiece model, a copy of it; return the special tokens' ids.

    model: sentencepiece .model, tokenizer.json, .tiktoken, or what a folder of prepared data keeps of them as tokenizer.model.
    config: if given, the tokenizer must not have more tokens than `config.vocab_size`.
    """
    model = Path(model)
    if not model.is_file():
        raise UserError(f"tokenizer model {model} does not exist; give the file that prepared the data")
    if model.stat().st_size and (file := read_tokenizer(model)).kind != SENTENCEPIECE:
        return convert_other(model, file, folder, config)
    return _convert_sentencepiece(model, folder, config)


def _convert_sentencepiece(model: Path, folder: Path, config: ModelConfig | None) -> SpecialIds:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model.read_bytes())
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{model} is not a sentencepiece model ({error}); give the file that prepared the data") from None
    proto = _read_proto(model)
    if config is not None:
        check_vocabulary(model, len(proto.pieces), config)
    tokenizer = build_tokenizer(proto)
    _check_same_ids(model, proto, processor, tokenizer)
    ids = SpecialIds(*(i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id(), processor.pad_id(), processor.unk_id())))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = _tokenizer_config(proto, ids, config)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    return ids


def _read_proto(model: Path) -> Any:
    """Parse a valid sentencepiece model file; raise UserError on a kind that cannot be converted."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{model} is of type {proto.trainer_spec.model_type}; only unigram ({UNIGRAM}) and bpe ({BPE}) can be converted")
    unsupported = [p.piece for p in proto.pieces if p.type in (USER_DEFINED, UNUSED)]
    if unsupported:
        raise UserError(
            f"{model} has the user-defined or unused piece {unsupported[0]!r}; Hugging Face treats such pieces differently; "
            "export with --no-tokenizer, or train a tokenizer without them"
        )
    return proto


def build_tokenizer(proto: Any) -> Any:
    """A `tokenizers.Tokenizer` with the ids of the sentencepiece model `proto` (a ModelProto)."""
    from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(_bpe(proto) if proto.trainer_spec.model_type == BPE else _unigram(proto))
    tokenizer.normalizer = _normalizer(proto)
    tokenizer.decoder = _decoder(proto)
    covered = {c for p in proto.pieces if p.type == NORMAL for c in p.piece}
    if proto.trainer_spec.model_type == UNIGRAM and any(not covered.issuperset(p.piece) for p in proto.pieces):
        # "<" of "</s>" may be in no normal piece and then costs more than "</s>" itself. Cutting out the runs of such characters keeps
        # "</s>" from matching and changes no other piece.
        outside = Regex("[^" + "".join(f"\\x{{{ord(c):x}}}" for c in sorted(covered)) + "]+")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(outside, "isolated")
    tokenizer.add_special_tokens([AddedToken(p.piece, normalized=False, special=True) for p in proto.pieces if p.type == CONTROL])
    tokenizer.encode_special_tokens = True
    return tokenizer


def _bpe(proto: Any) -> Any:
    """The BPE model: merge rules for every way to split a piece in two pieces, best piece first."""
    from tokenizers.models import BPE as BPEModel

    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    normal = {p.piece: p.score for p in proto.pieces if p.type == NORMAL}
    merges = []
    for piece in sorted(normal, key=lambda piece: -normal[piece]):
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece)) if piece[:k] in normal and piece[k:] in normal]
        merges += sorted(splits, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    spec = proto.trainer_spec
    return BPEModel(vocab=ids, merges=merges, unk_token=proto.pieces[spec.unk_id].piece, fuse_unk=True, byte_fallback=spec.byte_fallback)


def _unigram(proto: Any) -> Any:
    """The unigram model: pieces that must not match text score worse than their text spelled in single characters."""
    from tokenizers.models import Unigram

    lowest = min(p.score for p in proto.pieces if p.type == NORMAL)
    never = (lowest - 1) * max(len(p.piece) for p in proto.pieces if p.type != NORMAL)
    vocab = [(p.piece, p.score if p.type == NORMAL else never) for p in proto.pieces]
    return Unigram(vocab, unk_id=proto.trainer_spec.unk_id, byte_fallback=proto.trainer_spec.byte_fallback)


def _normalizer(proto: Any) -> Any:
    """Sentencepiece's normalization: its character map, surplus spaces, the leading space, visible spaces."""
    from tokenizers import Regex, normalizers

    spec = proto.normalizer_spec
    steps: list[Any] = [normalizers.Precompiled(spec.precompiled_charsmap)] if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _decoder(proto: Any) -> Any:
    """Visible spaces to spaces, byte pieces to characters, without the leading space that encoding added."""
    from tokenizers import decoders

    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if proto.normalizer_spec.add_dummy_prefix else []))


def _tokenizer_config(proto: Any, ids: SpecialIds, config: ModelConfig | None) -> dict[str, Any]:
    """tokenizer_config.json's content; text that looks like a special token stays text (`split_special_tokens`)."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if config is not None:
        settings["model_max_length"] = config.seq_length
    for role, i in (("bos", ids.bos), ("eos", ids.eos), ("pad", ids.pad), ("unk", ids.unk)):
        if i is not None:
            settings[f"{role}_token"] = proto.pieces[i].piece
    if ids.pad is None and ids.eos is not None:
        settings["pad_token"] = proto.pieces[ids.eos].piece
    return settings


def _check_same_ids(model: Path, proto: Any, processor: Any, tokenizer: Any) -> None:
    """Raise UserError at the first probe that the two tokenizers encode differently; a unigram split of equal score is not a difference."""
    for text in PROBES:
        expected, got = processor.encode(text), tokenizer.encode(text, add_special_tokens=False).ids
        if expected != got and not (proto.trainer_spec.model_type == UNIGRAM and _equally_good(proto, expected, got)):
            raise UserError(
                f"{model} cannot be converted exactly: {text!r} is {expected} in sentencepiece but {got} in Hugging Face's tokenizer; "
                "export with --no-tokenizer and use sentencepiece, or train it with identity normalization and byte fallback"
            )


def _equally_good(proto: Any, first: list[int], second: list[int]) -> bool:
    """Whether two unigram splits have the same number of pieces and, up to float32 rounding, the same score."""
    difference = sum(proto.pieces[i].score for i in first) - sum(proto.pieces[i].score for i in second)
    return len(first) == len(second) and abs(difference) < 1e-3
