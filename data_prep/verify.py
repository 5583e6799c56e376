"""Checks of tokenized data against its manifests: hashes, counts, index, ids, ends of documents; and samples for the eye."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import encoders
from data_prep.encoders import Encoder
from data_prep.files import sha256_of
from data_prep.indexed import HEADER, HEADER_BYTES, IndexedTokens, bin_path, idx_path, read_indexed
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest
from data_prep.merge import Collection
from data_prep.parts import part_name
from data_prep.settings import PLAN_NAME
from poet_megatron.errors import UserError

SAMPLES = 3
SAMPLE_TOKENS = 40
SCAN = 1 << 22


@dataclass
class Findings:
    """What `verify` looked at."""

    files: int = 0
    documents: int = 0
    tokens: int = 0
    problems: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)
    """Beginnings of documents, decoded."""


@dataclass(frozen=True)
class _Rules:
    """What must hold for every document."""

    vocab_size: int
    eos_id: int
    """-1 if documents do not end in it."""


def verify(folder: Path, *, check_sources: bool = False, tokenizer: Path | None = None, samples: int = SAMPLES) -> Findings:
    """Check a folder of parts or a merged one; problems of the data are collected, a folder that is neither is a UserError."""
    findings = Findings()
    if (folder / PLAN_NAME).exists():
        collection = Collection.load(folder)
        _check_parts(collection, findings, check_sources)
        if not findings.problems:
            findings.samples = list(_samples(*_of_parts(collection, tokenizer), samples))
    elif (folder / MANIFEST_NAME).exists():
        manifest = Manifest.load(folder)
        _check_merged(folder, manifest, findings)
        if check_sources:
            sources = manifest.request.inputs + manifest.request.valid_inputs
            _check_sources(({"name": source.name, "sha256": source.sha256} for source in sources), findings)
        if not findings.problems:
            findings.samples = list(_samples([folder / split for split in SPLITS], _merged_encoder(folder, manifest, tokenizer), samples))
    else:
        made = "made by prepare tokenize, merge or prepare --output"
        raise UserError(f"{folder} has neither {PLAN_NAME} nor {MANIFEST_NAME}: name a folder {made}")
    return findings


def _of_parts(collection: Collection, tokenizer: Path | None) -> tuple[list[Path], Encoder | None]:
    """Prefixes of all files of parts and, if its file is there, the tokenizer."""
    settings, splits = collection.plan.settings, [(part, split) for part in collection.parts for split in SPLITS]
    prefixes = [collection.folder / f"{part_name(part.part)}.{split}" for part, split in splits if part.splits[split]["documents"]]
    path = tokenizer or Path(settings["tokenizer"])
    return prefixes, encoders.load(path, settings["eos_token"], settings["bos_token"], native=False) if path.exists() else None


def _check_parts(collection: Collection, findings: Findings, check_sources: bool) -> None:
    plan = collection.plan
    rules = _Rules(plan.tokenizer["vocab_size"], plan.tokenizer["eos_id"] if plan.settings["eos"] else -1)
    for part in collection.parts:
        for split, counts in part.splits.items():
            if counts["documents"]:
                _check_pair(collection.folder / f"{part_name(part.part)}.{split}", counts, rules, findings)
        documents = sum(counts["documents"] for counts in part.splits.values())
        left_out = sum(found["count"] for group in (part.skipped, part.filtered) for found in group.values())
        if documents + left_out != part.records:
            findings.problems.append(
                f"{part_name(part.part)}: {documents} documents and {left_out} left out do not make {part.records} records"
            )
    if check_sources:
        _check_sources((part.source for part in collection.parts), findings)


def _check_merged(folder: Path, manifest: Manifest, findings: Findings) -> None:
    if not manifest.complete:
        raise UserError(f"{folder} is incomplete: run the command that makes it again")
    settings = manifest.details.get("settings", [{"eos": True}])
    rules = _Rules(manifest.vocab_size, manifest.eos_id if settings[0]["eos"] else -1)
    for split, counts in manifest.splits.items():
        wanted = {name: getattr(counts, name) for name in ("documents", "tokens", "bin_bytes", "idx_bytes", "bin_sha256")}
        if counts.idx_sha256:
            wanted["idx_sha256"] = counts.idx_sha256
        _check_pair(folder / split, wanted, rules, findings)
    kept = folder / TOKENIZER_NAME
    if not kept.is_file():
        findings.problems.append(f"{kept}: missing")
    elif sha256_of(kept) != manifest.tokenizer_sha256:
        findings.problems.append(f"{kept}: sha256 differs from the manifest's")


def _check_pair(prefix: Path, wanted: dict[str, Any], rules: _Rules, findings: Findings) -> None:
    """Check a .bin and its .idx."""
    found: dict[str, Any] = {}
    for kind, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        if not path.is_file():
            findings.problems.append(f"{path}: missing")
            return
        findings.files += 1
        found[f"{kind}_bytes"] = path.stat().st_size
        if f"{kind}_sha256" in wanted:
            found[f"{kind}_sha256"] = sha256_of(path)
    try:
        data = read_indexed(prefix)
    except (UserError, ValueError) as error:
        findings.problems.append(str(error))
        return
    found |= {"documents": len(data), "tokens": int(data.starts[-1])}
    for name, value in found.items():
        if name in wanted and wanted[name] != value:
            findings.problems.append(f"{prefix}: {name} is {value}, its manifest says {wanted[name]}")
    findings.documents += len(data)
    findings.tokens += int(data.starts[-1])
    findings.problems += [f"{prefix}: {problem}" for problem in (*_index_problems(prefix, data), *_token_problems(data, rules))]


def _index_problems(prefix: Path, data: IndexedTokens) -> Iterator[str]:
    """The parts of the index that `read_indexed` does not use: byte pointers and document boundaries."""
    content = np.memmap(idx_path(prefix), np.uint8, "r")
    count, boundaries = struct.unpack_from("<QQ", bytes(content[len(HEADER) + 9 : HEADER_BYTES]))
    if boundaries != count + 1 or len(content) != HEADER_BYTES + 12 * count + 8 * boundaries:
        yield f"the index has {len(content)} bytes and {boundaries} boundaries for {count} documents"
        return
    pointers = np.frombuffer(content, np.int64, count, HEADER_BYTES + 4 * count)
    documents = np.frombuffer(content, np.int64, count + 1, HEADER_BYTES + 12 * count)
    itemsize, pieces = data.tokens.dtype.itemsize, list(_pieces(count))
    if not all(np.array_equal(pointers[piece], data.starts[piece] * itemsize) for piece in pieces):
        yield "byte pointers do not follow from the lengths"
    if documents[count] != count or not all(np.array_equal(documents[piece], np.arange(piece.start, piece.stop)) for piece in pieces):
        yield "document boundaries are not one per sequence"
    if any((data.starts[piece.start + 1 : piece.stop + 1] <= data.starts[piece]).any() for piece in pieces):
        yield "a document is empty"


def _token_problems(data: IndexedTokens, rules: _Rules) -> Iterator[str]:
    for piece in _pieces(len(data.tokens)):
        tokens = data.tokens[piece]
        if int(tokens.max()) >= rules.vocab_size or int(tokens.min()) < 0:
            yield f"an id among tokens {piece.start} to {piece.stop - 1} is outside the vocabulary of {rules.vocab_size}"
    ends = (data.starts[piece.start + 1 : piece.stop + 1] - 1 for piece in _pieces(len(data)))
    if rules.eos_id >= 0 and any((data.tokens[last] != rules.eos_id).any() for last in ends):
        yield f"a document does not end in the end-of-sequence token {rules.eos_id}"


def _pieces(count: int) -> Iterator[slice]:
    """The numbers up to `count` in slices that fit into memory: an index of C4 takes 7 GB."""
    return (slice(first, min(first + SCAN, count)) for first in range(0, count, SCAN))


def _check_sources(sources: Any, findings: Findings) -> None:
    for source in sources:
        path = Path(source["name"])
        if not source["sha256"] or source["name"].startswith("hf://"):
            continue
        if not path.is_file():
            findings.problems.append(f"source {path}: missing")
        elif sha256_of(path) != source["sha256"]:
            findings.problems.append(f"source {path}: sha256 differs from the manifest's")


def _merged_encoder(folder: Path, manifest: Manifest, tokenizer: Path | None) -> Encoder:
    """The folder's tokenizer, or the one given."""
    names = {name: manifest.details.get("settings", [{}])[0].get(name, "") for name in ("eos_token", "bos_token")}
    return encoders.load(tokenizer or folder / TOKENIZER_NAME, **names, native=False)


def _samples(prefixes: list[Path], encoder: Encoder | None, count: int) -> Iterator[str]:
    """Beginnings of some documents, the same ones each time."""
    if encoder is None:
        return
    for number in range(count if prefixes else 0):
        prefix = prefixes[number * len(prefixes) // count]
        data = read_indexed(prefix)
        if len(data):
            seed = hashlib.sha256(f"{prefix.name} {number}".encode()).digest()
            chosen = int.from_bytes(seed[:8]) % len(data)
            ids = data.document(chosen)
            text = encoder.decode([int(token) for token in ids[:SAMPLE_TOKENS]])
            yield f"{prefix.name}, document {chosen}, {len(ids)} tokens: {text!r}"
