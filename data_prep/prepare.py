"""From text to a folder that training opens: tokenizer.model, train.bin/.idx, valid.bin/.idx and, last of all, manifest.json."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path

from data_prep.corpus import EMBEDDED_NAME, Document, embedded_documents, expand, read_documents, skip_reason
from data_prep.files import sha256_of, write_atomically
from data_prep.indexed import IndexedWriter, bin_path, idx_path, token_dtype
from data_prep.manifest import MANIFEST_NAME, SPLITS, TOKENIZER_NAME, Manifest, Request, Source, SplitCounts, damage
from data_prep.progress import Progress
from data_prep.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from poet_megatron.errors import UserError

DEFAULT_VOCAB_SIZE = 4096
DEFAULT_VALID_FRACTION = 0.02
BATCH_DOCUMENTS = 512
BATCH_BYTES = 1 << 20


@dataclass(frozen=True)
class Inputs:
    """Documents that can be read several times, in the same order each time; no files mean the embedded corpus."""

    files: tuple[Path, ...] = ()

    @cached_property
    def embedded(self) -> list[str]:
        """The embedded corpus, parsed once."""
        return list(embedded_documents())

    @cached_property
    def total_bytes(self) -> int:
        """What `Document.position` runs up to."""
        return sum(path.stat().st_size for path in self.files) if self.files else sum(len(text.encode()) for text in self.embedded)

    def sources(self) -> list[Source]:
        """Names, sizes and hashes for the manifest."""
        if not self.files:
            return [Source(name=f"{EMBEDDED_NAME} (CPython {platform.python_version()})", bytes=0, sha256="")]
        return [Source(name=str(path), bytes=path.stat().st_size, sha256=sha256_of(path)) for path in self.files]

    def documents(self) -> Iterator[Document]:
        """All documents, with positions counted over all files."""
        done = 0
        for text in () if self.files else self.embedded:
            done += len(text.encode())
            yield Document(text, EMBEDDED_NAME, done)
        for path in self.files:
            for document in read_documents([path]):
                yield document._replace(position=done + document.position)
            done += path.stat().st_size


@dataclass(frozen=True)
class Job:
    """A prepare request with its inputs resolved."""

    request: Request
    inputs: Inputs
    valid_inputs: Inputs | None
    tokenizer: Tokenizer | None

    def split_of(self, text: str) -> str:
        """The split of a document of the main inputs: a function of its text alone."""
        if self.valid_inputs is not None:
            return "train"
        share = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
        return "valid" if share < self.request.valid_fraction else "train"

    def training_texts(self) -> Iterator[str]:
        """Usable texts of the training split, which the vocabulary is learned from."""
        for document in self.inputs.documents():
            if skip_reason(document.text) is None and self.split_of(document.text) == "train":
                yield document.text


def prepare(
    inputs: Sequence[str] | None,
    output: Path,
    *,
    valid_inputs: Sequence[str] | None = None,
    vocab_size: int | None = None,
    tokenizer: Path | None = None,
    valid_fraction: float = DEFAULT_VALID_FRACTION,
    force: bool = False,
    threads: int = 1,
    command: Sequence[str] = (),
) -> Manifest:
    """Write tokenizer, data and manifest into `output`, or reuse what is there if it was made by the same request.

    `inputs` None is the embedded corpus. A folder made by another request is a UserError unless `force`; an unfinished one is rebuilt.
    """
    job = plan(inputs, valid_inputs, vocab_size, tokenizer, valid_fraction)
    if output.exists() and not output.is_dir():
        raise UserError(f"output {output} is a file: name a folder")
    if not force and (existing := reusable(output, job.request)):
        _say(f"reusing {output}: made by the same request ({existing.splits['train'].tokens:,} training tokens)")
        return existing
    output.mkdir(parents=True, exist_ok=True)
    Manifest(request=job.request).save(output)
    return _build(job, output, threads, command)


def plan(
    inputs: Sequence[str] | None, valid_inputs: Sequence[str] | None, vocab_size: int | None, tokenizer: Path | None, valid_fraction: float
) -> Job:
    """Check a request and resolve its inputs; reads and hashes files, writes nothing."""
    given = load_tokenizer(tokenizer) if tokenizer else None
    if given and vocab_size not in (None, given.vocab_size):
        raise UserError(f"vocab_size is {vocab_size}, but tokenizer {tokenizer} has {given.vocab_size}: leave out --vocab-size")
    if not valid_inputs and not 0 < valid_fraction < 1:
        raise UserError(f"valid_fraction is {valid_fraction}; it must be between 0 and 1 (exclusive): or give --valid-input files")
    main = Inputs(tuple(expand(inputs)) if inputs is not None else ())
    held_out = Inputs(tuple(expand(valid_inputs))) if valid_inputs else None
    if held_out and (both := {path.resolve() for path in main.files} & {path.resolve() for path in held_out.files}):
        raise UserError(f"{sorted(both)[0]} is both a training and a validation input: remove it from one of them")
    request = Request(
        inputs=main.sources(),
        valid_inputs=held_out.sources() if held_out else [],
        vocab_size=given.vocab_size if given else vocab_size or DEFAULT_VOCAB_SIZE,
        tokenizer_sha256=given.sha256 if given else "",
        valid_fraction=0.0 if held_out else valid_fraction,
    )
    return Job(request, main, held_out, given)


def reusable(output: Path, request: Request) -> Manifest | None:
    """The manifest of a complete folder made by this request, None if it must be (re)built; another request's folder is a UserError."""
    if not (output / MANIFEST_NAME).exists():
        foreign = [name for split in SPLITS for name in (f"{split}.bin", f"{split}.idx") if (output / name).exists()]
        if foreign:
            raise UserError(f"{output} holds {foreign[0]} but no {MANIFEST_NAME}: choose another --output, or overwrite it with --force")
        return None
    manifest = Manifest.load(output)
    if manifest.complete and (differences := _differences(manifest.request, request)):
        raise UserError(f"{output} holds other data ({'; '.join(differences)}): choose another --output, or overwrite it with --force")
    if reason := damage(output, manifest):
        _say(f"rebuilding {output}: {reason}")
        return None
    return manifest


