"""Parts to a folder that training opens: train.bin/.idx, valid.bin/.idx, the tokenizer, lengths.svg and, last of all, manifest.json.

Parts are put end to end in the order of their sources, so the result depends on nothing else. Memory: the boundaries of one part.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.disk import DiskFullError, check_room, free_bytes, is_full, megabytes, unwritable
from data_prep.files import sha256_of, write_atomically, write_pieces
from data_prep.indexed import DTYPE_CODES, HEADER, HEADER_BYTES, bin_path, idx_path, token_dtype
from data_prep.lengths import Lengths, histogram_svg
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest, Request, Source, SplitCounts
from data_prep.parts import PartManifest, part_name
from data_prep.settings import PLAN_NAME, Plan
from data_prep.tokenizer_file import read_tokenizer
from poet_megatron.errors import UserError

COPY_BYTES = 8 << 20
PICTURE_NAME = "lengths.svg"


@dataclass(frozen=True)
class Collection:
    """A folder with all of its parts."""

    folder: Path
    plan: Plan
    parts: list[PartManifest]

    @classmethod
    def load(cls, folder: Path) -> Collection:
        """Read plan and parts; a missing or damaged part is a UserError."""
        plan = Plan.load(folder)
        found = [PartManifest.load(folder, number) for number in range(len(plan.sources))]
        missing = [number for number, part in enumerate(found) if part is None]
        if missing:
            first = ", ".join(f"{part_name(number)} ({plan.sources[number]['name']})" for number in missing[:3])
            raise UserError(
                f"{folder} lacks {len(missing)} of {len(found)} parts: {first}{' ...' if len(missing) > 3 else ''}: "
                "run poet-megatron prepare tokenize for all shards first"
            )
        parts = [part for part in found if part]
        for part in parts:
            if part.plan != plan.fingerprint():
                raise UserError(f"{folder / part_name(part.part)}.json belongs to another plan: remove it and tokenize again")
            if reason := part.damage(folder):
                raise UserError(f"{reason}: run poet-megatron prepare tokenize again, which makes this part anew")
        return cls(folder, plan, parts)


def merge(
    folders: Sequence[Path], output: Path, *, tokenizer: Path | None = None, force: bool = False, command: Sequence[str] = ()
) -> Manifest:
    """Join the parts of `folders` into `output`; all must have been made with one tokenizer and the same special tokens."""
    collections = [Collection.load(folder) for folder in folders]
    first = collections[0].plan
    for collection in collections[1:]:
        _check_alike(first, collection.plan, collections[0].folder, collection.folder)
    model = _kept_tokenizer(tokenizer or Path(first.settings["tokenizer"]), first)
    request = _request(collections)
    needed = sum(
        counts.get(f"{kind}_bytes", 0) for c in collections for p in c.parts for counts in p.splits.values() for kind in ("bin", "idx")
    )
    try:
        _prepare_output(output, request, force)
        check_room(output, needed, "merging the parts")
        splits = {name: _Join(collections, name, token_dtype(first.tokenizer["vocab_size"])).write(output / name) for name in SPLITS}
        write_atomically(output / TOKENIZER_NAME, model)
        lengths = _lengths(collections)
        write_atomically(output / PICTURE_NAME, histogram_svg(lengths).encode())
        manifest = _manifest(collections, request, splits, lengths, hashlib.sha256(model).hexdigest(), command)
        manifest.save(output)
    except OSError as error:
        if is_full(error):
            left = max(needed - free_bytes(output), 0)
            raise DiskFullError(
                f"no room left in {output} while merging, which takes {megabytes(needed)} ({megabytes(left)} are missing): the parts are "
                "untouched; free some and run the same command again"
            ) from error
        raise unwritable(error, output) from error
    return manifest


def _check_alike(first: Plan, other: Plan, folder: Path, other_folder: Path) -> None:
    for name in ("eos", "bos"):
        if first.settings[name] != other.settings[name]:
            raise UserError(f"{folder} and {other_folder} were made with different settings of {name}: tokenize one of them again")
    if first.tokenizer != other.tokenizer:
        raise UserError(
            f"{folder} and {other_folder} were made with different tokenizers ({first.tokenizer['sha256'][:12]}, "
            f"{other.tokenizer['sha256'][:12]}): tokenize one of them again"
        )


def _kept_tokenizer(path: Path, plan: Plan) -> bytes:
    """What the folder keeps of the tokenizer, whose file must be the one that made the parts."""
    if not path.exists():
        raise UserError(f"tokenizer {path} does not exist: say with --tokenizer where it is now")
    file = read_tokenizer(path)
    if file.sha256 != plan.tokenizer["sha256"]:
        raise UserError(f"tokenizer {path} is not the one that made the parts: give that file with --tokenizer")
    return file.kept(plan.tokenizer["eos_id"], plan.tokenizer["bos_id"])


def _prepare_output(output: Path, request: Request, force: bool) -> None:
    """Mark the folder as incomplete: a merge that is killed can be repeated, and nobody trains on its remains."""
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    if (output / PLAN_NAME).exists():
        raise UserError(f"{output} holds parts ({PLAN_NAME}): choose another --output")
    present = [name for name in (MANIFEST_NAME, "train.bin", "valid.bin") if (output / name).exists()]
    if present and not force and (present[0] != MANIFEST_NAME or Manifest.load(output).complete):
        raise UserError(f"{output} holds {present[0]}: choose another --output, or overwrite it with --force")
    output.mkdir(parents=True, exist_ok=True)
    Manifest(request=request).save(output)
    for pattern in (".*.tmp", *(f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx"))):
        for remains in output.glob(pattern):
            remains.unlink()


@dataclass
class _Join:
    """One split of all parts, end to end."""

    collections: Sequence[Collection]
    split: str
    dtype: type[np.integer]

    def pieces(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Prefix and counts of each part that has documents of this split."""
        for collection in self.collections:
            for part in collection.parts:
                if part.splits[self.split]["documents"]:
                    yield collection.folder / f"{part_name(part.part)}.{self.split}", part.splits[self.split]

    def write(self, prefix: Path) -> SplitCounts:
        """Write both files and return what they hold."""
        bin_file, idx_file = bin_path(prefix), idx_path(prefix)
        bin_sha256, idx_sha256 = write_pieces(bin_file, self._tokens()), write_pieces(idx_file, self._index())
        total = Counter[str]()
        for _, counts in self.pieces():
            total.update({name: counts[name] for name in ("documents", "tokens", "text_bytes")})
        return SplitCounts(
            documents=total["documents"],
            tokens=total["tokens"],
            text_bytes=total["text_bytes"],
            bin_bytes=bin_file.stat().st_size,
            idx_bytes=idx_file.stat().st_size,
            bin_sha256=bin_sha256,
            idx_sha256=idx_sha256,
        )

    def _tokens(self) -> Iterator[bytes]:
        """Content of the .bin files; one that changed since it was committed is a UserError."""
        for prefix, counts in self.pieces():
            path, digest = bin_path(prefix), hashlib.sha256()
            with path.open("rb") as stream:
                while piece := stream.read(COPY_BYTES):
                    digest.update(piece)
                    yield piece
            _check_hash(path, digest.hexdigest(), counts["bin_sha256"])

    def _index(self) -> Iterator[bytes]:
        """Content of the .idx file: header, lengths, byte pointers, document boundaries; a part's that changed is a UserError."""
        count = sum(counts["documents"] for _, counts in self.pieces())
        yield HEADER + struct.pack("<QBQQ", 1, DTYPE_CODES[self.dtype], count, count + 1)
        for prefix, counts in self.pieces():
            _check_hash(idx_path(prefix), sha256_of(idx_path(prefix)), counts["idx_sha256"])
            yield _part_lengths(prefix, counts["documents"]).tobytes()
        start = 0
        for prefix, counts in self.pieces():
            sizes = _part_lengths(prefix, counts["documents"]).astype(np.int64) * np.dtype(self.dtype).itemsize
            ends = np.cumsum(sizes) + start
            yield (ends - sizes).tobytes()
            start = int(ends[-1])
        for first in range(0, count + 1, COPY_BYTES):
            yield np.arange(first, min(first + COPY_BYTES, count + 1), dtype=np.int64).tobytes()


