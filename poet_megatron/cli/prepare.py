"""`poet-megatron prepare`: text files to the tokenized data that training reads, in one step; `cli.prepare_steps` has the steps."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from poet_megatron.cli import prepare_steps
from poet_megatron.errors import UserError

DESCRIPTION = """Tokenize text into a folder that training opens: tokenizer.model, train.bin/.idx, valid.bin/.idx, manifest.json.

Without --input it uses the documentation of Python's standard library (3 MB of English text, nothing to download): enough to try
everything. Without --tokenizer it trains one on the training documents. Running the same command again reuses what is there.

For a corpus of many files, such as C4, take the steps one by one: they use all processors, continue after a crash, spread over a Slurm
array, and count bad records instead of stopping at them:

  train-tokenizer    learn a vocabulary from some of the files
  tokenize           each file to a part of token ids
  merge              all parts to one folder that training opens
  verify             check hashes, counts and indexes; show samples

`poet-megatron prepare STEP --help` explains a step; docs/tokenizing.md goes through all of them."""

EXAMPLES = """examples:
  # Text that is already on this machine, 4,096 tokens; a few seconds
  poet-megatron prepare --output data/docs

  # Your own documents: JSON lines with a "text" field, or plain text with one document per file
  poet-megatron prepare --output data/mine --input notes/*.txt articles.jsonl.gz --vocab-size 8192

  # C4 with its own validation files and a tokenizer that you have
  poet-megatron prepare --output data/c4 --input 'c4/en/c4-train.*.json.gz' --valid-input 'c4/en/c4-validation.*.json.gz' \\
      --tokenizer tokenizer.model --threads 8

Then set data.path to the folder and model.vocab_size to the vocabulary that prepare printed."""

INPUT_HELP = "files or globs: .jsonl, .json, .txt, each also .gz (default: Python's documentation)"
FRACTION_HELP = "share of documents held out, chosen by a hash of the text (default: 0.02)"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Add the `prepare` command."""
    parser = subparsers.add_parser(
        "prepare",
        help="tokenize text files into training and validation data",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (required without STEP)")
    parser.add_argument("--input", nargs="+", metavar="FILES", help=INPUT_HELP)
    parser.add_argument("--valid-input", nargs="+", metavar="FILES", help="files that validation uses instead of a share of --input")
    parser.add_argument("--valid-fraction", type=float, default=0.02, metavar="F", help=FRACTION_HELP)
    parser.add_argument("--vocab-size", type=int, metavar="N", help="size of the vocabulary to train (default: 4096)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="use this SentencePiece model instead of training one")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="threads (default: 1); the result does not depend on it")
    parser.add_argument("--force", action="store_true", help="rebuild even if the folder is complete or holds other data")
    prepare_steps.add_steps(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Take the step asked for, or prepare the data in one and print what was made."""
    if args.step:
        return prepare_steps.run(args)
    if args.output is None:
        raise UserError("poet-megatron prepare needs --output DIR, or a step: tokenize, merge, verify or train-tokenizer")
    from data_prep.prepare import prepare

    manifest = prepare(
        args.input,
        args.output,
        valid_inputs=args.valid_input,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        valid_fraction=args.valid_fraction,
        force=args.force,
        threads=args.threads,
        command=sys.argv,
    )
    for name, counts in manifest.splits.items():
        print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.text_bytes / 1e6:.2f} MB")
    for reason, number in manifest.skipped.items():
        print(f"skipped: {number:,} documents ({reason})")
    print(f"{args.output}: use data.path={args.output} and model.vocab_size={manifest.vocab_size}")
    return 0
