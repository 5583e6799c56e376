"""`poet-megatron estimate`: parameter counts, shapes, memory and communication of a recipe on any number of ranks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from poet_megatron.cli.recipe import add_recipe_options, load_recipe

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DESCRIPTION = """\
Prints how many parameters a recipe rotates, trains and holds, the shape of every tensor, the memory that one rank
of every pipeline stage needs by part, what it communicates per step, and where the flops go. It needs no data and
no GPU, and allocates nothing large: one process stands in for any number of ranks."""

EXAMPLES = """\
examples:
  poet-megatron estimate --config configs/llama_60m_poet_bs256.yaml
  poet-megatron estimate --config configs/llama_60m_poet_bs256.yaml --poet.block_size 64
  poet-megatron estimate --config configs/llama_1b3_poet_bs256.yaml --world-size 16 \\
      --parallel.tensor_parallel 8 --parallel.sequence_parallel true
  poet-megatron estimate --config configs/llama_1b3_poet_fs2.yaml --json | jq .memory_bytes

`poet-megatron pretrain --help` lists the settings that --section.key can name."""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `estimate` parser."""
    parser = subparsers.add_parser(
        "estimate",
        help="parameter counts, shapes, memory and communication of a recipe",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="poet-megatron estimate [--config YAML] [--world-size N] [--json] [--section.key VALUE ...]",
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks in all (default: torchrun's WORLD_SIZE, or tensor x pipeline parallel)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns the exit status."""
    config = load_recipe(args)
    from poet_megatron.estimate.estimate import estimate
    from poet_megatron.estimate.report import to_json, to_text

    found = estimate(config, args.world_size)
    print(to_json(found) if args.json else to_text(found))
    return 0