def _differences(old: Request, new: Request) -> list[str]:
    """Each setting in which two requests differ, in words."""
    found = []
    for name in (item.name for item in fields(Request)):
        before, after = getattr(old, name), getattr(new, name)
        if name in ("inputs", "valid_inputs"):
            if _identities(before) != _identities(after):
                found.append(f"{name}: it was made from {_names(before)}, not from {_names(after)}")
        elif before != after:
            found.append(f"{name}: it was made with {before or 'none'}, not with {after or 'none'}")
    return found


def _identities(sources: list[Source]) -> list[str]:
    return [source.sha256 or source.name for source in sources]


def _names(sources: list[Source]) -> str:
    shown = ", ".join(f"{source.name} ({source.sha256[:8]})" if source.sha256 else source.name for source in sources[:2])
    return f"{shown} and {len(sources) - 2} more" if len(sources) > 2 else shown or "nothing"


def _build(job: Job, output: Path, threads: int, command: Sequence[str]) -> Manifest:
    if job.tokenizer:
        tokenizer = job.tokenizer
        write_atomically(output / TOKENIZER_NAME, tokenizer.model)
    else:
        _say(f"training a tokenizer of {job.request.vocab_size:,} tokens")
        tokenizer = train_tokenizer(job.training_texts(), output / TOKENIZER_NAME, job.request.vocab_size)
    splits, skipped = SplitWriter(output, job, tokenizer, threads).write()
    manifest = Manifest(
        complete=True,
        request=job.request,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_sha256=tokenizer.sha256,
        splits=splits,
        skipped=dict(sorted(skipped.items())),
        versions={
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("poet-megatron", "sentencepiece", "numpy")},
        },
        command=list(command),
    )
    manifest.save(output)
    return manifest


@dataclass
class SplitWriter:
    """Tokenizes documents in batches and writes each to its split, with the end-of-sequence token appended."""

    output: Path
    job: Job
    tokenizer: Tokenizer
    threads: int = 1
    skipped: Counter[str] = field(default_factory=Counter)

    def write(self) -> tuple[dict[str, SplitCounts], Counter[str]]:
        """Write both splits; returns their counts and how many documents were skipped, by reason."""
        text_bytes: Counter[str] = Counter()
        dtype = token_dtype(self.tokenizer.vocab_size)
        with contextlib.ExitStack() as stack:
            writers = {name: stack.enter_context(IndexedWriter(self.output / name, dtype)) for name in SPLITS}
            for split, inputs in (("", self.job.inputs), ("valid", self.job.valid_inputs)):
                if inputs is not None:
                    self._write_inputs(inputs, split, writers, text_bytes)
            self._check(writers)
        counts = {name: _counts(writer, text_bytes[name]) for name, writer in writers.items()}
        return counts, self.skipped

    def _write_inputs(self, inputs: Inputs, split: str, writers: dict[str, IndexedWriter], text_bytes: Counter[str]) -> None:
        progress = Progress("tokenizing validation" if split else "tokenizing", inputs.total_bytes)
        for batch in self._batches(inputs):
            texts = [document.text for document in batch]
            size = 0
            for text, ids in zip(texts, self.tokenizer.encode_batch(texts, self.threads), strict=True):
                name = split or self.job.split_of(text)
                writers[name].add([*ids, self.tokenizer.eos_id])
                text_bytes[name] += len(text.encode())
                size += len(text.encode())
            progress.update(len(batch), size, batch[-1].position)
        progress.close()

    def _batches(self, inputs: Inputs) -> Iterator[list[Document]]:
        batch: list[Document] = []
        size = 0
        for document in inputs.documents():
            if reason := skip_reason(document.text):
                self.skipped[reason] += 1
                continue
            batch.append(document)
            size += len(document.text)
            if len(batch) >= BATCH_DOCUMENTS or size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _check(self, writers: dict[str, IndexedWriter]) -> None:
        """Both splits need a document; raising here leaves no data files behind."""
        total = sum(writer.documents for writer in writers.values())
        skipped = f"{self.skipped.total()} skipped" if self.skipped else "none skipped"
        for name, writer in writers.items():
            if writer.documents == 0:
                fix = "give more documents, change --valid-fraction, or give --valid-input files"
                share = f"valid_fraction {self.job.request.valid_fraction}"
                raise UserError(f"no document fell into the {name} split ({total} documents, {skipped}, {share}): {fix}")


def _counts(writer: IndexedWriter, text_bytes: int) -> SplitCounts:
    return SplitCounts(
        documents=writer.documents,
        tokens=writer.tokens,
        text_bytes=text_bytes,
        bin_bytes=bin_path(writer.prefix).stat().st_size,
        idx_bytes=idx_path(writer.prefix).stat().st_size,
        bin_sha256=writer.sha256,
        idx_sha256=writer.index_sha256,
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
