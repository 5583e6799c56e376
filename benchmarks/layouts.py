"""The same training in many parallel layouts: how far the losses are from those of a single rank, and what is communicated.

    python -m benchmarks.layouts                       # a table
    python -m benchmarks.layouts --json                # [{layout, variant, max_relative_difference, bound, ...}, ...]
    python -m benchmarks.layouts --collectives         # also the collectives of a step, POET beside dense layers
    python -m benchmarks.layouts --output benchmarks/results
    python -m benchmarks.layouts --optim.eps=1e-8      # with another setting

A small Llama is trained in fp32 for 30 steps with merges after 10 and 20, the same seed, data and shard groups everywhere. Layouts of up to
four ranks over gloo; all of the same number of ranks run in one launch.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.layout_cases import LAYOUTS, MERGES, MODEL, ONE_RANK, STEPS, VARIANTS, Case, Layout, train
from benchmarks.machine import Machine, command_line
from benchmarks.worlds import WorldFailed, run_world
from data_prep.corpus import embedded_documents
from data_prep.prepare import prepare
from poet_megatron.config.load import parse_overrides

DOCUMENTS = 400
VOCAB_SIZE = 512
WORLD_TIMEOUT = 1800.0
PLACEMENTS = {
    "outside": {"poet.tp_placement": "outside", "poet.compute": "input"},
    "inside": {"poet.tp_placement": "inside", "poet.compute": "input"},
    "shared": {"poet.share_input_rotation": "true", "poet.compute": "input"},
}
COUNTED = ("TP2", "TP2 + SP", "DP2", "DP2, distributed optimizer", "TP2 x PP2 + SP")
"""Layouts whose collectives are counted."""


def why_not(layout: Layout) -> str | None:
    """Why a layout cannot be run here, None if it can."""
    if layout.settings.get("engine") != "deepspeed":
        return None
    return None if importlib.util.find_spec("deepspeed") else "deepspeed is not installed (pip install '.[deepspeed]')"


def loss_cases(settings: Mapping[str, str]) -> Iterator[tuple[str, Case, int]]:
    """(key, case, steps) of every comparison of losses."""
    for layout, variant in itertools.product(LAYOUTS, VARIANTS):
        if why_not(layout) is None:
            yield f"{layout.name}|{variant}", Case(layout, variant, settings), STEPS


def collective_cases() -> Iterator[tuple[str, Case, int]]:
    """(key, case, steps) of every count of collectives: one step each."""
    for layout in (layout for layout in LAYOUTS if layout.name in COUNTED):
        yield f"{layout.name}|adamw", Case(layout, "adamw"), 1
        for placement, settings in PLACEMENTS.items():
            if placement == "inside" or layout.settings["parallel.tensor_parallel"] != "1":
                yield f"{layout.name}|poet, {placement}", Case(layout, "bs", settings), 1


def prepare_data(folder: Path) -> Path:
    """Tokenize some of the text that Python ships; returns the prepared folder."""
    corpus, output = folder / "corpus.jsonl", folder / "data"
    documents = itertools.islice(embedded_documents(), DOCUMENTS)
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    # In a process of its own: tokenizers start threads, which the worlds forked from this process would miss.
    work = functools.partial(prepare, [str(corpus)], output, vocab_size=VOCAB_SIZE, valid_fraction=0.05)
    run_world(1, work, WORLD_TIMEOUT)
    return output


def run_cases(cases: list[tuple[str, Case, int]], data: Path, output: Path) -> None:
    """Train cases on this rank. Rank 0 appends one JSON line for each to `output`, any rank one for a case that fails."""
    for key, case, steps in cases:
        started = time.monotonic()
        try:
            result = train(case.run(data), steps).to_dict()
        except Exception:
            _append(output, {"key": key, "error": f"rank {os.environ['RANK']}: {traceback.format_exc()}"})
            continue
        if os.environ["RANK"] == "0":
            seconds = round(time.monotonic() - started, 1)
            _append(output, {"key": key, "seconds": seconds, **result})
            print(f"{key}: {seconds} s", file=sys.stderr, flush=True)


def _append(output: Path, entry: dict[str, Any]) -> None:
    with output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def run_worlds(cases: list[tuple[str, Case, int]], work: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Train every case, those with the same number of ranks in one world; {key: result} of those that went well, and what went wrong."""
    data, output, problems = prepare_data(work), work / "results.jsonl", []
    for ranks in sorted({case.layout.ranks for _, case, _ in cases}):
        same = [entry for entry in cases if entry[1].layout.ranks == ranks]
        try:
            run_world(ranks, functools.partial(run_cases, same, data, output), WORLD_TIMEOUT)
        except WorldFailed as error:
            problems.append(str(error))
    entries = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] if output.exists() else []
    failed = {entry["key"]: entry["error"] for entry in entries if "error" in entry}
    problems += [f"{key}: {error}" for key, error in failed.items()]
    return {entry["key"]: entry for entry in entries if entry["key"] not in failed}, problems


