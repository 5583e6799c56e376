"""The batch that the model is fed: a dict of tensors, [sequences, seq_length] each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Batch = dict[str, torch.Tensor]
"""tokens, labels, position_ids (int64) and loss_mask (float32)."""
KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def default_device() -> torch.device:
    """The current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def stack(samples: Sequence[Batch], device: torch.device) -> Batch:
    """Stack single sequences and move them; from pinned memory and without waiting where the device is a GPU."""
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
    if device.type != "cuda":
        return batch
    return {key: value.pin_memory().to(device, non_blocking=True) for key, value in batch.items()}
