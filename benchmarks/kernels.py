"""`python -m benchmarks.kernels`: every compiled CPU op beside the same op made of torch's own library calls.

This is how kernel or library was chosen for each op (docs/kernels.md): both run alternately in one process, on one micro-batch of 2,048
tokens for the products and on all blocks of a side for the factors. A ratio below 1 means that the compiled op is faster.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.layer import DTYPES
from benchmarks.machine import Machine
from benchmarks.report import report
from benchmarks.timing import Progress, Spread, interleave, stopwatch
from poet_megatron.ops import native
from poet_megatron.ops.cayley import OrthogonalMap
from poet_megatron.ops.merge import merge_into
from poet_megatron.ops.permuted_product import adjacent_runs, permuted_block_product, permuted_block_product_grad
from poet_megatron.ops.skew import packed_length, skew_pack_grad, skew_unpack
from poet_megatron.parallel.host_memory import use_huge_pages

TOKENS = 2048


@dataclass(frozen=True)
class Case:
    """An op on one side: its name, what it works on, and the call, which takes the compiled op unless told otherwise."""

    op: str
    width: int
    block_size: int
    dtype: str
    call: Callable[[], object]


class Reference:
    """Runs a call on torch's own library instead of the compiled ops."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __call__(self) -> None:
        """Run it."""
        compiled = native.native_available
        native.native_available = lambda device_type: False
        try:
            self.call()
        finally:
            native.native_available = compiled


def product_cases(width: int, block_size: int, dtype: str, tokens: int) -> Iterator[Case]:
    """The three products of one side."""
    x, grad = (torch.randn(tokens, width).to(DTYPES[dtype]) for _ in range(2))
    blocks = [torch.randn(width // block_size, block_size, block_size).to(DTYPES[dtype]) / block_size]
    order, runs = torch.randperm(width).int(), adjacent_runs([(width // block_size, block_size)])
    yield Case("gather and product", width, block_size, dtype, lambda: permuted_block_product(x, order, blocks, False, None))
    yield Case("product and scatter", width, block_size, dtype, lambda: permuted_block_product(x, None, blocks, True, order))
    yield Case("gradient of E", width, block_size, dtype, lambda: permuted_block_product_grad(x, order, grad, None, runs))


def factor_cases(width: int, block_size: int) -> Iterator[Case]:
    """From skews to increments and back, for all blocks of a side; fp32."""
    count, series = width // block_size, OrthogonalMap("cayley-neumann")
    packed = 1e-3 * torch.randn(count, packed_length(block_size))
    q, grad = skew_unpack(packed, block_size), torch.randn(count, block_size, block_size)
    e = series.increment(q)
    calls: dict[str, Callable[[], Tensor]] = {
        "skew unpack": lambda: skew_unpack(packed, block_size),
        "skew pack": lambda: skew_pack_grad(grad),
        "series": lambda: series.increment(q),
        "gradient of the series": lambda: series.increment_grad(q, e, grad),
    }
    for op, call in calls.items():
        yield Case(op, width, block_size, "fp32", call)


def merge_case(width: int, block_size: int) -> Case:
    """R W P of an fp32 master [2048, width] in feature order."""
    height = min(2048, width)
    weight, out = torch.randn(height, width), torch.empty(height, width)
    rows, columns = torch.randperm(height).int(), torch.randperm(width).int()
    inverse = columns.argsort().int()
    sides = [[torch.randn(size // block_size, block_size, block_size) / block_size] for size in (width, height)]
    return Case("merge", width, block_size, "fp32", lambda: merge_into(weight, rows, columns, inverse, sides[0], sides[1], out))


def all_cases(widths: Sequence[int], block_sizes: Sequence[int], tokens: int) -> Iterator[Case]:
    """Every op on every side."""
    for width in widths:
        for block_size in block_sizes:
            for dtype in DTYPES:
                yield from product_cases(width, block_size, dtype, tokens)
            yield from factor_cases(width, block_size)
            yield merge_case(width, block_size)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Compiled over library time."""
    library, samples = interleave(stopwatch(Reference(case.call)), {"compiled": stopwatch(case.call)}, repeats)
    ratio = Spread.of(samples["compiled"].ratios)
    return {
        "op": case.op,
        "width": case.width,
        "block_size": case.block_size,
        "dtype": case.dtype,
        "ratio": round(ratio.median, 3),
        "ratio_min": round(ratio.low, 3),
        "ratio_max": round(ratio.high, 3),
        "milliseconds": round(1e3 * Spread.of(samples["compiled"].seconds).median, 3),
        "library_milliseconds": round(1e3 * Spread.of(library.seconds).median, 3),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For a reader."""
    lines = [f"{'op':<23} {'width':>5} {'b':>4} {'dtype':>5} {'ms':>8} {'library':>8} {'ratio':>6} {'min..max':>13}"]
    for r in rows:
        spread = f"{r['ratio_min']:.2f}..{r['ratio_max']:.2f}"
        lines.append(
            f"{r['op']:<23} {r['width']:>5} {r['block_size']:>4} {r['dtype']:>5} {r['milliseconds']:8.2f} {r['library_milliseconds']:8.2f} "
            f"{r['ratio']:6.2f} {spread:>13}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON to FILE")
    parser.add_argument("--widths", type=int, nargs="+", default=[2048, 5376])
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"default: {TOKENS}")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="runs per op (default: 9)")
    args = parser.parse_args(arguments)
    if not native.native_available("cpu"):
        parser.error(f"there are no compiled ops to compare: {native.load('cpu').why}")
    torch.set_num_threads(args.threads)
    use_huge_pages()
    machine = Machine.current()
    progress = Progress(len(args.widths) * len(args.block_sizes) * (3 * len(DTYPES) + 5))
    rows = []
    for case in all_cases(args.widths, args.block_sizes, args.tokens):
        rows.append(measure(case, args.repeats))
        progress.advance(1, f"{case.op}, {case.width}, b = {case.block_size}, {case.dtype}")
    progress.close()
    report("benchmarks.kernels", machine, rows, table, as_json=args.json, output=args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
