"""Micro-batches of each optimizer step, the same set of sequences for every data-parallel size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import torch
from megatron.core.datasets.gpt_dataset import GPTDataset

from poet_megatron.data.batch import Batch, default_device, stack
from poet_megatron.data.sample_index import build_train_dataset, order_fingerprint
from poet_megatron.errors import UserError

__all__ = ["TrainBatches", "TrainState", "build_train_dataset"]


class TrainState(TypedDict):
    """Position in the training data."""

    consumed_samples: int
    order: str
    """Fingerprint of the order of the sequences."""


class TrainBatches:
    """Step s (from 0) takes sequences s*G to (s+1)*G of the dataset's order; rank r of dp takes the r-th of dp equal, contiguous parts."""

    def __init__(
        self,
        dataset: GPTDataset,
        *,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        global_batch_size: int,
        device: torch.device | None = None,
    ):
        if global_batch_size % (micro_batch_size * dp_size):
            raise UserError(
                f"train.global_batch_size is {global_batch_size}; it must be a multiple of train.micro_batch_size x data-parallel size "
                f"= {micro_batch_size} x {dp_size}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank}; it must be in 0..{dp_size - 1}")
        self.dataset = dataset
        self.micro_batch_size, self.dp_rank, self.dp_size, self.global_batch_size = micro_batch_size, dp_rank, dp_size, global_batch_size
        self.device = device or default_device()
        self.consumed_samples = 0
        self._order = order_fingerprint(dataset)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches per step and rank."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

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
        share = self.global_batch_size // self.dp_size
        first = step * self.global_batch_size + self.dp_rank * share
        return (self._load(start) for start in range(first, first + share, self.micro_batch_size))

    def advance(self) -> None:
        """Count the next step as taken."""
        self.consumed_samples += self.global_batch_size

    def state_dict(self) -> TrainState:
        """Position for a checkpoint; the same on every rank and for every layout."""
        return {"consumed_samples": self.consumed_samples, "order": self._order}

    def load_state_dict(self, state: TrainState) -> None:
        """Continue after the steps taken; another order of the data is a UserError."""
        consumed = state["consumed_samples"]
        if state["order"] != self._order:
            raise UserError(
                f"the checkpoint stopped after {consumed} sequences of another data order ({state['order']}, here {self._order}): "
                "resume with its data.path, train.seed, model.seq_length, and train.steps x train.global_batch_size"
            )
        if consumed % self.global_batch_size:
            raise UserError(
                f"the checkpoint stopped after {consumed} sequences, which is no multiple of train.global_batch_size "
                f"{self.global_batch_size}: resume with the batch size it was made with"
            )
        self.consumed_samples = consumed

    def _load(self, start: int) -> Batch:
        return stack([self.dataset[index] for index in range(start, start + self.micro_batch_size)], self.device)
