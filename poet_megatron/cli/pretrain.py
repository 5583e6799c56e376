"""`poet-megatron pretrain`: train a model from a recipe."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from poet_megatron.cli.recipe import add_recipe_options, key_table, load_recipe

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from poet_megatron.monitor.run_dir import BatchJob

DESCRIPTION = """\
Trains a Llama model with POET (or dense AdamW) and writes everything into train.run_dir: the resolved
configuration, metrics.jsonl, TensorBoard events and checkpoints. Started again with the same run
directory it continues from the newest checkpoint.

Exit status: 0 complete; 75 saved on SIGTERM, SIGUSR1, Ctrl-C or train.exit_minutes (the same command continues);
2 a mistake to mend; 3 a loss or gradient that is not finite, or jumped; 4 replicas differ (a fault of the machine);
5 a hang. docs/faults.md explains each.

Settings come from the built-in defaults, then from the recipe, then from the command line."""

EXAMPLES = """\
examples:
  poet-megatron pretrain --config configs/demo.yaml
  poet-megatron pretrain --config configs/demo.yaml --train.steps 100 --optim.poet_lr=2e-3
  poet-megatron pretrain --config configs/demo.yaml --print-config   # what would be used, as YAML
  poet-megatron pretrain --config configs/demo.yaml --dry-run        # shapes, counts, memory; then stop
  torchrun --nproc-per-node 8 -m poet_megatron pretrain --config configs/llama_1b3_poet_bs256.yaml

settings (also keys of a YAML recipe; its `base: other.yaml` builds on another one):
"""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `pretrain` parser."""
    parser = subparsers.add_parser(
        "pretrain",
        help="train a model from a recipe",
        description=DESCRIPTION,
        epilog=EXAMPLES + key_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="poet-megatron pretrain [--config YAML] [--dry-run | --print-config] [--section.key VALUE ...]",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--print-config", action="store_true", help="print the resolved configuration as YAML and stop")
    mode.add_argument("--dry-run", action="store_true", help="print shapes, parameter counts and memory per rank, and stop")
    add_recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Train, or print what would be trained; returns the exit status."""
    config = load_recipe(args)
    if args.print_config:
        from poet_megatron.config.load import to_yaml

        print(to_yaml(config), end="")
        return 0
    if args.dry_run:
        from poet_megatron.estimate.estimate import estimate
        from poet_megatron.estimate.report import to_text

        print(to_text(estimate(config)))
        return 0
    from poet_megatron.train.run import pretrain

    return pretrain(config, batch_job())


def batch_job() -> BatchJob | None:
    """The Slurm job that this process belongs to."""
    from poet_megatron.monitor.run_dir import BatchJob

    number = os.environ.get("SLURM_JOB_ID")
    return BatchJob(f"slurm {number}", int(os.environ.get("SLURM_RESTART_COUNT") or 0)) if number else None
