"""`python -m benchmarks.layer`: forward and backward of POET layers beside the dense layer they replace, on the CPU.

One run is one optimizer step: 8,192 tokens in 4 micro-batches, gradients of the input and of everything trained, and the factors
(Cayley forward and backward) once per step. "merge" is R W0 P of an fp32 master over one forward and backward of the dense layer on one
micro-batch (2,048 tokens). Every POET run stands between two dense runs in the same process; its ratio is to their mean.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.floor import Floor
from benchmarks.machine import Machine, command_line
from benchmarks.parts import PARTS, PartTimer
from benchmarks.timing import Progress, Run, Samples, Spread, interleave, stopwatch
from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.layers.linear import PoetLinear
from poet_megatron.layers.side import SideLayout
from poet_megatron.parallel.host_memory import use_huge_pages

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ((2048, 2048), (2048, 5376))
QUICK_SIZES = ((256, 320),)
SKEW_STD = 1e-3
FP32_PER_BF16 = 4.0  # assumed speed of bf16 against fp32, for the time left only

EPILOG = """\
examples:
  python -m benchmarks.layer --quick
  python -m benchmarks.layer --output benchmarks/results/layer.json
  python -m benchmarks.layer --sizes 2048x5376 --dtypes bf16 --repeats 9

Nothing else may run on the cores meanwhile: look at the load in the output, and at the range of the dense rows, which
compare the dense layer with itself."""


@dataclass(frozen=True)
class Case:
    """A layer to time: method "dense", "poet_bs" or "poet_fs", and its block size (0 for dense, a fraction of the width for some fs)."""

    method: str
    block_size: float

    @property
    def name(self) -> str:
        """For tables and progress, e.g. "poet_fs 1/8"."""
        if self.method == "dense":
            return "dense"
        return f"{self.method} {f'1/{round(1 / self.block_size)}' if self.block_size < 1 else self.block_size}"

    @property
    def config(self) -> PoetConfig:
        """Settings of the layer; everything else as in the recipes."""
        return PoetConfig(variant=self.method.removeprefix("poet_"), block_size=self.block_size)

    def floor(self, in_features: int, out_features: int, tokens: int) -> Floor:
        """Flop floor of one step on `tokens` tokens; raises ValueError where a block is larger than the layer."""
        config = self.config
        sides = [SideLayout.build(width, 1, self.block_size, config.variant) for width in (in_features, out_features)]
        return Floor.of(tokens, sides[0], sides[1], config.neumann_terms)


DENSE = Case("dense", 0)
CASES = (Case("poet_bs", 64), Case("poet_bs", 128), Case("poet_bs", 256), Case("poet_fs", 0.125), Case("poet_fs", 0.5))


@dataclass(frozen=True)
class Workload:
    """What every layer is timed on."""

    in_features: int
    out_features: int
    dtype: str
    tokens: int
    micro_batches: int

    def micro_batch_data(self) -> tuple[list[Tensor], list[Tensor]]:
        """Inputs (with gradient) and gradients of the outputs, one pair per micro-batch."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.micro_batches, self.tokens // self.micro_batches)
        inputs = torch.randn(*shape, self.in_features, generator=generator).to(DTYPES[self.dtype])
        grads = torch.randn(*shape, self.out_features, generator=generator).to(DTYPES[self.dtype])
        return [x.clone().requires_grad_() for x in inputs], [g.clone() for g in grads]

    def work(self, floor: float) -> float:
        """Expected time of a run in an arbitrary unit."""
        return floor * self.in_features * self.out_features / (FP32_PER_BF16 if self.dtype == "bf16" else 1.0)


@dataclass
class Result:
    """One row of the output.

    Attributes:
        workload: what the layer was timed on.
        case: the layer.
        floor: its flop floor.
        samples: its runs. Those of the dense layer are compared with the dense runs before and after: the noise of the ratios.
        dense_seconds: median of the dense layer.
        parts: median seconds of every part of a step as a fraction of the dense layer's; None where they were not timed.
        merge: seconds of a merge of an fp32 master over those of forward and backward of the dense layer on one micro-batch, or None.
    """

    workload: Workload
    case: Case
    floor: Floor
    samples: Samples
    dense_seconds: float
    parts: dict[str, float] | None = None
    merge: Spread | None = None

    @property
    def ratio(self) -> Spread:
        """Time over that of the dense layer."""
        return Spread.of(self.samples.ratios or [1.0])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        ratio, milliseconds = self.ratio, Spread.of([1e3 * seconds for seconds in self.samples.seconds])
        return {
            "in_features": self.workload.in_features,
            "out_features": self.workload.out_features,
            "dtype": self.workload.dtype,
            "method": self.case.method,
            "block_size": self.case.block_size,
            "ratio": round(ratio.median, 4),
            "ratio_min": round(ratio.low, 4),
            "ratio_max": round(ratio.high, 4),
            "floor": round(self.floor.products, 4),
            "floor_with_cayley": round(self.floor.with_cayley, 4),
            "compute": self.floor.compute,
            "milliseconds": round(milliseconds.median, 3),
            "milliseconds_min": round(milliseconds.low, 3),
            "milliseconds_max": round(milliseconds.high, 3),
            "dense_milliseconds": round(1e3 * self.dense_seconds, 3),
            "tokens": self.workload.tokens,
            "micro_batches": self.workload.micro_batches,
            "runs": len(self.samples.ratios),
            "merge_ratio": None if self.merge is None else round(self.merge.median, 4),
            "parts": None if self.parts is None else {name: round(value, 4) for name, value in self.parts.items()},
        }


