"""Sources to parts: reads, encodes and writes one source after the other, each committed before the next; continues where a run ended."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.dedup import SeenHashes
from data_prep.disk import DiskFullError, check_room, estimate, free_bytes, is_full, megabytes, unwritable
from data_prep.encoders import Encoder
from data_prep.indexed import token_dtype
from data_prep.parts import PartManifest, PartWriter, load_hashes, part_name, remove_remains
from data_prep.pool import WorkerPool
from data_prep.progress import Progress
from data_prep.settings import Plan, Settings, Shard
from data_prep.sources import Source
from data_prep.worker import Encoded, load_encoder
from poet_megatron.errors import UserError

HINT = "; if the estimate is wrong, --no-space-check begins all the same"
PACKAGES = ("poet-megatron", "numpy", "sentencepiece", "tokenizers")


@dataclass
class Totals:
    """Of the parts of one task, those of earlier runs included."""

    parts: int = 0
    reused: int = 0
    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    filtered: Counter[str] = field(default_factory=Counter)

    def add(self, part: PartManifest) -> None:
        """Count a part."""
        self.parts += 1
        for split, counts in part.splits.items():
            self.documents[split] += counts["documents"]
            self.tokens[split] += counts["tokens"]
            self.text_bytes += counts["text_bytes"]
        for counter, found in ((self.skipped, part.skipped), (self.filtered, part.filtered)):
            counter.update({reason: content["count"] for reason, content in found.items()})


def tokenize(
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    *,
    shard: Shard | None = None,
    workers: int = 1,
    strict: bool = False,
    check_space: bool = True,
    command: Sequence[str] = (),
) -> Totals:
    """Make a part of each source of `shard` in `output`, but for those that are there already."""
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    encoder = load_encoder(settings)
    settings.check(encoder)
    shard = shard or Shard()
    plan = Plan.of(settings, encoder, sources, shard)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    try:
        output.mkdir(parents=True, exist_ok=True)
        plan.establish(output)
        return _Run(sources, output, settings, plan, shard, encoder, strict, list(command)).run(workers, check_space)
    except OSError as error:
        if is_full(error):
            raise DiskFullError(f"no room left in {output} before the first part: free some and run the same command again") from error
        raise unwritable(error, output) from error


@dataclass
class _Run:
    """One call of `tokenize`."""

    sources: Sequence[Source]
    output: Path
    settings: Settings
    plan: Plan
    shard: Shard
    encoder: Encoder
    strict: bool
    command: list[str]
    totals: Totals = field(default_factory=Totals)

    def run(self, workers: int, check_space: bool) -> Totals:
        numbers = [number for number in range(len(self.sources)) if self.shard.holds(number)]
        finished = {number: part for number in numbers if (part := self._finished(number))}
        missing = [number for number in numbers if number not in finished]
        if finished:
            _say(f"{self.output}: {len(finished)} of {len(numbers)} parts are finished, {len(missing)} to go")
        self.totals.reused = len(finished)
        if check_space and missing:
            check_room(self.output, self._estimate(missing), f"tokenizing {len(missing)} sources", HINT)
        seen = SeenHashes() if self.settings.dedup else None
        if not missing:
            for part in finished.values():
                self.totals.add(part)
            return self.totals
        progress = Progress("tokenizing", sum(self.sources[number].bytes for number in missing))
        with WorkerPool(self.settings, workers) as pool:
            done = 0
            for number in numbers:
                if number in finished:
                    self.totals.add(finished[number])
                    if seen is not None:
                        seen.add(load_hashes(self.output, number))
                else:
                    left = missing[missing.index(number) :]
                    self.totals.add(self._make(number, pool, seen, progress, done, left))
                    done += self.sources[number].bytes
        progress.close()
        return self.totals

    def _finished(self, number: int) -> PartManifest | None:
        part = PartManifest.load(self.output, number)
        if part is None:
            return None
        if part.plan != self.plan.fingerprint():
            raise UserError(f"{self.output / part_name(number)}.json belongs to another request: choose another --output")
        if reason := part.damage(self.output, with_hashes=self.settings.dedup):
            _say(f"{part_name(number)} is made again: {reason}")
            return None
        return part

    def _make(self, number: int, pool: WorkerPool, seen: SeenHashes | None, progress: Progress, done: int, left: list[int]) -> PartManifest:
        """Tokenize one source and commit its part."""
        source = self.sources[number]
        remove_remains(self.output, number)
        reader = source.open(self.settings.text_key, self.settings.max_document_bytes)
        writer = PartWriter(self.output, number, token_dtype(self.encoder.vocab_size), self.settings.valid_fraction, seen)
        read = 0
        try:
            with writer:
                for block in pool.encode(reader.blocks()):
                    if self.strict and block.skipped:
                        self._stop(source, block)
                    writer.add(block)
                    read = block.position
                    progress.update(len(block.lengths), int(block.text_bytes.sum()), done + read)
                part = writer.commit(self.plan.fingerprint(), source.name, reader.identity(), versions(self.encoder), self.command)
        except OSError as error:
            if not is_full(error):
                raise
            raise self._full(source, writer, read, left) from error
        self._report(source, part)
        return part

    def _stop(self, source: Source, block: Encoded) -> None:
        number, reason = block.skipped[0]
        raise UserError(
            f"{source.name}, record {number}: {reason} (--strict): correct or remove it, or leave out --strict to skip and count it"
        )

    def _full(self, source: Source, writer: PartWriter, read: int, left: list[int]) -> DiskFullError:
        """The error for a disk that filled up, with what the rest is likely to need."""
        itemsize = np.dtype(token_dtype(self.encoder.vocab_size)).itemsize
        written = writer.tokens * itemsize
        total = sum(self.sources[number].bytes for number in left)
        needed = max(int(total * written / read) if read else self._estimate(left), written + 1)
        short = max(needed - free_bytes(self.output), 0)
        missing = f"about {megabytes(short)} are missing" if short else "the disk has room, so a quota or limit of file size was hit"
        kept = self.totals.parts
        return DiskFullError(
            f"no room left in {self.output} while tokenizing {source.name}: {kept} finished parts are kept, the {len(left)} that are left "
            f"need about {megabytes(needed)}, {missing}; free some and run the same command again"
        )

    def _estimate(self, numbers: Iterable[int]) -> int:
        sizes = ((self.sources[number].name, self.sources[number].bytes) for number in numbers)
        return estimate(sizes, np.dtype(token_dtype(self.encoder.vocab_size)).itemsize)

    def _report(self, source: Source, part: PartManifest) -> None:
        for reason, found in part.skipped.items():
            first = ", ".join(str(number) for number in found["first_records"][:5])
            _say(f"{source.name}: skipped {found['count']:,} records ({reason}; records {first}{' ...' if found['count'] > 5 else ''})")


def versions(encoder: Encoder) -> dict[str, str]:
    """Versions that the tokens may depend on."""
    found = {"python": platform.python_version(), "encoder": encoder.engine}
    return found | {name: importlib.metadata.version(name) for name in PACKAGES}


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
