"""The batch that the model is fed: a dict of tensors, [sequences, seq_length] each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Batch = dict[str, torch.Tensor]
"""tokens, labels, position_ids (int64) and loss_mask (float32)."""
KEYS = ("tokens", "labels", "loss_mask", "position_ids")
FILLER = 0
"""Token at places whose loss is masked."""
Tokens = npt.NDArray[np.int64]


def default_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def stack(samples: Sequence[Batch], device: torch.device) -> Batch:
    """Stack single sequences and move them; from pinned memory and without waiting where the device is a GPU."""
    return move(collate(samples, pinned=device.type == "cuda"), device)


def collate(samples: Sequence[Batch], *, pinned: bool) -> Batch:
    """Stack single sequences in CPU memory. NumPy does it, since a thread that calls torch would get OpenMP threads of its own."""
    batch = {key: torch.from_numpy(np.stack([sample[key].numpy() for sample in samples])) for key in KEYS}
    return {key: value.pin_memory() for key, value in batch.items()} if pinned else batch


def move(batch: Batch, device: torch.device) -> Batch:
    """Copy to a GPU on the current stream, without waiting for it if the batch is pinned; a CPU batch stays what it is."""
    return batch if device.type == "cpu" else {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def padded(inputs: Tokens, labels: Tokens, seq_length: int) -> Batch:
    """One sequence; inputs and labels have the same length, at most seq_length, and the places behind them are masked."""
    places = np.full((2, seq_length), FILLER, np.int64)
    places[0, : len(inputs)], places[1, : len(labels)] = inputs, labels
    mask = np.zeros(seq_length, np.float32)
    mask[: len(labels)] = 1.0
    return {
        "tokens": torch.from_numpy(places[0]),
        "labels": torch.from_numpy(places[1]),
        "loss_mask": torch.from_numpy(mask),
        "position_ids": torch.from_numpy(np.arange(seq_length)),
    }
