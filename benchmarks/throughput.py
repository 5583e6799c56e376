"""`python -m benchmarks.throughput`: tokens per second of whole training steps, POET beside AdamW, on one process.

Every run is one optimizer step of the training loop (forward, backward, clipping, update; bf16 by default) on random tokens, without
merges, evaluation and data loading. A POET step stands between two AdamW steps of the same model in the same process, and its ratio is to
their mean: above 1 means that POET trains more tokens per second.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import Machine
from benchmarks.report import report
from benchmarks.timing import Progress, Run, Samples, Spread, interleave, stopwatch
from poet_megatron.config.load import load_config
from poet_megatron.data.batch import Batch
from poet_megatron.engine.base import Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.parallel.context import ParallelContext, parallel_context
from poet_megatron.parallel.host_memory import use_huge_pages
from poet_megatron.train.step import train_step

BASELINE = "adamw"
METHODS = {BASELINE: {"method": "adamw"}} | {f"poet_bs {b}": {"method": "poet", "poet.block_size": str(b)} for b in (64, 256)}


@dataclass(frozen=True)
class Model:
    """A model to train: its sizes, micro-batch and micro-batches per step."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    seq_length: int
    vocab: int
    micro_batch: int
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Per optimizer step."""
        return self.micro_batch * self.micro_batches * self.seq_length

    def settings(self, precision: str) -> dict[str, str]:
        """As command-line settings; the widths are multiples of both block sizes, so that every method has the same model."""
        return {
            "model.num_layers": str(self.layers),
            "model.hidden_size": str(self.hidden),
            "model.ffn_hidden_size": str(self.ffn),
            "model.num_attention_heads": str(self.heads),
            "model.seq_length": str(self.seq_length),
            "model.vocab_size": str(self.vocab),
            "poet.variant": "bs",
            "train.micro_batch_size": str(self.micro_batch),
            "train.global_batch_size": str(self.micro_batch * self.micro_batches),
            "train.precision": precision,
            "train.steps": "1000",
        }

    def batches(self) -> list[Batch]:
        """Random tokens, one batch per micro-batch."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.micro_batch, self.seq_length)
        positions = torch.arange(self.seq_length).expand(shape)
        found = []
        for _ in range(self.micro_batches):
            tokens, labels = (torch.randint(self.vocab, shape, generator=generator) for _ in range(2))
            found.append({"tokens": tokens, "labels": labels, "loss_mask": torch.ones(shape), "position_ids": positions})
        return found


MODELS = {
    "demo": Model(layers=4, hidden=256, ffn=768, heads=4, seq_length=128, vocab=4096, micro_batch=8, micro_batches=2),
    "60m": Model(layers=8, hidden=512, ffn=1280, heads=8, seq_length=256, vocab=32000, micro_batch=8, micro_batches=4),
}


def engine_of(method: str, model: Model, precision: str, context: ParallelContext) -> Engine:
    """The engine that trains `model` by `method`."""
    settings = {**model.settings(precision), **METHODS[method]}
    return build_engine(load_config(None, [f"--{key}={value}" for key, value in settings.items()]), context)


def measure(name: str, precision: str, repeats: int, progress: Progress) -> list[dict[str, Any]]:
    """One row per method."""
    model, first = MODELS[name], load_config(None, [])
    with parallel_context(first.parallel, first.train.seed) as context:
        batches = model.batches()
        runs: dict[str, Run] = {}
        for method in METHODS:
            engine = engine_of(method, model, precision, context)
            runs[method] = stopwatch(lambda engine=engine: train_step(engine, batches, 1.0))  # type: ignore[misc]
        baseline = runs.pop(BASELINE)
        dense, samples = interleave(baseline, runs, repeats, lambda method: progress.advance(1, f"{name} {method}"))
    return [row(name, precision, method, model, found) for method, found in {BASELINE: dense, **samples}.items()]


def row(name: str, precision: str, method: str, model: Model, samples: Samples) -> dict[str, Any]:
    """What was measured; the ratio is of tokens per second."""
    seconds, ratio = Spread.of(samples.seconds), Spread.of([1.0 / ratio for ratio in samples.ratios or [1.0]])
    return {
        "model": name,
        "precision": precision,
        "method": method,
        "tokens_per_s": round(model.tokens / seconds.median, 1),
        "ratio": round(ratio.median, 4),
        "ratio_min": round(ratio.low, 4),
        "ratio_max": round(ratio.high, 4),
        "tokens": model.tokens,
        "runs": len(samples.seconds),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a reader."""
    lines = [f"{'model':<6} {'precision':<9} {'method':<12} {'tokens/s':>9} {'ratio':>7} {'min..max':>13}"]
    for r in rows:
        spread = f"{r['ratio_min']:.3f}..{r['ratio_max']:.3f}"
        lines.append(f"{r['model']:<6} {r['precision']:<9} {r['method']:<12} {r['tokens_per_s']:9.1f} {r['ratio']:7.3f} {spread:>13}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="steps per method (default: 9)")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    use_huge_pages()
    machine = Machine.current()
    progress = Progress(len(args.models) * (len(METHODS) - 1) * (args.repeats + 1))
    rows = [found for name in args.models for found in measure(name, args.precision, args.repeats, progress)]
    progress.close()
    report("benchmarks.throughput", machine, rows, table, as_json=args.json, output=args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
