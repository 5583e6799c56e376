"""The `poet-megatron` command: finds the subcommand, runs it, and turns expected errors into one line.

A subcommand is a module `poet_megatron.cli.<name>` with `add_parser(subparsers)` and `run(args) -> int`; only the one asked for is
imported. One that takes a recipe calls `cli.recipe.add_recipe_options`: the `--section.key value` words that its parser does not know
then arrive as `args.overrides`, for `cli.recipe.load_recipe(args)`.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from poet_megatron import __version__
from poet_megatron.errors import EXIT_USER_ERROR, FaultError, UserError

QUIETED = (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "`load_state_dict` is deprecated",
    "Please use DTensor",
    r"`torch\.distributed\.\w+` is deprecated",
)
COMMANDS = {
    "prepare": "tokenize and pack text into the .bin/.idx files that training reads",
    "pretrain": "train a model from a recipe (start here: poet-megatron pretrain --help)",
    "evaluate": "validation loss and perplexity of a run",
    "convert": "turn a run's checkpoint of any parallel layout into a run for one process",
    "export": "write a run's model as a Hugging Face Llama checkpoint",
    "estimate": "parameter counts, shapes and memory per rank of a recipe, without training",
    "launch": "check, then submit to Slurm: pretraining, a whole chain from text to a model, or a sweep",
    "compare": "one table and one picture of several runs",
    "doctor": "what is installed and which implementation each op uses; --distributed checks an allocation",
}
EXIT_OK, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 0, 130, 141
TRACEBACK_OPTION = "--traceback"

DESCRIPTION = "Pretrain Llama models with POET (W = R W0 P, learned orthogonal R and P) on megatron-core."
EPILOG = """\
a first run:
  poet-megatron prepare --help
  poet-megatron estimate --config configs/demo.yaml
  poet-megatron pretrain --config configs/demo.yaml --dry-run
  poet-megatron pretrain --config configs/demo.yaml --train.steps 100

`poet-megatron COMMAND --help` explains a command. Mistakes exit with status 2 and one line on stderr;
--traceback anywhere, or POET_DEBUG=1 in the environment, shows where they were found."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns 0, 2 for a mistake of the user, or another status of poet_megatron.errors."""
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = TRACEBACK_OPTION in words or os.environ.get("POET_DEBUG", "") not in ("", "0")
    words = [word for word in words if word != TRACEBACK_OPTION]
    try:
        with warnings.catch_warnings():  # of megatron-core, about its optional parts and its own defaults
            for message in QUIETED:
                warnings.filterwarnings("ignore", message=message)
            status = _dispatch(words)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # whoever read the output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python writes when it ends
        return EXIT_BROKEN_PIPE
    except SystemExit as finished:  # argparse: --help, --version and usage errors
        return finished.code if isinstance(finished.code, int) else EXIT_OK if finished.code is None else EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, FileNotFoundError, FaultError) as error:
        _report(error, show_traceback)
        return error.exit_status if isinstance(error, UserError | FaultError) else EXIT_USER_ERROR


def _dispatch(words: list[str]) -> int:
    command = next((word for word in words if not word.startswith("-")), None)
    parser = _build_parser(command)
    if not words:
        parser.print_help(sys.stderr)
        return EXIT_USER_ERROR
    args, rest = parser.parse_known_args(words)
    if getattr(args, "accepts_overrides", False):
        args.overrides = rest
    elif rest:
        raise UserError(f"unknown option {rest[0]}; `poet-megatron {args.command} --help` lists the options{_similar(rest[0], args)}")
    return int(importlib.import_module(f"poet_megatron.cli.{args.command}").run(args))


def _build_parser(command: str | None) -> argparse.ArgumentParser:
    """Parser in which only `command` is complete: the other subcommands are names with one line of help."""
    parser = argparse.ArgumentParser(
        prog="poet-megatron",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"poet-megatron {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        if name == command:
            importlib.import_module(f"poet_megatron.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


def _similar(word: str, args: argparse.Namespace) -> str:
    names = [f"--{name.replace('_', '-')}" for name in vars(args)]
    near = difflib.get_close_matches(word.partition("=")[0], names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _report(error: Exception, show_traceback: bool) -> None:
    if show_traceback:
        traceback.print_exception(error)
    text = f"{error.filename}: no such file or folder" if isinstance(error, FileNotFoundError) and error.filename else str(error)
    print(f"error: {text or type(error).__name__}", file=sys.stderr)
    if not show_traceback and not _raised_by_us(error):
        print(f"(raised outside poet_megatron; run again with {TRACEBACK_OPTION} to see where)", file=sys.stderr)


def _raised_by_us(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    return isinstance(error, UserError | FaultError) or module.split(".")[0] in ("poet_megatron", "data_prep")