def compare(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One object per layout and variant, with the largest relative differences to one rank over all steps."""
    rows = []
    for layout, variant in itertools.product(LAYOUTS, VARIANTS):
        result, reference = results.get(f"{layout.name}|{variant}"), results.get(f"{ONE_RANK}|{variant}")
        if result is None or reference is None:
            continue
        rows.append(
            {
                "layout": layout.name,
                "variant": variant,
                "ranks": layout.ranks,
                "steps": len(result["losses"]),
                "max_relative_difference": _difference(result["losses"], reference["losses"]),
                "bound": layout.bound,
                "max_relative_difference_of_norm": _difference(result["grad_norms"], reference["grad_norms"]),
                "relative_difference_of_first_norm": _difference(result["grad_norms"][:1], reference["grad_norms"][:1]),
                "first_loss": result["losses"][0],
                "last_loss": result["losses"][-1],
                "smallest_norm": min(result["grad_norms"]),
                "seconds": result["seconds"],
            }
        )
    return rows


def _difference(values: list[float], reference: list[float]) -> float:
    return max(abs(value - expected) / abs(expected) for value, expected in zip(values, reference, strict=True))


def to_markdown(facts: dict[str, Any], rows: list[dict[str, Any]], counts: dict[str, dict[str, Any]]) -> str:
    """The comparison, and the collectives where they were counted, as a Markdown page."""
    lines = ["# Parallel layouts", "", f"`{facts['command']}`", "", *(f"{key}: {facts[key]}  " for key in facts if key != "command"), ""]
    lines += ["Largest relative difference to one rank over all steps:", ""]
    lines += [
        "| layout | ranks | variant | loss | bound | gradient norm | first gradient norm | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['layout']} | {row['ranks']} | {row['variant']} | {row['max_relative_difference']:.1e} | {row['bound']:.0e} | "
        f"{row['max_relative_difference_of_norm']:.1e} | {row['relative_difference_of_first_norm']:.1e} | {row['last_loss']:.4f} |"
        for row in rows
    ]
    lines += [f"| {layout.name} | {layout.ranks} | | skipped: {reason} | | | | |" for layout in LAYOUTS if (reason := why_not(layout))]
    if counts:
        lines += ["", "Collectives of rank 0 in one step (bytes of the whole tensors):", ""]
        lines += ["| layout | layers | collective | calls | bytes |", "|---|---|---|---|---|"]
    for key, result in counts.items():
        layout_name, method = key.split("|")
        lines += [f"| {layout_name} | {method} | {kind} | {calls} | {size:,} |" for kind, (calls, size) in result["collectives"].items()]
    return "\n".join(lines) + "\n"


def described(settings: Mapping[str, str]) -> dict[str, str]:
    """What was trained, for a reader."""
    used = {**MODEL, **settings}
    shape = f"{used['model.num_layers']} layers, {used['model.hidden_size']} wide, {used['model.seq_length']} tokens"
    return {
        "model": f"{shape}, poet.shard_groups {used['poet.shard_groups']}, fp32",
        "training": f"{STEPS} steps, merges after {' and '.join(map(str, MERGES))}, AdamW with lr {used['optim.lr']} (skews "
        f"{used['optim.poet_lr']}) and eps {used['optim.eps']}, gradients clipped to {used['optim.clip_grad']}",
    }


def main() -> int:
    """Run, print, write; 1 if a world failed or a difference is beyond its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the comparison as a JSON list")
    parser.add_argument("--collectives", action="store_true", help="also count collectives")
    parser.add_argument("--output", type=Path, help="folder for layouts.md and layouts.json")
    args, overrides = parser.parse_known_args()
    settings = {key: setting.value for key, setting in parse_overrides(overrides).items()}
    machine = Machine.current().to_text().replace("\n", "; ")
    facts = {"command": command_line("benchmarks.layouts"), "machine": machine, **described(settings)}
    with tempfile.TemporaryDirectory() as work:
        results, problems = run_worlds([*loss_cases(settings), *(collective_cases() if args.collectives else [])], Path(work))
    rows = compare(results)
    counts = {key: results[key] for key, _, _ in collective_cases() if key in results}
    page = to_markdown(facts, rows, counts)
    print(json.dumps(rows, indent=1) if args.json else page)
    if args.output:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "layouts.md").write_text(page, encoding="utf-8")
        content = {"facts": facts, "results": rows, "collectives": counts}
        (args.output / "layouts.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    problems += [
        f"{row['layout']} {row['variant']} is beyond its bound" for row in rows if not row["max_relative_difference"] <= row["bound"]
    ]
    print("".join(f"error: {problem}\n" for problem in problems), end="", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
