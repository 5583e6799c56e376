"""Settings of the training and validation data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A folder written by `poet-megatron prepare`: train.bin/.idx, valid.bin/.idx, tokenizer.model, manifest.json."""

    path: str = ""
    """Folder of prepared data."""
    cache: str = ""
    """Folder for Megatron's sample index; empty means <path>/cache."""