@dataclass
class Step:
    """One optimizer step of a layer without the optimizer."""

    layer: nn.Module
    inputs: Sequence[Tensor]
    grads: Sequence[Tensor]
    parameters: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = [parameter for parameter in self.layer.parameters() if parameter.requires_grad]

    def __call__(self) -> None:
        """Forward and backward of every micro-batch; gradients of the parameters add up, those of the inputs are new."""
        for parameter in self.parameters:
            parameter.grad = None
        with cached_factors([self.layer], len(self.inputs)):
            for x, grad in zip(self.inputs, self.grads, strict=True):
                x.grad = None
                self.layer(x).backward(grad)


def make_layer(linear: nn.Linear, case: Case, tokens: int) -> PoetLinear:
    """The POET layer of a case around the weight of `linear`, with skews as large as in training."""
    layer = PoetLinear.from_linear(linear, case.config, tokens_per_step=tokens)
    generator = torch.Generator().manual_seed(1)
    for rotation in (layer.matrix.rotation_in, layer.matrix.rotation_out):
        if rotation.skew is not None:
            nn.init.normal_(rotation.skew, std=SKEW_STD, generator=generator)
    return layer


def merge_of(layer: PoetLinear) -> Callable[[], Tensor]:
    """R W0 P of a layer like this one that keeps an fp32 master (the layer itself keeps none, so that nothing else changes)."""
    matrix = copy.deepcopy(layer.matrix)
    matrix.keep_master()
    return matrix.merged


def measure(workload: Workload, cases: Sequence[Case], repeats: int, progress: Progress) -> list[Result]:
    """Time the dense layer and every case on one workload."""
    inputs, grads = workload.micro_batch_data()
    torch.manual_seed(2)
    linear = nn.Linear(workload.in_features, workload.out_features, bias=False).to(DTYPES[workload.dtype])
    floors = {case.name: case.floor(workload.in_features, workload.out_features, workload.tokens) for case in cases}
    runs: dict[str, Run] = {}
    timers: dict[str, PartTimer] = {}
    for case in cases:
        layer = make_layer(linear, case, workload.tokens)
        runs[case.name] = stopwatch(Step(layer, inputs, grads))
        if case.method == "poet_bs":
            timers[case.name] = runs[f"{case.name}, parts"] = PartTimer(layer.matrix, [x.detach() for x in inputs], grads)
            runs[f"{case.name}, merge"] = stopwatch(merge_of(layer))

    def tick(name: str) -> None:
        if name.endswith(", merge"):
            return
        what = f"{workload.in_features}x{workload.out_features} {workload.dtype} {name}"
        progress.advance(workload.work(1.0 + floors[name.removesuffix(", parts")].products), what)

    dense, samples = interleave(stopwatch(Step(linear, inputs, grads)), runs, repeats, tick)
    dense_seconds = Spread.of(dense.seconds).median
    results = [Result(workload, DENSE, Floor("dense", 1.0, 1.0), dense, dense_seconds)]
    for case in cases:
        result = Result(workload, case, floors[case.name], samples[case.name], dense_seconds)
        if case.name in timers:
            merges = samples[f"{case.name}, merge"].ratios
            result.merge = Spread.of([workload.micro_batches * ratio for ratio in merges])
            result.parts = part_fractions(timers[case.name].seconds[1:], samples[f"{case.name}, parts"], result.ratio.median)
        results.append(result)
    return results


def part_fractions(parts: Sequence[dict[str, float]], runs: Samples, ratio: float) -> dict[str, float]:
    """Median over runs of every part over the dense layer beside it, and "other": what the layer's own ratio leaves unexplained.

    Args:
        parts: seconds per run and part.
        runs: the same runs as a whole, compared with the dense layer.
        ratio: of the whole layer.
    """
    scale = [ratio / seconds for ratio, seconds in zip(runs.ratios, runs.seconds, strict=True)]
    fractions = {name: Spread.of([run[name] * s for run, s in zip(parts, scale, strict=True)]).median for name in PARTS}
    return {**fractions, "other": ratio - sum(fractions.values())}


