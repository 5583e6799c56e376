"""Parts: what one source became. `part-00012.train.bin/.idx`, `.valid.bin/.idx` (a split without documents has no files), and
`part-00012.json`, which is written last: a part with it is complete, one without it is made again."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.dedup import SeenHashes
from data_prep.files import write_atomically
from data_prep.indexed import IndexedWriter, bin_path, idx_path
from data_prep.lengths import Lengths
from data_prep.manifest import SPLITS
from data_prep.sources import Identity
from data_prep.worker import Encoded
from poet_megatron.errors import UserError

SHOWN_POSITIONS = 20
"""Record numbers that a manifest lists for each reason."""
DUPLICATE = "duplicate"
HASH_BYTES = np.dtype(np.uint64).itemsize
FORMAT = 1


def part_name(number: int) -> str:
    """Name of a part without endings."""
    return f"part-{number:05d}"


@dataclass
class Skips:
    """Records left out, by reason."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[int]] = field(default_factory=dict)
    """Record numbers of the first of each reason."""

    def add(self, number: int, reason: str) -> None:
        """Count one record."""
        self.counts[reason] += 1
        shown = self.first.setdefault(reason, [])
        if len(shown) < SHOWN_POSITIONS:
            shown.append(number)

    def as_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {reason: {"count": self.counts[reason], "first_records": self.first[reason]} for reason in sorted(self.counts)}


@dataclass(frozen=True, kw_only=True)
class PartManifest:
    """Content of part-N.json. `records` = documents of all splits + skipped + filtered."""

    format: int = FORMAT
    part: int
    plan: str
    """Fingerprint of the plan."""
    source: dict[str, Any]
    """Name, bytes and sha256."""
    records: int
    splits: dict[str, dict[str, Any]]
    """Documents, tokens, text_bytes and, if there are documents, sizes and hashes of the files."""
    skipped: dict[str, Any]
    filtered: dict[str, Any]
    """Left out on request: duplicates and C4's rules."""
    lengths: dict[str, Any]
    versions: dict[str, str]
    command: list[str]

    @classmethod
    def load(cls, folder: Path, number: int) -> PartManifest | None:
        """The manifest of a part, None if the part was not finished."""
        path = folder / f"{part_name(number)}.json"
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{path} cannot be read ({error}): remove it, then tokenize again makes this part anew") from error

    def damage(self, folder: Path, with_hashes: bool = False) -> str | None:
        """What is missing or has another size, or None; `with_hashes` looks at the hashes of its documents too."""
        filled = [(split, counts) for split, counts in self.splits.items() if counts["documents"]]
        wanted = {f"{split}.{kind}": counts[f"{kind}_bytes"] for split, counts in filled for kind in ("bin", "idx")}
        if with_hashes:
            wanted["hashes"] = HASH_BYTES * sum(counts["documents"] for _, counts in filled)
        for ending, size in wanted.items():
            path = folder / f"{part_name(self.part)}.{ending}"
            if not path.is_file():
                return f"{path} is missing"
            if (found := path.stat().st_size) != size:
                return f"{path} has {found} bytes instead of {size}"
        return None


def remove_remains(folder: Path, number: int) -> None:
    """Remove what a run that was killed left of a part."""
    name = part_name(number)
    for pattern in (f".{name}.*.tmp", f"{name}.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


class PartWriter:
    """Writes the documents of one source; `commit` makes them a part, leaving the `with` block without it removes them."""

    def __init__(self, folder: Path, number: int, dtype: type[np.integer], valid_fraction: float, seen: SeenHashes | None):
        self.folder, self.number = folder, number
        self.skips, self.filtered, self.lengths = Skips(), Skips(), Lengths()
        self.records = 0
        self._threshold, self._seen = valid_fraction, seen
        self._text_bytes: Counter[str] = Counter()
        self._new_hashes: list[npt.NDArray[np.uint64]] = []
        self._stack = contextlib.ExitStack()
        self._writers = {name: IndexedWriter(folder / f"{part_name(number)}.{name}", dtype) for name in SPLITS}

    @property
    def tokens(self) -> int:
        """Tokens so far."""
        return sum(writer.tokens for writer in self._writers.values())

    def add(self, block: Encoded) -> None:
        """Append the documents of a block."""
        self.records += block.records
        for number, reason in block.skipped:
            self.skips.add(number, reason)
        for number, reason in block.filtered:
            self.filtered.add(number, reason)
        keep = np.ones(len(block.lengths), bool)
        if self._seen is not None:
            keep = self._seen.add(block.hashes)
            self._new_hashes.append(block.hashes[keep])
            for number in block.numbers[~keep].tolist():
                self.filtered.add(number, DUPLICATE)
        self.lengths.add(block.lengths[keep])
        valid = (block.hashes.astype(np.float64) / 2**64 < self._threshold) | (self._threshold == 1)
        for name, chosen in (("train", keep & ~valid), ("valid", keep & valid)):
            self._writers[name].add_batch(block.ids[np.repeat(chosen, block.lengths)], block.lengths[chosen])
            self._text_bytes[name] += int(block.text_bytes[chosen].sum())

    def __enter__(self) -> PartWriter:
        with contextlib.ExitStack() as stack:  # what is open already is closed if the next cannot be opened
            for writer in self._writers.values():
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.__exit__(*(exception if exception[0] else (_Abandoned, _Abandoned(), None)))

    def commit(self, plan: str, name: str, identity: Identity, versions: dict[str, str], command: list[str]) -> PartManifest:
        """Give all files their names, the manifest last."""
        self._stack.close()
        manifest = PartManifest(
            part=self.number,
            plan=plan,
            source={"name": name, **asdict(identity)},
            records=self.records,
            splits={split: self._counts(split, writer) for split, writer in self._writers.items()},
            skipped=self.skips.as_dict(),
            filtered=self.filtered.as_dict(),
            lengths=self.lengths.as_dict(),
            versions=versions,
            command=command,
        )
        if self._seen is not None:
            write_atomically(hashes_path(self.folder, self.number), np.concatenate([np.zeros(0, np.uint64), *self._new_hashes]).tobytes())
        content = json.dumps(asdict(manifest), indent=1) + "\n"
        write_atomically(self.folder / f"{part_name(self.number)}.json", content.encode())
        return manifest

    def _counts(self, split: str, writer: IndexedWriter) -> dict[str, Any]:
        counts: dict[str, Any] = {"documents": writer.documents, "tokens": writer.tokens, "text_bytes": self._text_bytes[split]}
        files = {"bin": bin_path(writer.prefix), "idx": idx_path(writer.prefix)}
        if not writer.documents:
            for path in files.values():
                path.unlink()
            return counts
        counts |= {f"{kind}_bytes": path.stat().st_size for kind, path in files.items()}
        return counts | {"bin_sha256": writer.sha256, "idx_sha256": writer.index_sha256}


class _Abandoned(Exception):
    """Tells the writers to remove their files."""


def hashes_path(folder: Path, number: int) -> Path:
    """File of the hashes of a part's documents, kept if duplicates are dropped."""
    return folder / f"{part_name(number)}.hashes"


def load_hashes(folder: Path, number: int) -> npt.NDArray[np.uint64]:
    """Hashes of a finished part."""
    return np.fromfile(hashes_path(folder, number), np.uint64)
