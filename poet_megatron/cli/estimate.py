"""`poet-megatron estimate`: parameter counts, shapes and memory of a recipe."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from poet_megatron.cli.recipe import add_recipe_options, load_recipe

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DESCRIPTION = """\
Prints how many parameters a recipe rotates, trains and holds, the shape of every tensor, and the memory
that one rank needs by part, without data and without building the model."""

EXAMPLES = """\
examples:
  poet-megatron estimate --config configs/llama_60m_poet_bs256.yaml
  poet-megatron estimate --config configs/llama_60m_poet_bs256.yaml --poet.block_size 64
  poet-megatron estimate --config configs/llama_1b3_poet_fs2.yaml --json | jq .memory_bytes

`poet-megatron pretrain --help` lists the settings that --section.key can name."""


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `estimate` parser."""
    parser = subparsers.add_parser(
        "estimate",
        help="parameter counts, shapes and memory per rank of a recipe",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="poet-megatron estimate [--config YAML] [--json] [--section.key VALUE ...]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    add_recipe_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the estimate; returns the exit status."""
    config = load_recipe(args)
    from poet_megatron.model.estimate import estimate

    result = estimate(config)
    print(result.to_json() if args.json else result.to_text())
    return 0
