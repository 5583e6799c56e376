"""An estimate as text to read and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from poet_megatron.estimate.estimate import Estimate
from poet_megatron.estimate.memory import PARTS
from poet_megatron.estimate.traffic import MERGE, PURPOSES, Traffic

GIB = 2**30
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
Row = Sequence[str]


def to_json(found: Estimate) -> str:
    """One JSON object. Parameters are those of the whole model; `memory_bytes` is that of the largest rank, `stages` has them all."""
    return json.dumps(
        {
            **dataclasses.asdict(found.counts),
            "world_size": found.world_size,
            "data_parallel": found.data_parallel,
            "micro_batches": found.micro_batches,
            "shapes": _shapes(found),
            "memory_bytes": found.largest.memory_bytes,
            "flops": found.flops,
            "dense_flops": found.dense_flops,
            "stages": [dataclasses.asdict(stage) for stage in found.stages],
        }
    )


def to_text(found: Estimate) -> str:
    """Tables with a word on every row."""
    sections = [_table(("parameter", "shape"), [(name, str(list(shape))) for name, shape in _shapes(found)], right=False)]
    sections += [_counts(found), _layout(found), _memory(found), _traffic(found), _flops(found)]
    return "\n\n".join(sections)


def _shapes(found: Estimate) -> list[tuple[str, tuple[int, ...]]]:
    if len(found.stages) == 1:
        return found.stages[0].shapes
    return [(f"stage{stage.stage}.{name}", shape) for stage in found.stages for name, shape in stage.shapes]


def _counts(found: Estimate) -> str:
    counts = found.counts
    rows = [
        ("rotated parameters", counts.rotated_parameters, "of the factors of rotated matrices, or of the matrices themselves (adamw)"),
        ("trainable parameters", counts.trainable_parameters, "what the optimizer updates"),
        ("total parameters", counts.total_parameters, "of the model as it is exported, with vocabulary padding"),
    ]
    if counts.table_1_elements:
        rows.append(("in the paper's Table 1", counts.table_1_elements, "elements of W0, of its factors and of their two moments"))
    cells = [(name, f"{count:,}", f"{count / 1e6:.2f} M", note) for name, count, note in rows]
    return "whole model\n" + _table(("", "count", "", ""), cells)


def _layout(found: Estimate) -> str:
    parallel = found.run.parallel
    note = f"\nengine deepspeed, ZeRO-{found.run.deepspeed.zero_stage}" if found.run.engine == "deepspeed" else ""
    return (
        f"layout: {found.world_size} rank(s) = {parallel.tensor_parallel} tensor x {parallel.pipeline_parallel} pipeline x "
        f"{found.data_parallel} data; {found.micro_batches} micro-batch(es) of {found.run.train.micro_batch_size} sequences per rank "
        f"and step{note}"
    )


def _memory(found: Estimate) -> str:
    columns = [stage.memory_bytes for stage in found.stages]
    rows = [(part, *(f"{column[part] / GIB:.3f}" for column in columns), note) for part, note in PARTS.items()]
    sums = [sum(column.values()) for column in columns]
    largest = found.largest
    fullest = max(largest.memory_bytes, key=lambda part: largest.memory_bytes[part])
    rows.append(("sum", *(f"{total / GIB:.3f}" for total in sums), f"largest: stage {largest.stage}, most of it {fullest}"))
    return "memory per rank, GiB\n" + _table(("", *(f"stage {stage.stage}" for stage in found.stages), ""), rows)


def _traffic(found: Estimate) -> str:
    entries = [entry for stage in found.stages for entry in stage.traffic]
    if not entries:
        return "communication: none on a single rank"
    rows = [_traffic_row(entry) for entry in entries]
    table = _table(("stage", "what for", "collective", "group", "calls", "bytes"), rows)
    purposes = dict.fromkeys(entry.purpose for entry in entries)
    notes = "\n".join(f"  {purpose}: {PURPOSES[purpose]}" for purpose in purposes)
    return f"communication per rank and step\n{table}\n{notes}"


def _traffic_row(entry: Traffic) -> Row:
    purpose = f"{entry.purpose} (each)" if entry.purpose == MERGE else entry.purpose
    return str(entry.stage), purpose, entry.collective, entry.group, f"{entry.calls:,}", _size(entry.bytes)


def _size(count: int) -> str:
    power = min((max(count, 1).bit_length() - 1) // 10, len(UNITS) - 1)
    return f"{count / 1024**power:.{2 if power else 0}f} {UNITS[power]}"


def _flops(found: Estimate) -> str:
    total = sum(found.flops.values())
    rows = [(part, f"{count:.3e}", f"{count / total:.1%}") for part, count in found.flops.items()]
    rows.append(("sum", f"{total:.3e}", f"{total / found.dense_flops:.3f} of the same model with dense linear layers"))
    return "flops per step, all ranks together\n" + _table(("", "flops", "share"), rows)


def _table(header: Row, rows: Sequence[Row], right: bool = True) -> str:
    """Columns as wide as their cells; numbers to the right, if `right`."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    numeric = [right and column > 0 and all(_is_number(row[column]) for row in rows) for column in range(len(header))]

    def cell(text: str, column: int) -> str:
        return text.rjust(widths[column]) if numeric[column] else text.ljust(widths[column])

    return "\n".join("  " + "  ".join(cell(text, column) for column, text in enumerate(line)).rstrip() for line in lines if any(line))


def _is_number(text: str) -> bool:
    return text.replace(",", "").split(" ")[0].replace(".", "").replace("e+", "").isdigit()
