"""Micro-batches of each optimizer step, the same set of sequences for every data-parallel size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypeAlias, TypedDict

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from poet_megatron.data.batch import Batch, collate, default_device, move
from poet_megatron.data.blend import BlendedSequences
from poet_megatron.data.corpora import Corpus
from poet_megatron.data.documents import DocumentSequences
from poet_megatron.data.prefetch import Prefetcher
from poet_megatron.data.sample_index import build_blend_index, build_train_dataset, order_fingerprint
from poet_megatron.errors import UserError

__all__ = ["Sequences", "TrainBatches", "TrainState", "build_train_dataset", "build_train_sequences", "describe"]

Sequences: TypeAlias = GPTDataset | DocumentSequences | BlendedSequences
"""Training sequences by number: `num_samples` of them at least, shuffled, in the same order on every rank."""


class TrainState(TypedDict):
    """Position in the training data."""

    consumed_samples: int
    order: str
    """Fingerprint of the order of the sequences."""
    global_batch_size: NotRequired[int]
    """Sequences per step; missing in checkpoints of before it was kept."""


def build_train_sequences(
    corpora: Sequence[Corpus], protocol: str, *, seq_length: int, samples: int, seed: int, cache: str | Path = ""
) -> Sequences:
    """The training sequences of a run: one corpus or a blend, by a protocol of `data.protocol`.

    Collective, like `build_train_dataset`. A corpus of a blend is read in its own order, as far as its share of `samples` goes.
    """
    if len(corpora) == 1:
        return _corpus_sequences(corpora[0], protocol, seq_length, samples, seed, cache)
    weights = [corpus.weight for corpus in corpora]
    index = build_blend_index(weights, samples, cache or corpora[0].data.path / "cache")
    parts = [
        _corpus_sequences(corpus, protocol, seq_length, max(1, int(count)), seed, cache)
        for corpus, count in zip(corpora, index.counts, strict=True)
    ]
    return BlendedSequences(parts, weights, index, [fingerprint(part) for part in parts])


def _corpus_sequences(
    corpus: Corpus, protocol: str, seq_length: int, samples: int, seed: int, cache: str | Path
) -> GPTDataset | DocumentSequences:
    if protocol == "documents":
        return DocumentSequences(corpus.data, seq_length=seq_length, samples=samples, seed=seed)
    return build_train_dataset(corpus.data, seq_length=seq_length, samples=samples, seed=seed, cache=cache)


def fingerprint(sequences: Sequences) -> str:
    """A short hash of the order of the sequences."""
    return order_fingerprint(sequences) if isinstance(sequences, GPTDataset) else sequences.fingerprint


def describe(sequences: Sequences, corpora: Sequence[Corpus]) -> list[str]:
    """For each corpus, a line that says how much of it the run will take."""
    if isinstance(sequences, BlendedSequences):
        shares = zip(corpora, sequences.weights, sequences.index.counts.tolist(), sequences.parts, strict=True)
    else:
        shares = zip(corpora, [1.0], [sequences.num_samples or len(sequences)], [sequences], strict=True)
    return [_described(corpus, weight, int(count), part) for corpus, weight, count, part in shares]


def _described(corpus: Corpus, weight: float, count: int, part: GPTDataset | DocumentSequences) -> str:
    data = corpus.data
    if isinstance(part, DocumentSequences):
        unit, have, epochs = "documents", part.documents, count / part.documents
    else:
        unit, have, epochs = "tokens", data.train_tokens, count * part.config.sequence_length / data.train_tokens
    return f"data: {weight:.2%} from {data.path}: {count:,} sequences, {epochs:.3g} epochs of its {have:,} {unit}"


@dataclass(frozen=True)
class _Place:
    """Which sequences this rank's micro-batches are; number n counts micro-batches from the start of the run."""

    sequences: Sequences
    micro_batch_size: int
    dp_rank: int
    dp_size: int
    global_batch_size: int
    pinned: bool

    @property
    def per_step(self) -> int:
        """Micro-batches per step and rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def load(self, number: int) -> Batch:
        """Micro-batch `number`, in CPU memory."""
        step, part = divmod(number, self.per_step)
        start = step * self.global_batch_size + self.dp_rank * (self.global_batch_size // self.dp_size) + part * self.micro_batch_size
        return collate([self.sequences[index] for index in range(start, start + self.micro_batch_size)], pinned=self.pinned)


class TrainBatches:
    """Step s (from 0) takes sequences s*G to (s+1)*G of the dataset's order; rank r of dp takes the r-th of dp equal, contiguous parts.

    With `prefetch` > 0 a background thread loads up to that many micro-batches ahead, across steps; only `advance` moves the position.
    """

    def __init__(
        self,
        dataset: Sequences,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        device: torch.device | None = None,
        prefetch: int = 0,
    ):
        if global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"train.global_batch_size is {global_batch_size}; it must be a multiple of train.micro_batch_size x data-parallel size "
                f"= {micro_batch_size} x {dp_size}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank}; it must be in 0..{dp_size - 1}")
        if prefetch < 0:
            raise UserError(f"data.prefetch is {prefetch}; it must be at least 0")
        self.dataset = dataset
        self.micro_batch_size, self.dp_rank, self.dp_size, self.global_batch_size = micro_batch_size, dp_rank, dp_size, global_batch_size
        self.device = device or default_device()
        self.consumed_samples = 0
        self._order = fingerprint(dataset)
        self._place = _Place(dataset, micro_batch_size, dp_rank, dp_size, global_batch_size, self.device.type == "cuda")
        self._ahead = Prefetcher(self._place.load, self.steps * self.num_microbatches, prefetch) if prefetch else None

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and rank."""
        return self._place.per_step

    @property
    def steps(self) -> int:
        """Steps that the dataset was built for."""
        return (self.dataset.num_samples or len(self.dataset)) // self.global_batch_size

    @property
    def step(self) -> int:
        """The step (from 0) whose micro-batches come next."""
        return self.consumed_samples // self.global_batch_size

    def micro_batches(self, step: int | None = None) -> Iterator[Batch]:
        """This rank's micro-batches of `step` (default: the next one). Changes no state: call `advance` once the step is taken."""
        step = self.step if step is None else step
        if not 0 <= step < self.steps:
            raise UserError(f"step {step + 1} has no training data: the dataset was built for {self.steps} steps; raise train.steps")
        first = step * self.num_microbatches
        return (self._load(number) for number in range(first, first + self.num_microbatches))

    def advance(self) -> None:
        """Count the next step as taken."""
        self.consumed_samples += self.global_batch_size

    def close(self) -> None:
        """End the background thread, if there is one; `micro_batches` starts it again."""
        if self._ahead:
            self._ahead.close()

    def state_dict(self) -> TrainState:
        """Position for a checkpoint; the same on every rank and for every layout."""
        return {"consumed_samples": self.consumed_samples, "order": self._order, "global_batch_size": self.global_batch_size}

    def load_state_dict(self, state: TrainState) -> None:
        """Continue after the steps taken; another order of the data or another batch size is a UserError."""
        consumed, batch_size = state["consumed_samples"], state.get("global_batch_size", self.global_batch_size)
        if state["order"] != self._order:
            raise UserError(
                f"the checkpoint stopped after {consumed} sequences of another data order ({state['order']}, here {self._order}): "
                "resume with its data.path or data.blend, data.protocol, train.seed, model.seq_length, "
                "and train.steps x train.global_batch_size"
            )
        if batch_size != self.global_batch_size:
            raise UserError(
                f"the checkpoint was written with train.global_batch_size {batch_size}; it is {self.global_batch_size} here: "
                "resume with the batch size it was made with"
            )
        if consumed % self.global_batch_size:
            raise UserError(
                f"the checkpoint stopped after {consumed} sequences, which is no multiple of train.global_batch_size "
                f"{self.global_batch_size}: resume with the batch size it was made with"
            )
        self.consumed_samples = consumed

    def _load(self, number: int) -> Batch:
        return move(self._ahead.get(number) if self._ahead else self._place.load(number), self.device)
