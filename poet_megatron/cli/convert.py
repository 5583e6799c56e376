"""`poet-megatron convert`: a run's checkpoint of any parallel layout for one process."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

DESCRIPTION = """\
Turn a checkpoint that many ranks wrote into a run directory for one process.

The new directory holds the same model, optimizer state, schedule and position in the data, in a single-rank checkpoint; a config.yaml
with the parallel settings at 1 and engine megatron; the tokenizer; and the metrics so far. Training continues from there with the
same losses. Nothing of the old layout is started, and the old run is only read.

You rarely need this. Training resumes in another layout by itself: start the same recipe with other --parallel settings on another
number of ranks. `evaluate` and `export` read any run's checkpoints in one process. Convert to hand a run on as a whole, or to look
into a checkpoint without its cluster.

The process holds the whole model: about 8 bytes for each weight and 16 more for each that is trained. Groups of features that
rotations never leave (poet.shard_groups) stay as they are, since they are part of the model: only tensor-parallel sizes that divide
their number can be chosen later.
"""

EXAMPLES = """\
examples:
  poet-megatron convert --run runs/big --output runs/big-one-rank
      newest checkpoint
  poet-megatron convert --run runs/big --output runs/big-2000 --step 2000
      the checkpoint of step 2000

then:
  poet-megatron pretrain --config runs/big-one-rank/config.yaml
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `convert` command."""
    parser = subparsers.add_parser(
        "convert",
        help="turn a checkpoint of any parallel layout into one for a single process",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, the one training wrote")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="run directory to make; it must not exist")
    parser.add_argument("--step", type=int, metavar="N", help="step whose checkpoint to convert (default: the newest complete one)")


def run(args: argparse.Namespace) -> int:
    """Convert as `args` says, print progress and how to go on, and return the exit code."""
    from poet_megatron.train.convert_run import convert_run

    started = time.monotonic()
    directory = convert_run(args.run, args.output, args.step, lambda text: print(text, flush=True))
    print(f"converted in {time.monotonic() - started:.1f} s; continue on one rank with")
    print(f"poet-megatron pretrain --config {directory.config_path}")
    return 0
