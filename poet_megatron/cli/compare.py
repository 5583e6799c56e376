"""`poet-megatron compare`: one table and one picture of several runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

DESCRIPTION = """\
Read the settings and metrics of several runs; print one table, the lowest validation loss first, and draw their losses into
compare.svg and compare.png. Of the settings, only those that differ between the runs are shown.

A run may be complete, stopped or still running; damaged or missing files are reported and the rest is compared.
"""

EXAMPLES = """\
examples:
  poet-megatron compare runs/bs64 runs/bs256 runs/adamw
      three runs; the pictures are written into runs
  poet-megatron compare runs/sweep
      every run below a folder, such as a sweep; the pictures are written there
  poet-megatron compare runs/sweep runs/adamw --output report
      both, with the pictures in a folder of their own
  poet-megatron compare runs/sweep --json | jq .best
      for a script to read

columns:
  done          last step with a metric, of train.steps
  valid         loss and perplexity of the last validation; runs are sorted by it
  best          the lowest validation loss of the run, and its perplexity
  train loss    mean of the last 5 % of the logged steps
  tok/s, mem    median over the logged steps, all ranks together; peak of rank 0
  state         complete, stopped, not finite (nan or infinite losses to the end), or no metrics
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `compare` command."""
    parser = subparsers.add_parser(
        "compare",
        help="one table and one picture of several runs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory, or a folder with runs below it")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the pictures (default: the one that holds the runs)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")


def run(args: argparse.Namespace) -> int:
    """Compare as `args` says, print the table and return the exit code."""
    from poet_megatron.monitor.compare import common_folder, find_runs, read_run, remarks
    from poet_megatron.monitor.compare_table import to_data, to_text

    paths = find_runs(args.runs)
    folder = common_folder(args.runs, paths)
    runs = [read_run(path, folder) for path in paths]
    pictures = _draw(runs, args.output or folder)
    if args.json:
        print(json.dumps(to_data(runs) | {"pictures": [str(path) for path in pictures]}))
        return 0
    print(to_text(runs))
    print("\n".join([f"picture: {path}" for path in pictures] or ["no picture: no run has a finite loss"]))
    for line in remarks(runs):
        print(f"note: {line}", file=sys.stderr)
    return 0


def _draw(runs: list, folder: Path) -> list[Path]:
    from poet_megatron.errors import UserError
    from poet_megatron.monitor.plot import draw

    try:
        folder.mkdir(parents=True, exist_ok=True)
        return draw(runs, folder)
    except OSError as error:
        raise UserError(f"the pictures cannot be written into {folder}: {error.strerror}; choose another folder with --output") from error
