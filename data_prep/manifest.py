"""manifest.json: what a folder of prepared data holds and what it was made from. Written last, so its presence means complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.files import write_atomically
from poet_megatron.errors import UserError

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.model"
FORMAT = 1
SPLITS = ("train", "valid")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of documents; the embedded corpus has no file, and is named by its Python version."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything the prepared data is a function of."""

    inputs: list[Source]
    valid_inputs: list[Source]
    vocab_size: int
    tokenizer_sha256: str
    """Hash of the tokenizer given by the user; empty if one is trained."""
    valid_fraction: float
    """Share of documents held out for validation; 0 if validation has inputs of its own."""


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """Counts of one split and hashes of its files."""

    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str = ""
    """Empty in folders made before it was kept."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of manifest.json; `complete` is False while the folder is being written."""

    format: int = FORMAT
    complete: bool = False
    request: Request
    vocab_size: int = 0
    eos_id: int = -1
    tokenizer_sha256: str = ""
    splits: dict[str, SplitCounts] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    """What `prepare merge` adds: settings, filters, lengths, and the counts of each part with the positions of skipped records."""

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder` atomically."""
        write_atomically(folder / MANIFEST_NAME, (json.dumps(asdict(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read manifest.json of `folder`; a missing or malformed one is a UserError."""
        path = folder / MANIFEST_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist: make the data with poet-megatron prepare --output {folder}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read ({error}): run poet-megatron prepare --output {folder} --force") from error
        return _parse(content, path)


def _parse(content: Any, path: Path) -> Manifest:
    try:
        if content["format"] > FORMAT:
            raise UserError(f"{path} has format {content['format']}; this release reads formats up to {FORMAT}: upgrade poet-megatron")
        request = dict(content["request"])
        for key in ("inputs", "valid_inputs"):
            request[key] = [Source(**source) for source in request[key]]
        splits = {name: SplitCounts(**counts) for name, counts in content["splits"].items()}
        return Manifest(**{**content, "request": Request(**request), "splits": splits})
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of prepared data ({error}): run poet-megatron prepare with --force") from error


def damage(folder: Path, manifest: Manifest) -> str | None:
    """What keeps `folder` from being complete, or None: checks the presence and size of every file."""
    if not manifest.complete:
        return "an earlier prepare did not finish"
    wanted = {TOKENIZER_NAME: None} | {
        f"{name}.{kind}": size
        for name, counts in manifest.splits.items()
        for kind, size in (("bin", counts.bin_bytes), ("idx", counts.idx_bytes))
    }
    for name, size in wanted.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if size is not None and path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None
