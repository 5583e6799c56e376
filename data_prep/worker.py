"""An encoder process: blocks of records come in, documents of token ids go out."""

from __future__ import annotations

import hashlib
import signal
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep import encoders, filters
from data_prep.blocks import Block
from data_prep.encoders import Encoder
from data_prep.ids import Ids, Offsets
from data_prep.indexed import token_dtype
from data_prep.records import Texts, parse
from data_prep.settings import Settings

NO_TOKENS = "no tokens"
BATCH_BYTES = 1 << 18
"""Text that is encoded at once: bounds what the libraries hold."""


@dataclass(frozen=True)
class Encoded:
    """Documents of a block."""

    position: int
    records: int
    ids: npt.NDArray[np.integer]
    """Tokens of all documents end to end, in the dtype of the files."""
    lengths: npt.NDArray[np.int32]
    numbers: npt.NDArray[np.int64]
    """Record number of each document."""
    text_bytes: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    """Of each document's text: decides its split, and whether it is a duplicate."""
    skipped: list[tuple[int, str]]
    filtered: list[tuple[int, str]]
    """Left out by a quality rule, which is not an error."""


def text_hash(content: bytes) -> int:
    """64 bits of BLAKE2b of a text in UTF-8; `data_prep.prepare` splits by the same."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def encode_block(block: Block, settings: Settings, encoder: Encoder) -> Encoded:
    """Parse, check, filter and encode the records of a block."""
    found = parse(block, settings.text_key, settings.max_document_bytes)
    filtered = _filter(found) if settings.c4_filters else []
    ids, offsets = _encode(found.texts, encoder)
    full = np.diff(offsets) > 0
    skipped = found.skipped + [(number, NO_TOKENS) for number, has in zip(found.numbers, full, strict=True) if not has]
    framed, lengths = _framed(ids, offsets, full, settings, encoder)
    return Encoded(
        position=block.position,
        records=block.count,
        ids=framed,
        lengths=lengths,
        numbers=np.array(found.numbers, np.int64)[full],
        text_bytes=np.array([len(content) for content in found.content], np.int64)[full],
        hashes=np.array([text_hash(content) for content in found.content], np.uint64)[full],
        skipped=sorted(skipped),
        filtered=filtered,
    )


def _filter(found: Texts) -> list[tuple[int, str]]:
    """Apply C4's rules to `found` in place; returns what they left out."""
    left_out, kept = [], Texts(skipped=found.skipped)
    for number, text in zip(found.numbers, found.texts, strict=True):
        cleaned, reason = filters.clean(text)
        if reason:
            left_out.append((number, reason))
        else:
            kept.texts.append(cleaned)
            kept.content.append(cleaned.encode("utf-8"))
            kept.numbers.append(number)
    found.texts, found.content, found.numbers = kept.texts, kept.content, kept.numbers
    return left_out


def _encode(texts: list[str], encoder: Encoder) -> tuple[Ids, Offsets]:
    """Encode in batches of bounded size."""
    ids: list[Ids] = [np.zeros(0, np.int32)]
    offsets: list[Offsets] = [np.zeros(1, np.int64)]
    start = size = total = 0
    for end, text in enumerate(texts, start=1):
        size += len(text)
        if size >= BATCH_BYTES or end == len(texts):
            batch, begins = encoder.encode_batch(texts[start:end])
            ids.append(batch)
            offsets.append(np.asarray(begins[1:], np.int64) + total)
            start, size, total = end, 0, total + len(batch)
    return np.concatenate(ids), np.concatenate(offsets)


def _framed(
    ids: Ids, offsets: Offsets, full: npt.NDArray[np.bool_], settings: Settings, encoder: Encoder
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int32]]:
    """Ids of the documents that have any, with the special tokens that were asked for around each."""
    before, after = int(settings.bos), int(settings.eos)
    lengths = np.diff(offsets)[full] + (before + after)
    ends = np.cumsum(lengths)
    framed = np.empty(int(ends[-1]) if len(ends) else 0, token_dtype(encoder.vocab_size))
    inner = np.ones(len(framed), bool)
    if before:
        inner[ends - lengths] = False
        framed[ends - lengths] = encoder.bos_id
    if after:
        inner[ends - 1] = False
        framed[ends - 1] = encoder.eos_id
    framed[inner] = ids
    return framed, lengths.astype(np.int32)


def load_encoder(settings: Settings) -> Encoder:
    """The encoder that settings name."""
    return encoders.load(Path(settings.tokenizer), settings.eos_token, settings.bos_token)


def main(connection: Connection, settings: Settings) -> None:
    """Serve until the other end closes, which it does also by dying."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    encoder: Encoder | None = None
    while True:
        try:
            block = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            encoder = encoder or load_encoder(settings)
            answer: Encoded | str = encode_block(block, settings, encoder)
        except Exception:  # whatever it is, the parent reports it
            answer = traceback.format_exc()
        try:
            connection.send(answer)
        except (BrokenPipeError, ConnectionError):
            return
