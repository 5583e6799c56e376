"""What benchmarks print and write: JSON with the command and the machine, or a table for a reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine, command_line


def report(
    module: str,
    machine: Machine,
    rows: Sequence[dict[str, Any]],
    table: Callable[[Sequence[dict[str, Any]]], str],
    *,
    as_json: bool,
    output: Path | None,
) -> None:
    """Print the rows, and write them to `output` (as JSON) if it is given.

    Args:
        module: of the benchmark, for the command line.
        machine: described before the measurement.
        rows: what was measured.
        table: the rows for a reader.
        as_json: print JSON instead of the table.
        output: file for the JSON; its folder is created.
    """
    content = {"command": command_line(module), "machine": machine.to_dict(), "results": list(rows)}
    text = json.dumps(content, indent=1)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n", encoding="utf-8")
    print(text if as_json else f"{content['command']}\n{machine.to_text()}\n\n{table(rows)}")
