"""What the subcommands that take a recipe share: `--config`, dotted overrides, and the table of keys in their help."""

from __future__ import annotations

import argparse
import difflib
import textwrap
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from poet_megatron.errors import UserError

if TYPE_CHECKING:
    from poet_megatron.config.run import RunConfig

HELP_WIDTH = 110
DOC_INDENT = 6


def add_recipe_options(parser: argparse.ArgumentParser) -> None:
    """Add `--config`, and let the words that the parser does not know reach `load_recipe` as settings."""
    parser.add_argument("--config", metavar="YAML", help="recipe to start from, such as configs/demo.yaml (default: the built-in defaults)")
    options = sorted(option for action in parser._actions for option in action.option_strings)
    parser.set_defaults(accepts_overrides=True, known_options=options)


def load_recipe(args: argparse.Namespace) -> RunConfig:
    """RunConfig of `--config` and the dotted settings that follow; UserError for a word that is neither option nor setting."""
    from poet_megatron.config.load import load_config

    _refuse_misspelt_options(args.overrides, args.known_options)
    return load_config(args.config, args.overrides)


def key_table() -> str:
    """Every configuration key with type, default and meaning, grouped by section, for `--help`."""
    from poet_megatron.config.load import describe_fields

    lines = []
    for section, fields in groupby(describe_fields(), key=lambda field: field.key.rpartition(".")[0]):
        lines.append(f"  [{section}]" if section else "  [top level]")
        for field in fields:
            lines.append(f"    --{field.key} {field.type.replace(' | None', '|null').upper()}  (default: {_default(field.default)})")
            lines += textwrap.wrap(field.doc, HELP_WIDTH, initial_indent=" " * DOC_INDENT, subsequent_indent=" " * DOC_INDENT)
        lines.append("")
    return "\n".join(lines).rstrip()


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "empty" if value == "" else str(value)


def _refuse_misspelt_options(words: Sequence[str], options: Sequence[str]) -> None:
    for word in words:
        name = word.partition("=")[0]
        if not name.startswith("--") or "." in name:
            continue
        near = difflib.get_close_matches(name, options, n=1, cutoff=0.75)
        if near:
            raise UserError(f"unknown option {name}; did you mean {near[0]}?")
