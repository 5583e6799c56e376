"""The part of `benchmarks.tokenize` that goes from files to .bin/.idx: our `prepare tokenize`, and Megatron's preprocess_data.py beside it.

A run is timed as a whole, processes started and files on disk. On a corpus of 20 MB the start counts for much, on one of C4's files for
nothing: so the time that a single document takes is measured too, and rates are given with and without it. The texts are repeated up to
the size asked for.
"""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.timing import Samples, Spread, interleave, stopwatch
from data_prep.files import sha256_of

OURS, MEGATRON = "prepare tokenize", "preprocess_data.py"
SCRIPT = Path("tools", "preprocess_data.py")
ENDINGS = (".jsonl", ".json.gz")
COMMAND = """
import json, resource, sys
from poet_megatron.cli.main import main
status = main(sys.argv[1:])
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([one.ru_utime + one.ru_stime for one in used]))
sys.exit(status)
"""
"""The command, and the processor time of its own process and of its workers."""


@dataclass(frozen=True)
class Ran:
    """What a run left."""

    content: Path
    """The .bin."""
    writer_share: float | None = None
    """Share of the processor time that the process which reads and writes took; its workers took the rest."""


@dataclass
class Pipeline:
    """One way from a file to .bin/.idx, and what its runs gave."""

    system: str
    source: Path
    run: Callable[[Path, Path], Ran]
    """(file of texts, folder to write) -> what it did."""
    output: Path
    start: float = 0.0
    """Seconds that one document takes."""
    writer_shares: list[float] = field(default_factory=list)
    """Of each run, if it is known."""
    bin_sha256: str = ""

    def __call__(self) -> float:
        """Seconds of a run."""
        return self._timed(self.source, self.output)

    def measure_start(self, single: Path) -> None:
        """Time a run on a file of one document, the faster of two."""
        self.start = min(self._timed(single, self.output.with_name(f"{self.output.name}-start")) for _ in range(2))
        self.writer_shares.clear()

    def _timed(self, source: Path, output: Path) -> float:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        begun = time.perf_counter()
        ran = self.run(source, output)
        seconds = time.perf_counter() - begun
        self.bin_sha256 = sha256_of(ran.content)
        if ran.writer_share is not None:
            self.writer_shares.append(ran.writer_share)
        return seconds


def write_corpus(texts: Sequence[str], megabytes: float, folder: Path) -> tuple[int, int]:
    """Write the texts, repeated up to `megabytes`, with each ending, and the first alone; returns documents and bytes of text.

    Those with NUL characters are left out: we skip them, Megatron does not, and the bytes are to be the same.
    """
    texts = [text for text in texts if "\0" not in text]
    documents = size = 0
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as plain, gzip.open(folder / "corpus.json.gz", "wt", 6, "utf-8") as packed:
        for text in _repeated(texts, megabytes):
            line = json.dumps({"text": text}) + "\n"
            plain.write(line)
            packed.write(line)
            documents += 1
            size += len(text.encode())
    (folder / "one.jsonl").write_text(json.dumps({"text": texts[0]}) + "\n", encoding="utf-8")
    return documents, size


def _repeated(texts: Sequence[str], megabytes: float) -> Iterator[str]:
    """All texts at least once."""
    used = 0
    for number, text in enumerate(cycle(texts)):
        if number >= len(texts) and used >= 1e6 * megabytes:
            return
        used += len(text.encode())
        yield text


def ours(model: Path, workers: int) -> Callable[[Path, Path], Ran]:
    """Our command."""

    def run(source: Path, output: Path) -> Ran:
        words = ["prepare", "tokenize", "--input", str(source), "--output", str(output), "--tokenizer", str(model.resolve())]
        command = [sys.executable, "-c", COMMAND, *words, "--workers", str(workers), "--valid-fraction", "0"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"prepare tokenize failed:\n{done.stderr[-2000:]}")
        own, others = json.loads(done.stdout.splitlines()[-1])
        return Ran(output / "part-00000.train.bin", own / (own + others))

    return run


def megatrons(checkout: Path, model: Path, workers: int) -> Callable[[Path, Path], Ran]:
    """Megatron's script, from a checkout of Megatron-LM."""
    script = (checkout / SCRIPT).resolve()
    if not script.is_file():
        raise SystemExit(f"--megatron {checkout} has no {SCRIPT}: name a checkout of Megatron-LM")
    options = ["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", str(model.resolve()), "--append-eod"]

    def run(source: Path, output: Path) -> Ran:
        words = [sys.executable, str(script), "--input", str(source.resolve()), "--output-prefix", str(output.resolve() / "megatron")]
        done = subprocess.run([*words, "--workers", str(workers), *options], cwd=output, capture_output=True, text=True, check=False)
        found = output / "megatron_text_document.bin"
        if not found.with_suffix(".idx").is_file():  # not its status: some versions fail after their work is done
            raise SystemExit(f"{script} wrote no data (status {done.returncode}):\n{done.stderr[-2000:]}")
        return Ran(found)

    return run


