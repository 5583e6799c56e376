"""Packed training sequences through megatron-core's GPTDataset, and the cache of its sample index and of blends.

The cache is built by global rank 0 in a temporary folder and renamed, so that it is complete or absent, and its name is a hash of
everything it depends on, the content of train.bin included (Megatron's own key has only its path).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split

from poet_megatron.data.blend import BlendIndex
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError


class _TokenizerFacts:
    """What GPTDataset asks of a tokenizer. `pad` is an id that no data holds: the sequences have no padding."""

    def __init__(self, data: PreparedData):
        self.vocab_size, self.eod, self.pad = data.vocab_size, data.eos_id, -1
        self.special_tokens_dict = {"eos_token": data.eos_id}
        self.unique_identifiers = OrderedDict(tokenizer=data.manifest.tokenizer_sha256)


def build_train_dataset(data: PreparedData, *, seq_length: int, samples: int, seed: int, cache: str | Path = "") -> GPTDataset:
    """Training data as at least `samples` shuffled sequences of `seq_length` tokens and their successors.

    Collective: every rank of the default process group must call it, with a `cache` folder that all of them see ("" means <data>/cache).
    Up to one epoch, no token is a label twice. The order depends on seed, seq_length, the data and how many epochs `samples` needs.
    """
    content = data.manifest.splits["train"].bin_sha256
    folder = _folder(cache or data.path / "cache", [content, seq_length, samples, seed])

    def open_with(path: Path) -> GPTDataset:
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=seq_length,
            blend_per_split=[([str(data.train_prefix)], None), None, None],
            path_to_cache=str(path),
            tokenizer=_TokenizerFacts(data),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        low_level = GPTDataset.build_low_level_dataset(str(data.train_prefix), config)
        documents = np.arange(GPTDataset.numel_low_level_dataset(low_level), dtype=np.int32)
        return GPTDataset(low_level, content, documents, samples, Split.train, config)

    _on_rank_zero(lambda: _build(folder, open_with))
    _check(folder)
    return open_with(folder)


def build_blend_index(weights: Sequence[float], samples: int, cache: str | Path) -> BlendIndex:
    """Deal out sequences to corpora; cached and collective like `build_train_dataset`."""
    folder = _folder(cache, ["blend", list(weights), samples])
    _on_rank_zero(lambda: _build(folder, BlendIndex.build(weights, samples).save))
    _check(folder)
    return BlendIndex.load(folder)


def _folder(cache: str | Path, facts: list[Any]) -> Path:
    """Name of the cache of an index that is a function of `facts`."""
    key = json.dumps([*facts, importlib.metadata.version("megatron-core")])
    return Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:24]


def _build(folder: Path, write: Callable[[Path], object]) -> None:
    if folder.exists():
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        temporary.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another run was faster
            raise UserError(f"cannot write the sample index in {folder.parent} ({error}): set data.cache to a writable folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _on_rank_zero(build: Callable[[], None]) -> None:
    """Run `build` on rank 0 while the others wait; its failure is everybody's, so that no rank waits for ever."""
    if not dist.is_initialized():
        build()
        return
    failure: list[str | None] = [None]
    raised: Exception | None = None
    if dist.get_rank() == 0:
        try:
            build()
        except Exception as error:
            failure, raised = [f"{type(error).__name__}: {error}"], error
    dist.broadcast_object_list(failure, src=0)
    if raised is not None:
        raise raised
    if failure[0] is not None:
        raise UserError(f"rank 0 could not build the sample index: {failure[0]}")


def _check(folder: Path) -> None:
    """The index is there and holds plain arrays: GPTDataset itself would unpickle objects."""
    files = sorted(folder.glob("*.npy"))
    if len(files) != 3:
        raise UserError(f"sample index {folder} is not complete here ({len(files)} of 3 files): point data.cache to a folder all nodes see")
    for file in files:
        try:
            np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise UserError(f"sample index {file} is damaged ({error}): delete {folder}") from error


def order_fingerprint(dataset: GPTDataset) -> str:
    """A short hash of the order of the sequences, from evenly spaced entries of the index."""
    digest = hashlib.sha256(f"{dataset.dataset_path} {dataset.config.sequence_length}".encode())
    for index in (dataset.document_index, dataset.shuffle_index):
        digest.update(f"{len(index)} ".encode())
        digest.update(np.ascontiguousarray(index[:: max(1, len(index) // 4096)], dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]
