"""`python -m benchmarks.tokenize`: our encoder, SentencePiece and Hugging Face tokenizers on the same texts with the same model.

All three turn the same batches of documents into ids, alternately in one process, with 1 and with 2 threads; the ids of ours are compared
with SentencePiece's, all of them. Then the whole way from files to .bin/.idx, with a BPE and with a unigram model: `prepare tokenize` with
worker processes and, with --megatron, Megatron-LM's own script, each beside SentencePiece's threads on the same texts.

The corpus is the files of --corpus (.jsonl, .txt, gzipped or not; or .deb packages, whose documentation is read) and, until there are
--megabytes, the documentation in Python sources: the standard library's, then that of installed packages. The models are trained on the
corpus unless one is given.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import tokenize_pipeline as pipelines
from benchmarks.machine import Machine, command_line
from benchmarks.timing import Progress, Samples, Spread, interleave, stopwatch
from data_prep.corpus import embedded_documents, expand, read_documents, skip_reason
from data_prep.native_encoder import Encoder, load_encoder
from data_prep.tokenizer import train_tokenizer

BATCH = 512
"""Documents per call."""
OURS, SENTENCEPIECE, HF = "ours", "sentencepiece", "hf_tokenizers"
MEGATRON_MB_PER_S = 5.5
"""Megatron's tools/preprocess_data.py with 2 workers, BPE of 32k, measured earlier on such a machine: quoted, not measured here."""

Batches = list[list[str]]
Count = Callable[[Batches], int]
"""Encodes all batches and returns the number of ids."""


def corpus_documents(paths: Sequence[str], megabytes: float) -> Iterator[str]:
    """Documents of the files, all of them, and then of Python sources until there are `megabytes`."""
    used = 0
    for text in _file_documents(paths):
        used += len(text.encode())
        yield text
    for root in (sysconfig.get_paths()["stdlib"], sysconfig.get_paths()["purelib"]):
        if used >= 1e6 * megabytes:
            return
        for text in embedded_documents(Path(root)):
            if skip_reason(text) is not None:
                continue
            used += len(text.encode())
            yield text
            if used >= 1e6 * megabytes:
                return