def ratio_table(results: Sequence[Result]) -> str:
    """Ratios beside their floors."""
    layer = f"{'in x out':>12} {'dtype':>5} {'layer':<12} {'compute':<7}"
    lines = [f"{layer} {'ratio':>6} {'min..max':>13} {'floor':>6} {'+Cayley':>8} {'ms/step':>9} {'merge':>6}"]
    for result in results:
        work, ratio = result.workload, result.ratio
        lines.append(
            f"{f'{work.in_features} x {work.out_features}':>12} {work.dtype:>5} {result.case.name:<12} {result.floor.compute:<7} "
            f"{ratio.median:6.3f} {f'{ratio.low:.3f}..{ratio.high:.3f}':>13} {result.floor.products:6.3f} {result.floor.with_cayley:8.3f} "
            f"{1e3 * Spread.of(result.samples.seconds).median:9.1f} {'' if result.merge is None else f'{result.merge.median:6.3f}':>6}"
        )
    return "\n".join(lines)


def part_table(results: Sequence[Result]) -> str:
    """Parts of the layers that have them, as fractions of the dense layer."""
    columns = (*PARTS, "other")
    titles = [name.replace("product", "blk").replace("cayley", "cay") for name in columns]
    titles = [title.replace("forward", "fwd").replace("backward", "bwd") for title in titles]
    lines = [f"{'in x out':>12} {'dtype':>5} {'layer':<12} " + " ".join(f"{title:>10}" for title in titles)]
    for result in results:
        if result.parts is not None:
            work = result.workload
            values = " ".join(f"{result.parts[name]:10.3f}" for name in columns)
            lines.append(f"{f'{work.in_features} x {work.out_features}':>12} {work.dtype:>5} {result.case.name:<12} {values}")
    return "\n".join(lines)


def parse_size(text: str) -> tuple[int, int]:
    """`2048x5376` -> (in, out)."""
    try:
        width_in, width_out = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; write INxOUT, such as 2048x5376") from None
    if min(width_in, width_out) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; both numbers must be positive")
    return width_in, width_out


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Comma-separated sizes."""
    return tuple(parse_size(part) for part in text.split(","))


def parse_dtypes(text: str) -> tuple[str, ...]:
    """Comma-separated names of DTYPES."""
    names = tuple(text.split(","))
    for name in names:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"'{name}' is not a dtype; choose from {', '.join(DTYPES)}")
    return names


def parse_positive(text: str) -> int:
    """An integer above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' must be an integer above 0")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """Command line of the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of tables")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON list to FILE")
    parser.add_argument("--sizes", type=parse_sizes, metavar="INxOUT,...", help="layer sizes (default: 2048x2048,2048x5376)")
    parser.add_argument("--dtypes", type=parse_dtypes, default=tuple(DTYPES), metavar="fp32,bf16", help="default: both")
    parser.add_argument("--threads", type=parse_positive, default=2, help="torch threads (default: 2)")
    parser.add_argument("--repeats", type=parse_positive, metavar="N", help="runs per layer (default: 5)")
    parser.add_argument("--quick", action="store_true", help="a smoke run in seconds: one small size, 512 tokens, one repeat")
    return parser


def workloads(args: argparse.Namespace) -> list[Workload]:
    """What the command line asks for; raises ValueError where a case does not fit a size."""
    tokens = 512 if args.quick else 8192
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    found = [Workload(size[0], size[1], dtype, tokens, 4) for size in sizes for dtype in args.dtypes]
    for workload in found:
        for case in CASES:
            try:
                case.floor(workload.in_features, workload.out_features, tokens)
            except ValueError as error:
                raise ValueError(f"{workload.in_features}x{workload.out_features} is too small for {case.name}: {error}") from None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        plan = workloads(args)
    except ValueError as error:
        parser.error(str(error))
    repeats = args.repeats or (1 if args.quick else 5)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    use_huge_pages()  # as CPU training does
    machine, command = Machine.current(), command_line("benchmarks.layer")
    print(machine.to_text(), file=sys.stderr)
    runs = [(w, case) for w in plan for case in CASES for _ in range(2 if case.method == "poet_bs" else 1)]
    work = sum(w.work(1.0 + case.floor(w.in_features, w.out_features, w.tokens).products) for w, case in runs)
    progress = Progress(work * (repeats + 1))
    results = [result for workload in plan for result in measure(workload, CASES, repeats, progress)]
    progress.close()

    context = {"command": command, "machine": machine.to_dict()}
    text = json.dumps([{**result.to_dict(), **context} for result in results], indent=1)
    if args.output is not None:
        args.output.write_text(text + "\n")
    if args.json:
        print(text)
        return 0
    print(f"{command}\n{machine.to_text()}\n")
    print(f"Time of forward + backward over that of the dense layer, {plan[0].tokens:,} tokens in {plan[0].micro_batches} micro-batches")
    print(f"(median and range of {repeats}; dense rows: the dense layer against itself)\n\n{ratio_table(results)}\n")
    print(f"Parts of a step as fractions of the dense layer, timed apart (other = ratio - sum)\n\n{part_table(results)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
