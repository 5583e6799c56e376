"""Token ids of texts under a SentencePiece model, faster than SentencePiece and equal to its own.

Both kinds that matter are encoded by `poet_megatron._text` (csrc/text), which normalizes as the model says:

- BPE: it cuts the text into words where no piece of the vocabulary reaches across, and keeps the ids of frequent words;
- unigram: it looks for the best split of the whole text, adding up scores in SentencePiece's order and precision. (Which of two nearly
  equal splits wins depends on the roundings, and so on where in the text a word stands: a cache of words would not give the same ids.)

Everything else is left to SentencePiece itself, for the whole model, and `Encoder.reason` says why:

- the extension was not built;
- word and character models;
- unused pieces, scores that are not finite, a piece that is both text and a control symbol, a control symbol of one character (versions of
  SentencePiece differ there), spaces not written as U+2581; in a unigram model also user-defined symbols and scores above 0;
- on a few probe texts the ids were not SentencePiece's: its releases do not all round in the same way.

A text with a lone surrogate has no UTF-8: both raise UnicodeEncodeError.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.ids import Ids, Offsets, flat
from data_prep.tokenizer import load_processor
from data_prep.tokenizer_file import read_content

UNIGRAM, BPE = 1, 2
"""trainer_spec.model_type."""
UNKNOWN_PENALTY = 10.0
"""How much less than the least likely piece SentencePiece's unigram gives a character that is none."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of pieces."""
SPACE = "\u2581"
"""How SentencePiece writes a space."""
PROBES = (
    *("", " ", "  ", "a", " a", "a ", "  a  b   c    d     ", "x\n", "\n\n\n  x\t\ty\n", "\r\n", "\u2581", " \u2581 \u2581\u2581a\u2581"),
    "The quick (brown) fox can't jump 32.3 feet, right? http://example.com/index.html?a=1&b=2",
    "def f(x):\n    if x:\n        return {'a': [1, 2]}\n\n\n",
    "<s></s><unk><pad><0x0A>[INST] [/INST]\x00\x01\x7f",
    "e\u0301 \u00e9 \u00a0\u3000\u200b\ufeff \ufb01 \uff21 \u2460 \u212b \ufdfa",
    "\u6f22\u5b57\u304b\u306a\u4ea4\u3058\u308a\u6587 \ud55c\uad6d\uc5b4 \u0420\u0443\u0441\u0441\u043a\u0438\u0439",
    "\U0001f600\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f1e9\U0001f1ea",
    "a" * 100 + " " * 100 + "ab" * 100,
)
"""Texts on which the ids of a model must be SentencePiece's before it is used."""
LONG_PROBE = 100_000
"""Characters of those that a unigram model has to pass as well."""
UNIGRAM_SINCE = (0, 2, 2)
"""First release of SentencePiece whose sums csrc/text/unigram.cpp repeats."""


class NotNativeError(Exception):
    """The extension cannot encode with this model; the message says why."""


class Batch(NamedTuple):
    """Ids of several texts: those of text i are ids[offsets[i]:offsets[i + 1]]."""

    ids: Ids
    offsets: Offsets


class Encoder:
    """A SentencePiece model that turns texts into ids, without bos and eos.

    Attributes:
        native: whether the compiled encoder does it.
        reason: why SentencePiece does it instead; empty if it does not.
        vocab_size: number of pieces.
        sha256: of the model file.
    """

    def __init__(self, model: bytes, origin: str, native: bool = True):
        self._processor = load_processor(model, origin)
        self.vocab_size: int = self._processor.vocab_size()
        self.sha256 = hashlib.sha256(model).hexdigest()
        self.reason = "" if native else "not wanted"
        self._text: Any = None
        if native:
            try:
                self._text = compile_model(model)
                self._probe(model)
            except NotNativeError as error:
                self._text, self.reason = None, str(error)

    @property
    def native(self) -> bool:
        """Whether the compiled encoder is used."""
        return self._text is not None

    def encode(self, text: str) -> Ids:
        """Ids of one text."""
        return self.encode_batch([text]).ids

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> Batch:
        """Ids of several texts, on `threads` threads; the same whatever their number. Releases the GIL.

        Raises:
            UnicodeEncodeError: a text has a lone surrogate.
        """
        if self._text is not None:
            return Batch(*self._text.encode(texts, threads))
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("texts must be strings")
        return Batch(*flat(self._processor.encode([text.encode() for text in texts], num_threads=threads)))

    def _probe(self, model: bytes) -> None:
        """Refuse a model whose ids are not SentencePiece's."""
        for text in (*PROBES, *_long_probes(model)):
            if self._text.encode([text], 1)[0].tolist() != self._processor.encode(text):
                raise NotNativeError(f"the compiled encoder gives other ids than SentencePiece for {text[:100]!r}")


def _long_probes(model: bytes) -> list[str]:
    """Of a unigram model, texts without structure in its own characters and pieces: sums get so low that their roundings show."""
    proto = _parse(model)
    if proto.trainer_spec.model_type != UNIGRAM:
        return []
    pieces = [str(piece.piece) for piece in proto.pieces if piece.type == NORMAL]
    letters = sorted({letter for piece in pieces for letter in piece})
    usual = [letter for letter in letters if "a" <= letter <= "z"] or letters
    return ["".join(random.Random(0).choices(some, k=LONG_PROBE))[:LONG_PROBE] for some in (usual, letters, pieces)]


