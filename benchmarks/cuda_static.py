"""Static evidence about the CUDA kernels, without a GPU: `python -m benchmarks.cuda_static`.

Compiler (per architecture: registers, shared memory, spills, occupancy, tensor-core instructions) and simulator (per standard shape:
sectors, bank conflicts, moved and compulsory bytes, a lower bound on the time). The tables go into docs/kernels.md between its markers,
the numbers into benchmarks/results/cuda_static.json. Parts whose tool is missing say so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.cuda_compile import ARCHITECTURES, Kernel, compile_kernels, find_disassembler, gate, sources
from benchmarks.cuda_toolchain import REPOSITORY, MissingToolError
from benchmarks.cuda_traffic import Traffic, cases, measure
from benchmarks.machine import command_line

PAGE = REPOSITORY / "docs" / "kernels.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
BEGIN, END = "<!-- cuda_static: begin -->", "<!-- cuda_static: end -->"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; 1 if a kernel spills, misses its occupancy or its tensor cores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_static", description=(__doc__ or "").partition("\n\n")[2])
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON and write no file")
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="architecture, repeatable (default: all)")
    parser.add_argument("--only", default="", help="source files whose name contains this")
    parser.add_argument("--no-simulator", action="store_true", help="leave out the traffic tables")
    options = parser.parse_args(arguments)

    kernels = [
        k for arch in options.arch or ARCHITECTURES for source in sources() if options.only in source.name for k in _compile(source, arch)
    ]
    traffic, note = _traffic(options.only) if not options.no_simulator else ([], "left out (--no-simulator)")
    wrong = [f"{k.source}: {k.name} on sm_{k.arch}: {finding}" for k in kernels for finding in gate(k)]
    numbers = {
        "command": command_line("benchmarks.cuda_static"),
        "disassembler": find_disassembler() is not None,
        "simulator": note,
        "gate": wrong,
        "kernels": [kernel.to_dict() for kernel in kernels],
        "traffic": [entry.to_dict() for entry in traffic],
    }
    if options.json:
        print(json.dumps(numbers, indent=1))
    else:
        text = _page(kernels, traffic, note)
        print(text)
        RESULTS.joinpath("cuda_static.json").write_text(json.dumps(numbers, indent=1) + "\n")
        print(f"written to {write_table(text)}", file=sys.stderr)
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


def write_table(text: str, page: Path = PAGE) -> Path:
    """Put `text` between the markers of `page`; a page without markers is left alone and a file of results is written instead."""
    old = page.read_text() if page.exists() else ""
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
        return page
    result = RESULTS / "cuda_static.md"
    result.write_text(f"# CUDA kernels, static evidence\n\n{text}\n")
    return result


def _compile(source: Path, arch: int) -> list[Kernel]:
    print(f"compiling {source.name} for sm_{arch}", file=sys.stderr)
    return compile_kernels(source, arch)


def _traffic(only: str) -> tuple[list[Traffic], str]:
    """(counters of every case, how they were made or why not)."""
    found = []
    try:
        for case in cases():
            if only in case.source:
                print(f"simulating {case.name}", file=sys.stderr)
                found += measure(case)
    except MissingToolError as missing:
        return [], f"left out: {missing}"
    return found, "ptxsim, PTX of compute_90"


def _page(kernels: list[Kernel], traffic: list[Traffic], note: str) -> str:
    archs = sorted({kernel.arch for kernel in kernels})
    triple = "/".join(map(str, archs))
    code = "tensor-core instructions from the machine code" if find_disassembler() else "no disassembler installed: HMMA unknown"
    parts = [
        f"From `{command_line('benchmarks.cuda_static')}`; nothing was run on a GPU.",
        f"Compiler: one number, or one each for sm_{triple} where they differ. Threads are per block; shared memory is static and dynamic "
        "together (for 2,048 columns or blocks of 256 where it depends on the shape); blocks are those that fit on an SM, occupancy is "
        f"their share of its warps; {code}. No kernel spills or uses local memory unless a row says so.",
        _kernel_table(kernels, archs),
    ]
    if traffic:
        parts += [
            f"Traffic ({note}): sectors of 32 bytes per warp request, with the part of their bytes that was asked for (above 1: lanes "
            "share addresses); wavefronts over the least possible; bytes requested, before any cache, over bytes touched. The last column "
            "is a lower bound for an H100 (touched bytes at 3.0 TB/s, or flops at the data sheet's peak), not a time.",
            _traffic_table(traffic),
        ]
    else:
        parts.append(f"Traffic: {note}.")
    return "\n\n".join(parts)


def _kernel_table(kernels: list[Kernel], archs: list[int]) -> str:
    rows = []
    for source, name in dict.fromkeys((kernel.source, kernel.name) for kernel in kernels):
        same = [k for arch in archs for k in kernels if (k.source, k.name, k.arch) == (source, name, arch)]

        def each(value: Callable[[Kernel], Any], same: list[Kernel] = same) -> str:
            shown = [str(value(kernel)) for kernel in same]
            return shown[0] if len(set(shown)) == 1 else "/".join(shown)

        rows.append(
            [
                f"`{name}`",
                each(lambda k: k.threads),
                each(lambda k: k.registers),
                each(lambda k: _kib(k.static_shared + k.dynamic_shared)),
                each(lambda k: k.blocks_per_sm),
                each(lambda k: f"{100 * k.occupancy:.0f}%"),
                each(lambda k: "?" if k.hmma is None else k.hmma),
                each(lambda k: "; ".join(gate(k)) or "-"),
            ]
        )
    return _table(["kernel", "threads", "registers", "shared KiB", "blocks", "occupancy", "HMMA", "findings"], rows)


def _traffic_table(traffic: list[Traffic]) -> str:
    rows = [
        [
            entry.case,
            f"`{entry.kernel}`" + (f" x{entry.launches}" if entry.launches > 1 else ""),
            f"{entry.load_sectors_per_request:.1f} ({entry.load_efficiency:.2f})",
            f"{entry.store_sectors_per_request:.1f} ({entry.store_efficiency:.2f})",
            f"{entry.bank_conflicts:.2f}" if entry.bank_conflicts else "-",
            f"{entry.moved_bytes / 1e6:.2f} / {entry.compulsory_bytes / 1e6:.2f} MB = {entry.moved_over_compulsory:.2f}",
            f"{entry.lower_bound_us:.1f} us",
        ]
        for entry in traffic
    ]
    return _table(
        ["case", "kernel", "load sectors (used)", "store sectors (used)", "bank conflicts", "moved / compulsory", "lower bound"], rows
    )


def _kib(size: int) -> str:
    return f"{size / 1024:.4g}"


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