def measure(
    model: Path,
    kind: str,
    corpus: Path,
    counts: tuple[int, int],
    sentencepiece: tuple[Callable[[], object], int],
    *,
    workers: int,
    repeats: int,
    megatron: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows of all pipelines, each run between two of SentencePiece alone.

    Args:
        model: SentencePiece model.
        kind: "bpe" or "unigram", for the rows.
        corpus: folder that `write_corpus` filled.
        counts: documents and bytes of text in it.
        sentencepiece: encodes with `workers` threads, and how many bytes of text.
        workers: worker processes.
        repeats: runs of each.
        megatron: a checkout of Megatron-LM.
    """
    runs = {
        f"{OURS} {ending}": Pipeline(OURS, corpus / f"corpus{ending}", ours(model, workers), corpus / f"out{ending}") for ending in ENDINGS
    }
    if megatron is not None:
        runs[MEGATRON] = Pipeline(MEGATRON, corpus / "corpus.jsonl", megatrons(megatron, model, workers), corpus / "megatron")
    for pipeline in runs.values():
        pipeline.measure_start(corpus / "one.jsonl")
    own, samples = interleave(stopwatch(sentencepiece[0]), runs, repeats)
    alone = sentencepiece[1] / Spread.of(own.seconds).median / 1e6
    return [{"model_type": kind, "workers": workers, **_row(runs[name], samples[name], counts, alone)} for name in runs]


def _row(pipeline: Pipeline, samples: Samples, counts: tuple[int, int], alone: float) -> dict[str, Any]:
    seconds = Spread.of(samples.seconds)
    working = seconds.median - pipeline.start
    rate = counts[1] / (working if working > seconds.median / 2 else seconds.median) / 1e6  # else there is too little text to tell
    return {
        "system": pipeline.system,
        "input": pipeline.source.name.removeprefix("corpus"),
        "documents": counts[0],
        "bytes": counts[1],
        "start_s": round(pipeline.start, 2),
        "mb_per_s": round(rate, 2),
        "mb_per_s_with_start": round(counts[1] / seconds.median / 1e6, 2),
        "mb_per_s_with_start_min": round(counts[1] / seconds.high / 1e6, 2),
        "mb_per_s_with_start_max": round(counts[1] / seconds.low / 1e6, 2),
        "writer_share": round(Spread.of(pipeline.writer_shares).median, 3) if pipeline.writer_shares else None,
        "sentencepiece_mb_per_s": round(alone, 2),
        "over_sentencepiece": round(rate / alone, 2),
        "bin_sha256": pipeline.bin_sha256,
    }


def bars(rows: Sequence[dict[str, Any]], quoted: float) -> dict[str, dict[str, Any]]:
    """What was to be reached, and what was: on .json.gz, the form of C4, without the start."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["system"] != OURS or row["input"] != ".json.gz":
            continue
        wanted = 2.0 if row["model_type"] == "bpe" else round(1 - row["writer_share"], 2)
        found[f"{row['model_type']} over sentencepiece, {row['workers']} threads"] = {"bar": wanted, "value": row["over_sentencepiece"]}
        measured = [other["mb_per_s"] for other in rows if other["system"] == MEGATRON and other["model_type"] == row["model_type"]]
        if measured or row["model_type"] == "bpe":
            name = f"{row['model_type']} over Megatron's preprocess_data.py, {'measured' if measured else 'quoted'}"
            found[name] = {"bar": 3.0, "value": round(row["mb_per_s"] / (measured or [quoted])[0], 2)}
    return found


def same_bytes(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether all systems wrote the same .bin of each model."""
    kinds = {row["model_type"] for row in rows}
    return all(len({row["bin_sha256"] for row in rows if row["model_type"] == kind}) == 1 for kind in kinds)


def table(rows: Sequence[dict[str, Any]], reached: dict[str, dict[str, Any]]) -> list[str]:
    """Lines for a reader."""
    lines = ["", "from files to .bin/.idx; MB/s of text, without the start of the processes (with it: min..max)", ""]
    head = f"{'system':<19} {'model':<8} {'input':<9} {'workers':>7} {'MB/s':>7} {'with start':>22} {'start':>7}"
    lines.append(f"{head} {'sentencepiece':>14} {'ratio':>6}")
    for row in rows:
        spread = f"{row['mb_per_s_with_start']:.1f} ({row['mb_per_s_with_start_min']:.1f}..{row['mb_per_s_with_start_max']:.1f})"
        head = f"{row['system']:<19} {row['model_type']:<8} {row['input']:<9} {row['workers']:>7} {row['mb_per_s']:7.1f} {spread:>22}"
        lines.append(f"{head} {row['start_s']:5.1f} s {row['sentencepiece_mb_per_s']:14.1f} {row['over_sentencepiece']:6.2f}")
    shares = ", ".join(f"{row['writer_share']:.0%} ({row['model_type']}, {row['input']})" for row in rows if row["system"] == OURS)
    lines += ["", f"the process that reads and writes takes of all processor time: {shares}"]
    lines.append("all systems wrote the same bytes" if same_bytes(rows) else "THE SYSTEMS WROTE DIFFERENT BYTES")
    return [*lines, *(f"{name}: {found['value']:.2f} (bar {found['bar']:.2f})" for name, found in reached.items())]