def _part_lengths(prefix: Path, count: int) -> npt.NDArray[np.int32]:
    return np.fromfile(idx_path(prefix), np.int32, count, offset=HEADER_BYTES)


def _check_hash(path: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise UserError(f"{path} is damaged (its hash differs from its manifest's): remove it, tokenize again and merge again")


def _lengths(collections: Sequence[Collection]) -> Lengths:
    total = Lengths()
    for collection in collections:
        for part in collection.parts:
            total.add_dict(part.lengths)
    return total


def _request(collections: Sequence[Collection]) -> Request:
    plan = collections[0].plan
    return Request(
        inputs=[Source(**part.source) for collection in collections for part in collection.parts],
        valid_inputs=[],
        vocab_size=plan.tokenizer["vocab_size"],
        tokenizer_sha256=plan.tokenizer["sha256"],
        valid_fraction=plan.settings["valid_fraction"],
    )


def _manifest(
    collections: Sequence[Collection],
    request: Request,
    splits: dict[str, SplitCounts],
    lengths: Lengths,
    kept_sha256: str,
    command: Sequence[str],
) -> Manifest:
    plan, parts = collections[0].plan, [part for collection in collections for part in collection.parts]
    skipped, filtered = Counter[str](), Counter[str]()
    for part in parts:
        skipped.update({reason: found["count"] for reason, found in part.skipped.items()})
        filtered.update({reason: found["count"] for reason, found in part.filtered.items()})
    return Manifest(
        complete=True,
        request=request,
        vocab_size=plan.tokenizer["vocab_size"],
        eos_id=plan.tokenizer["eos_id"],
        tokenizer_sha256=kept_sha256,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
        versions=parts[0].versions,
        command=list(command),
        details={
            "tokenizer": plan.tokenizer,
            "settings": [collection.plan.settings for collection in collections],
            "filtered": dict(sorted(filtered.items())),
            "records": sum(part.records for part in parts),
            "lengths": lengths.as_dict(),
            "parts": [
                {"source": part.source["name"], "splits": part.splits, "skipped": part.skipped, "filtered": part.filtered} for part in parts
            ],
        },
    )
