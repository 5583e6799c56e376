"""Writes safetensors files one tensor at a time, in any order, so that a model of any size needs the memory of one tensor.

All names, shapes and the dtype are known beforehand, so the headers and every tensor's place are fixed before the first tensor arrives.
(The safetensors package writes a file only from all of its tensors at once.)
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from poet_megatron.checkpoint.hf_layout import INDEX_FILE, shard_name

DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Names of the dtypes in a safetensors header."""


@dataclass(frozen=True)
class Place:
    """Where one tensor lies."""

    file: str
    start: int
    """Byte offset of the tensor from the end of the file's header."""
    size: int
    """Bytes of the tensor."""


def plan_shards(shapes: dict[str, Sequence[int]], dtype: torch.dtype, max_shard_bytes: int) -> dict[str, Place]:
    """Place tensors (`shapes`: name -> shape), in order, in files of at most `max_shard_bytes`; a larger tensor has its own file."""
    shards: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, size))
        filled += size
    places = {}
    for index, shard in enumerate(shards):
        start = 0
        for name, size in shard:
            places[name] = Place(shard_name(index, len(shards)), start, size)
            start += size
    return places


def _header(shapes: dict[str, Sequence[int]], places: dict[str, Place], file: str, dtype: torch.dtype) -> bytes:
    """The header of `file`: its length as 8 little-endian bytes, then JSON padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, place in places.items():
        if place.file == file:
            offsets = [place.start, place.start + place.size]
            entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shapes[name]), "data_offsets": offsets}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class ShardedWriter:
    """Writes tensors of one dtype into a folder's safetensors files; a context manager that closes and syncs them.

    shapes: name -> shape of every tensor that will come, in storage order.
    """

    def __init__(self, folder: Path, shapes: dict[str, Sequence[int]], dtype: torch.dtype, max_shard_bytes: int) -> None:
        self.places = plan_shards(shapes, dtype, max_shard_bytes)
        self.dtype = dtype
        self._shapes = shapes
        self._folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._data_start: dict[str, int] = {}

    def __enter__(self) -> ShardedWriter:
        for name in self.files:
            header = _header(self._shapes, self.places, name, self.dtype)
            self._files[name] = (self._folder / name).open("wb")
            self._files[name].write(header)
            self._data_start[name] = len(header)
        if len(self.files) > 1:
            self._write_index()
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            with file:
                file.flush()
                os.fsync(file.fileno())

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files, in order."""
        return list(dict.fromkeys(place.file for place in self.places.values()))

    def _write_index(self) -> None:
        """Write the index, which says in which file each tensor is."""
        total = sum(place.size for place in self.places.values())
        index = {"metadata": {"total_size": total}, "weight_map": {name: place.file for name, place in self.places.items()}}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor (any device; of the writer's dtype and the planned shape) to its place."""
        if tensor.dtype != self.dtype or tuple(tensor.shape) != tuple(self._shapes[name]):
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} does not fit the plan {self.dtype} {tuple(self._shapes[name])}")
        place = self.places[name]
        file = self._files[place.file]
        file.seek(self._data_start[place.file] + place.start)
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