def load_encoder(model_path: Path | str, native: bool = True) -> Encoder:
    """The encoder for a SentencePiece model file; with `native=False` SentencePiece itself."""
    path = Path(model_path)
    return Encoder(read_content(path), str(path), native)


def compile_model(model: bytes, split_at_every_space: bool = False) -> Any:
    """The `poet_megatron._text.Encoder` of a serialized model. `split_at_every_space` makes a wrong one, for tests.

    Raises:
        NotNativeError: there is no extension, or it does not do such models.
    """
    text = extension()
    if text is None:
        raise NotNativeError("poet_megatron._text was not built")
    proto = _parse(model)
    _check(proto)
    user_defined = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == USER_DEFINED}
    unigram = proto.trainer_spec.model_type == UNIGRAM
    fallback = proto.trainer_spec.byte_fallback
    normalizer = proto.normalizer_spec
    try:
        return text.Encoder(
            pieces=_text_pieces(proto),
            user_defined={_internal(piece): i for piece, i in user_defined.items() if " " not in piece},
            protected_symbols={piece.encode(): i for piece, i in user_defined.items()},
            byte_ids=_byte_ids(proto) if fallback else [],
            unknown_id=next(i for i, piece in enumerate(proto.pieces) if piece.type == UNKNOWN),
            unknown_score=float(np.float32(_normal_scores(proto).min()) - np.float32(UNKNOWN_PENALTY)) if unigram else None,
            charsmap=normalizer.precompiled_charsmap,
            add_dummy_prefix=normalizer.add_dummy_prefix,
            remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
            whitespace_as_suffix=proto.trainer_spec.treat_whitespace_as_suffix,
            split_at_every_space=split_at_every_space,
        )
    except ValueError as error:
        raise NotNativeError(str(error)) from error


def extension() -> ModuleType | None:
    """poet_megatron._text, or None if it was not built."""
    try:
        from poet_megatron import _text  # type: ignore[attr-defined, unused-ignore]
    except ImportError:
        return None
    return _text


def _parse(model: bytes) -> Any:
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise NotNativeError(f"the model cannot be read without protobuf ({error})") from error
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    return proto


def _check(proto: Any) -> None:
    """Refuse what the extension does not do."""
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise NotNativeError("the model is neither BPE nor unigram")
    if not proto.normalizer_spec.escape_whitespaces:
        raise NotNativeError("the model does not write spaces as U+2581")
    types = {piece.type for piece in proto.pieces}
    if UNUSED in types:
        raise NotNativeError("the model has unused pieces")
    if any(not math.isfinite(piece.score) for piece in proto.pieces):
        raise NotNativeError("the model has scores that are not finite")
    if any(not isinstance(piece.piece, str) for piece in proto.pieces):
        raise NotNativeError("the model has a piece that is not UTF-8")
    if proto.trainer_spec.model_type == UNIGRAM:
        if _version() < UNIGRAM_SINCE:
            raise NotNativeError(f"SentencePiece before {'.'.join(map(str, UNIGRAM_SINCE))} rounds a unigram's sums in another way")
        if NORMAL not in types or _normal_scores(proto).max() > 0:
            raise NotNativeError("the model's scores are no logarithms of probabilities")
        if USER_DEFINED in types:
            raise NotNativeError("a unigram model with user-defined symbols")
    text = {piece.piece for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    if clash := next((piece.piece for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED) and piece.piece in text), None):
        raise NotNativeError(f"{clash!r} is both text and a control symbol")
    if short := next((piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, BYTE) and len(piece.piece) == 1), None):
        raise NotNativeError(f"the control symbol {short!r} is a single character")


def _text_pieces(proto: Any) -> list[tuple[bytes, int, float]]:
    """(text, id, score) of the normal pieces. One with a real space matches nothing: in normalized texts spaces are U+2581."""
    pieces = enumerate(proto.pieces)
    return [(_internal(piece.piece), i, piece.score) for i, piece in pieces if piece.type == NORMAL and " " not in piece.piece]


def _version() -> tuple[int, ...]:
    import sentencepiece

    return tuple(int(number) for number in re.findall(r"\d+", sentencepiece.__version__)[:3])


def _normal_scores(proto: Any) -> NDArray[np.float32]:
    return np.array([piece.score for piece in proto.pieces if piece.type == NORMAL], np.float32)


def _internal(piece: str) -> bytes:
    """A piece as the extension has it: one byte for a space."""
    return piece.replace(SPACE, " ").encode()


def _byte_ids(proto: Any) -> list[int]:
    """Ids of the pieces <0x00> to <0xFF>."""
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces) if piece.type == BYTE}
    try:
        return [ids[f"<0x{byte:02X}>"] for byte in range(256)]
    except KeyError as error:
        raise NotNativeError(f"the model has no byte piece {error}") from error
