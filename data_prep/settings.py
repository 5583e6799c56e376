"""What the tokens are a function of, and the plan that every task of an array and every later run must share."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.encoders import Encoder
from data_prep.files import create_atomically
from data_prep.sources import Source
from poet_megatron.errors import UserError

PLAN_NAME = "plan.json"
FORMAT = 1
MAX_DOCUMENT_BYTES = 4 << 20
VALID_FRACTION = 0.001


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything but the sources that decides the bytes of a part."""

    tokenizer: str
    """Path of the tokenizer's file."""
    eos_token: str = ""
    bos_token: str = ""
    eos: bool = True
    """Append the end-of-sequence token to each document."""
    bos: bool = False
    """Put the begin-of-sequence token before each document."""
    text_key: str = "text"
    valid_fraction: float = VALID_FRACTION
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    c4_filters: bool = False
    dedup: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction <= 1:
            raise UserError(f"--valid-fraction is {self.valid_fraction}; it must be between 0 (all training) and 1 (all validation)")
        if self.max_document_bytes < 1:
            raise UserError(f"--max-document-bytes is {self.max_document_bytes}; it must be at least 1")

    def check(self, encoder: Encoder) -> None:
        """The special tokens asked for must exist."""
        if self.eos and encoder.eos_id < 0:
            raise UserError(f"tokenizer {self.tokenizer} has no end-of-sequence token: name it with --eos-token, or give --no-eos")
        if self.bos and encoder.bos_id < 0:
            raise UserError(f"tokenizer {self.tokenizer} has no begin-of-sequence token: name it with --bos-token, or leave out --bos")


@dataclass(frozen=True)
class Shard:
    """Share `number` of `count` equal shares of the sources: every `count`-th one."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From `i/N`, with i from 0 to N - 1."""
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise UserError(
                f"--shard {text} is not i/N with i from 0 to N - 1: for a Slurm array, $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
            )
        return cls(int(number), int(count))

    def holds(self, part: int) -> bool:
        """Whether a part is made by this share."""
        return part % self.count == self.number


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Content of plan.json: written by the first run, compared by all others."""

    format: int = FORMAT
    settings: dict[str, Any]
    tokenizer: dict[str, Any]
    """Kind, hash, vocabulary and special ids of the tokenizer."""
    sources: list[dict[str, Any]]
    """Name and size of each, part 0 first."""
    shards: int = 0
    """Number of shares if duplicates are dropped, which is done within a share."""

    @classmethod
    def of(cls, settings: Settings, encoder: Encoder, sources: Sequence[Source], shard: Shard) -> Plan:
        """The plan of a request."""
        return cls(
            settings=asdict(settings),
            tokenizer={name: getattr(encoder, name) for name in ("kind", "sha256", "vocab_size", "eos_id", "bos_id")},
            sources=[{"name": source.name, "bytes": source.bytes} for source in sources],
            shards=shard.count if settings.dedup else 0,
        )

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read plan.json."""
        path = folder / PLAN_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] > FORMAT:
                raise UserError(f"{path} has format {content['format']}; this release reads formats up to {FORMAT}: upgrade poet-megatron")
            return cls(**content)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: {folder} is no folder of parts made by poet-megatron prepare tokenize") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} cannot be read ({error}): tokenize into another folder") from error

    def fingerprint(self) -> str:
        """Hash by which a part knows its plan; tokenizer and sources may move together, their content and order may not change."""
        settings = {**self.settings, "tokenizer": ""}
        names = [(name, source["bytes"]) for name, source in zip(self._moved_names(), self.sources, strict=True)]
        content = json.dumps([self.format, settings, self.tokenizer, names, self.shards], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def _moved_names(self) -> list[str]:
        """Names of the sources without the folder that they share."""
        names = [source["name"] for source in self.sources]
        if not names or not all(name.startswith("/") for name in names):
            return names
        shared = os.path.commonpath([os.path.dirname(name) for name in names])  # noqa: PTH120
        return [os.path.relpath(name, shared) for name in names]

    def establish(self, folder: Path) -> None:
        """Write the plan into `folder`, or check that the one there is the same; of tasks that begin together one writes it."""
        content = (json.dumps(asdict(self), indent=1) + "\n").encode()
        if not (folder / PLAN_NAME).exists() and create_atomically(folder / PLAN_NAME, content):
            return
        earlier = Plan.load(folder)
        if earlier.fingerprint() != self.fingerprint():
            raise UserError(
                f"{folder} holds parts of another request ({'; '.join(self._differences(earlier))}): repeat the first command, "
                "or choose another --output"
            )

    def _differences(self, earlier: Plan) -> list[str]:
        found = []
        for name in (item.name for item in fields(Settings) if item.name != "tokenizer"):
            before, after = earlier.settings.get(name), self.settings[name]
            if before != after:
                found.append(f"{name} was {before!r}, is {after!r}")
        if earlier.tokenizer != self.tokenizer:
            found.append(f"tokenizer was {earlier.tokenizer['sha256'][:12]}, is {self.tokenizer['sha256'][:12]}")
        if len(earlier.sources) != len(self.sources):
            found.append(f"it was {len(earlier.sources)} sources, is {len(self.sources)}")
        elif earlier.sources != self.sources:
            pairs = zip(earlier.sources, self.sources, strict=True)
            old, new = next((old, new) for old, new in pairs if old != new)
            found.append(f"a source was {old['name']} ({old['bytes']} bytes), is {new['name']} ({new['bytes']} bytes)")
        if earlier.shards != self.shards:
            found.append(f"with --dedup the number of shards must stay {earlier.shards}, is {self.shards}")
        return found