def _file_documents(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if path.endswith(".deb"):
            yield from _package_documents(Path(path))
        else:
            yield from (found.text for found in read_documents(expand([path])) if skip_reason(found.text) is None)


def _package_documents(path: Path) -> Iterator[str]:
    """Text files of a Debian package's documentation."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as unpacking:
        try:
            archive = tarfile.open(fileobj=unpacking.stdout, mode="r|")  # noqa: SIM115
        except tarfile.TarError as error:
            raise SystemExit(f"{path} is not a Debian package ({error})") from error
        with archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() and "/share/" in member.name else None
                if stream is None:
                    continue
                content = stream.read()
                try:
                    text = (gzip.decompress(content) if member.name.endswith(".gz") else content).decode()
                except (OSError, EOFError, UnicodeDecodeError):  # pictures and the like
                    continue
                if "\x00" not in text and skip_reason(text) is None:
                    yield text


def batches_of(documents: Iterable[str]) -> Batches:
    """Documents in order, `BATCH` at a time."""
    texts = list(documents)
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def count_ours(encoder: Encoder, threads: int) -> Count:
    """Our encoder; ids as arrays."""
    return lambda batches: sum(len(encoder.encode_batch(batch, threads).ids) for batch in batches)


def count_sentencepiece(processor: Any, threads: int) -> Count:
    """SentencePiece's own threads; ids as lists."""
    return lambda batches: sum(len(ids) for batch in batches for ids in processor.encode(batch, num_threads=threads))


def count_hf(tokenizer: Any, threads: int) -> Count:
    """Hugging Face's batch encoding, without offsets where it has that; ids as lists."""
    encode = getattr(tokenizer, "encode_batch_fast", tokenizer.encode_batch)

    def count(batches: Batches) -> int:
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"  # it looks at every call
        return sum(len(found.ids) for batch in batches for found in encode(batch, add_special_tokens=False))

    return count


def identical(encoder: Encoder, processor: Any, batches: Batches) -> bool:
    """Whether our ids are SentencePiece's on every document."""
    for batch in batches:
        rows = processor.encode(batch)
        ids, offsets = encoder.encode_batch(batch)
        if np.diff(offsets).tolist() != [len(row) for row in rows] or ids.tolist() != [token for row in rows for token in row]:
            return False
    return True


def measure(model: Path, batches: Batches, workers: int, repeats: int) -> dict[str, Any]:
    """All encoders with 1 and with `workers` threads, each run between two of SentencePiece with `workers`."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import Tokenizer

    from poet_megatron.checkpoint.hf_tokenizer import build_tokenizer

    content = model.read_bytes()
    encoder = load_encoder(model)
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    # saved and read back, as a user has it: a tokenizer made of parts in Python asks Python about them
    hf = Tokenizer.from_str(build_tokenizer(sentencepiece_model_pb2.ModelProto.FromString(content)).to_str())
    makers: dict[str, tuple[Callable[[Any, int], Count], Any]] = {
        OURS: (count_ours, encoder),
        HF: (count_hf, hf),
        SENTENCEPIECE: (count_sentencepiece, processor),
    }
    counts = {(name, threads): make(tool, threads) for name, (make, tool) in makers.items() for threads in (1, workers)}
    baseline = (SENTENCEPIECE, workers)
    progress = Progress((1 + repeats) * (len(counts) - 1))
    runs = {f"{name} {threads}": stopwatch(partial(count, batches)) for (name, threads), count in counts.items()}
    key = f"{SENTENCEPIECE} {workers}"
    first = runs.pop(key)
    own, samples = interleave(first, runs, repeats, lambda name: progress.advance(1, name))
    progress.close()
    samples[key] = own
    size = sum(len(text.encode()) for batch in batches for text in batch)
    tokens = counts[baseline](batches)
    rows = [_row(name, threads, samples[f"{name} {threads}"], size, tokens) for name, threads in counts]
    fastest = {row["encoder"]: row["mb_per_s"] for row in rows if row["threads"] == workers}
    return {
        **{f"{name}_mb_per_s": fastest[name] for name in makers},
        "documents": sum(map(len, batches)),
        "bytes": size,
        "tokens": tokens,
        "workers": workers,
        "ours_over_sentencepiece": round(fastest[OURS] / fastest[SENTENCEPIECE], 2),
        "megatron_mb_per_s_quoted": MEGATRON_MB_PER_S,
        "native": encoder.native,
        "why_not_native": encoder.reason,
        "identical_to_sentencepiece": identical(encoder, processor, batches),
        "results": rows,
    }


def _row(name: str, threads: int, samples: Samples, size: int, tokens: int) -> dict[str, Any]:
    seconds = Spread.of(samples.seconds)
    return {
        "encoder": name,
        "threads": threads,
        "mb_per_s": round(size / seconds.median / 1e6, 2),
        "mb_per_s_min": round(size / seconds.high / 1e6, 2),
        "mb_per_s_max": round(size / seconds.low / 1e6, 2),
        "million_tokens_per_s": round(tokens / seconds.median / 1e6, 3),
    }


def measure_pipelines(models: dict[str, Path], batches: Batches, args: argparse.Namespace) -> dict[str, Any]:
    """Rows of the whole way from files to .bin/.idx, for each kind of model, and the bars."""
    import sentencepiece

    texts = [text for batch in batches for text in batch]
    size = sum(len(text.encode()) for text in texts)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        counts = pipelines.write_corpus(texts, args.pipeline_megabytes, Path(folder))
        for kind, model in models.items():
            processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
            alone = (partial(count_sentencepiece(processor, args.workers), batches), size)
            megatron = args.megatron if kind == args.model_type else None  # it takes long, and its code is the same for both
            rows += pipelines.measure(
                model, kind, Path(folder), counts, alone, workers=args.workers, repeats=args.repeats, megatron=megatron
            )
    return {"pipeline": rows, "bars": pipelines.bars(rows, MEGATRON_MB_PER_S), "same_bytes": pipelines.same_bytes(rows)}


def table(found: dict[str, Any]) -> str:
    """For a reader."""
    lines = [f"{found['documents']:,} documents, {found['bytes'] / 1e6:.1f} MB, {found['tokens']:,} tokens"]
    lines += ["", f"{'encoder':<14} {'threads':>7} {'MB/s':>7} {'min..max':>16} {'M tokens/s':>11}"]
    for row in found["results"]:
        spread = f"{row['mb_per_s_min']:.1f}..{row['mb_per_s_max']:.1f}"
        lines.append(f"{row['encoder']:<14} {row['threads']:>7} {row['mb_per_s']:7.1f} {spread:>16} {row['million_tokens_per_s']:11.2f}")
    lines += ["", f"ours over sentencepiece, {found['workers']} threads each: {found['ours_over_sentencepiece']:.2f}"]
    lines.append("ids identical to sentencepiece's on every document" if found["identical_to_sentencepiece"] else "IDS DIFFER")
    lines.append("compiled encoder" if found["native"] else f"not the compiled encoder: {found['why_not_native']}")
    lines.append(f"Megatron's preprocess_data.py, quoted, 2 workers, with reading and writing: {MEGATRON_MB_PER_S} MB/s")
    if "pipeline" in found:
        lines += pipelines.table(found["pipeline"], found["bars"])
    return "\n".join(lines)


def _trained(batches: Batches, args: argparse.Namespace, folder: Path) -> dict[str, Path]:
    """A model of the kind asked for and, for the pipelines, one of the other kind."""
    other = {"bpe": "unigram", "unigram": "bpe"}[args.model_type]
    models = {kind: folder / f"{kind}.model" for kind in (args.model_type, *([other] if args.pipeline_megabytes else []))}
    for kind, path in models.items():
        train_tokenizer((text for batch in batches for text in batch), path, args.vocab_size, model_type=kind)
    return models


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenize", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE, and the table beside it as .txt")
    parser.add_argument("--corpus", nargs="+", default=[], metavar="FILE", help="files of documents, or .deb packages")
    parser.add_argument("--megabytes", type=float, default=20, help="add Python's documentation up to this size (default: 20)")
    parser.add_argument("--model", type=Path, help="a SentencePiece model (default: train one)")
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe", help="of the model to train (default: bpe)")
    parser.add_argument("--vocab-size", type=int, default=32_000, help="of the model to train (default: 32000)")
    parser.add_argument("--workers", type=int, default=2, help="threads beside 1, and worker processes (default: 2)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: 5)")
    parser.add_argument(
        "--pipeline-megabytes", type=float, default=100, metavar="MB", help="text from files to .bin/.idx; 0 leaves that out (default: 100)"
    )
    parser.add_argument("--megatron", type=Path, metavar="DIR", help="checkout of Megatron-LM, whose tools/preprocess_data.py to time too")
    args = parser.parse_args(arguments)
    if args.workers < 2 or args.repeats < 1:
        parser.error("--workers must be at least 2 and --repeats at least 1")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 1 if ids or bytes differ."""
    args = _parse(arguments)
    os.environ.setdefault("RAYON_NUM_THREADS", str(args.workers))  # of tokenizers; read when its threads start
    machine = Machine.current()
    batches = batches_of(corpus_documents(args.corpus, args.megabytes))
    with tempfile.TemporaryDirectory() as folder:
        models = {args.model_type: args.model} if args.model else _trained(batches, args, Path(folder))
        found = measure(models[args.model_type], batches, args.workers, args.repeats)
        if args.pipeline_megabytes:
            found |= measure_pipelines(models, batches, args)
    content = {"command": command_line("benchmarks.tokenize"), "machine": machine.to_dict(), **found}
    text = f"{content['command']}\n{machine.to_text()}\n\n{table(found)}"
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        args.output.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1) if args.json else text)
    return 0 if found["identical_to_sentencepiece"] and found.get("same_bytes", True) else 1


if __name__ == "__main__":
    sys.exit(main())
