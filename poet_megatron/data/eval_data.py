"""Validation batches: every token once, or the protocol of published tables.

Every data-parallel rank gets the same number of batches of the same shape; places without a sequence are fully masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from data_prep.indexed import read_indexed
from poet_megatron.data.batch import Batch, Tokens, default_device, padded, stack
from poet_megatron.errors import UserError


class EvalBatches:
    """A sized iterable over this rank's batches; sequences are dealt to the ranks in turn, a batch at a time."""

    def __init__(
        self,
        load: Callable[[int], tuple[Tokens, Tokens]],
        count: int,
        seq_length: int,
        batch_size: int,
        dp_rank: int,
        dp_size: int,
        device: torch.device | None,
    ):
        if batch_size < 1:
            raise UserError(f"train.eval_batch_size is {batch_size}; it must be at least 1")
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank}; it must be in 0..{dp_size - 1}")
        self._load, self._count, self._seq_length = load, count, seq_length
        self._batch_size, self._dp_rank, self._dp_size = batch_size, dp_rank, dp_size
        self._device = device or default_device()

    def __len__(self) -> int:
        """Forward passes, the same on every rank."""
        return -(-self._count // (self._batch_size * self._dp_size))

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            first = (number * self._dp_size + self._dp_rank) * self._batch_size
            yield stack([self._sample(index) for index in range(first, first + self._batch_size)], self._device)

    def _sample(self, index: int) -> Batch:
        """One padded sequence; inputs and labels have the same length, at most seq_length."""
        nothing = np.zeros(0, np.int64)
        inputs, labels = self._load(index) if index < self._count else (nothing, nothing)
        return padded(inputs, labels, self._seq_length)


def packed_eval_batches(
    prefix: Path,
    seq_length: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_tokens: int = 0,
    device: torch.device | None = None,
) -> EvalBatches:
    """The documents one after the other, cut every `seq_length` tokens: each token is a label exactly once, the last window is padded.

    The very first token follows an end-of-sequence token, as in training. `max_tokens` > 0 evaluates only the first ones.
    """
    tokens = read_indexed(prefix).tokens
    total = min(len(tokens), max_tokens) if max_tokens else len(tokens)

    def load(index: int) -> tuple[Tokens, Tokens]:
        start, stop = index * seq_length, min((index + 1) * seq_length, total)
        before = tokens[start - 1 : start] if start else tokens[-1:]  # a document, so the data, ends with eos
        return np.concatenate([before, tokens[start : stop - 1]]).astype(np.int64), tokens[start:stop].astype(np.int64)

    return EvalBatches(load, -(-total // seq_length), seq_length, batch_size, dp_rank, dp_size, device)


def reference_protocol_batches(
    prefix: Path,
    seq_length: int,
    batch_size: int,
    dp_rank: int = 0,
    dp_size: int = 1,
    max_tokens: int = 0,
    device: torch.device | None = None,
) -> EvalBatches:
    """The evaluation of published tables: one sequence per document, of at most `seq_length` tokens.

    A longer document loses its end but keeps its end-of-sequence token (so T5's tokenizer truncates); the first token of a document is
    no label, so a sequence has at most seq_length - 1 labels and its last place is masked. `max_tokens` > 0 stops after the document that
    reaches that many.
    """
    data = read_indexed(prefix)
    lengths = np.minimum(np.diff(data.starts), seq_length)
    count = int(np.searchsorted(np.cumsum(lengths), max_tokens)) + 1 if max_tokens else len(data)

    def load(index: int) -> tuple[Tokens, Tokens]:
        document = data.document(index)
        if len(document) > seq_length:
            document = np.concatenate([document[: seq_length - 1], document[-1:]])
        return document[:-1].astype(np.int64), document[1:].astype(np.int64)

    return EvalBatches(load, min(count, len(data)), seq_length, batch_size, dp_rank, dp_size, device)
