"""The corpora that a run trains on: the folder of data.path, or those of data.blend, which must have one tokenizer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from data_prep.manifest import TOKENIZER_NAME, Manifest
from poet_megatron.data.config import BlendPart, DataConfig, format_blend, parse_blend
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Prepared data and its weight in the blend."""

    data: PreparedData
    weight: float


def resolve_data(config: DataConfig) -> DataConfig:
    """The settings with absolute paths, and with data.path where only data.blend is given: what a checkpoint keeps."""
    parts = tuple(BlendPart(part.weight, str(Path(part.path).resolve())) for part in parse_blend(config.blend))
    path = config.path or (parts[0].path if parts else "")
    return dataclasses.replace(config, blend=format_blend(parts), path=_absolute(path), cache=_absolute(config.cache))


def open_corpora(config: DataConfig, vocab_size: int, seq_length: int) -> tuple[Corpus, ...]:
    """Open what `config` names and check it against the model; a mistake is a UserError here, before anything is trained."""
    parts = parse_blend(config.blend) or (BlendPart(1.0, config.path),)
    folders = dict.fromkeys(Path(path).resolve() for path in [*(part.path for part in parts), config.path] if path)
    if len(folders) > 1:
        _check_one_tokenizer(list(folders))
    return tuple(Corpus(PreparedData.open(part.path, vocab_size, seq_length), part.weight) for part in parts)


def _absolute(path: str) -> str:
    return str(Path(path).resolve()) if path else ""


def _check_one_tokenizer(folders: list[Path]) -> None:
    """Ids of one tokenizer are noise to a model that learns another's."""
    hashes = [Manifest.load(folder).tokenizer_sha256 for folder in folders]
    for folder, digest in zip(folders, hashes, strict=True):
        if digest != hashes[0]:
            raise UserError(
                f"data.blend mixes tokenizers: {folders[0]} was made with one of sha256 {hashes[0][:12]}, {folder} with {digest[:12]}: "
                f"prepare {folder} again with --tokenizer {folders[0] / TOKENIZER_NAME}"
            )
