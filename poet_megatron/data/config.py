"""Settings of the training and validation data."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import NamedTuple

from poet_megatron.config.checks import at_least, one_of

PROTOCOLS = ("packed", "documents")


class BlendPart(NamedTuple):
    """One corpus of `data.blend`."""

    weight: float
    path: str


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Folders written by `poet-megatron prepare`: train.bin/.idx, valid.bin/.idx, tokenizer.model, manifest.json (docs/data_loading.md)."""

    path: str = ""
    """Folder of prepared data; with data.blend, the one whose validation part is evaluated (empty: the first of the blend)."""
    blend: str = ""
    """Several corpora to train on, as "0.7 DIR1 0.3 DIR2": shares of the sequences, of any sum. Quote a folder that has spaces."""
    protocol: str = "packed"
    """packed: documents one after the other, cut every model.seq_length tokens; documents: a truncated or padded sequence per document."""
    cache: str = ""
    """Folder for Megatron's sample index; empty means <path>/cache."""
    prefetch: int = 2
    """Micro-batches that a background thread loads ahead on every rank; 0 loads each when it is needed. Changes no result."""

    def __post_init__(self) -> None:
        one_of("data.protocol", self.protocol, PROTOCOLS)
        at_least("data.prefetch", self.prefetch, 0)
        parse_blend(self.blend)


def parse_blend(text: str) -> tuple[BlendPart, ...]:
    """Weights and folders of `data.blend`; empty text has none. Raises a ValueError that shows the text and what is wrong with it."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"data.blend is {text!r}: {str(error).lower()}") from error
    if len(words) % 2:
        raise ValueError(
            f"data.blend is {text!r}, {len(words)} words; it must be pairs of a weight and a folder, as in '0.7 DIR1 0.3 DIR2'"
        )
    parts = tuple(BlendPart(_weight(weight, path, text), path) for weight, path in zip(words[::2], words[1::2], strict=True))
    paths = [part.path for part in parts]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise ValueError(f"data.blend is {text!r}, which has {twice[0]} twice: name each folder once, with the sum of its weights")
    return parts


def format_blend(parts: tuple[BlendPart, ...]) -> str:
    """The text of `data.blend` that `parse_blend` reads back to `parts`."""
    return shlex.join(word for part in parts for word in (repr(part.weight), part.path))


def _weight(word: str, path: str, text: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not (weight > 0 and math.isfinite(weight)):
        raise ValueError(f"data.blend is {text!r}: the weight of {path} is {word!r}; it must be a number above 0, followed by its folder")
    return weight
