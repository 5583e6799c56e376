"""The steps of `poet-megatron prepare`: train-tokenizer, tokenize, merge, verify."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from poet_megatron.errors import UserError

TOKENIZE = """Turn each input file into a part: its token ids as Megatron's .bin/.idx and a .json that says what is in them.

A part appears when its file is finished, all at once. After a crash, a kill or a full disk run the same command again: it continues at
the first file without a part, and the result is the same byte for byte, whatever the number of workers. Records that cannot be used
(invalid JSON or UTF-8, no text, empty text, NUL characters, lone surrogates, too long) are skipped, counted and listed in the part's .json
with their line numbers; a damaged file gives the documents before the damage. --strict stops at the first such record instead.
`merge` comes next."""

TOKENIZE_EXAMPLES = """examples:
  # C4 on one machine, all processors
  poet-megatron prepare tokenize --input 'c4/en/c4-train.*.json.gz' --tokenizer tokenizer.model --output parts/train --valid-fraction 0

  # the same as a Slurm array of 32 tasks (sbatch --array=0-31); every task gets the same command
  poet-megatron prepare tokenize --input 'c4/en/c4-train.*.json.gz' --tokenizer tokenizer.model --output parts/train --valid-fraction 0 \\
      --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT

  # C4's own validation files: everything goes to the validation split
  poet-megatron prepare tokenize --input 'c4/en/c4-validation.*.json.gz' --tokenizer tokenizer.model --output parts/valid --valid-fraction 1

  # streamed from the Hugging Face hub; every shard of the dataset becomes a part
  poet-megatron prepare tokenize --dataset allenai/c4 --dataset-config en --tokenizer tokenizer.model --output parts/train"""

MERGE = """Join the parts of one or several folders, in the order of their sources, into a folder for data.path: train.bin/.idx,
valid.bin/.idx, tokenizer.model, lengths.svg (a histogram of document lengths) and manifest.json. Needs as much room as the parts, which
are not changed."""

VERIFY = """Check a folder of parts or a merged one: hashes, sizes and counts against the manifests, every field of the indexes, that all
ids are in the vocabulary and all documents end where they should; then show the beginnings of some documents. Exits with status 1 if
something is wrong."""

TRAIN = """Learn a SentencePiece vocabulary with byte fallback: every text has tokens, and spaces, tabs and newlines survive a round trip.
Both can be exported to Hugging Face with the model; of two unigram splits with equal scores it may choose the other. The first --max-mb
of the inputs are used."""


TRAIN_EXAMPLE = """example:
  poet-megatron prepare train-tokenizer --input 'c4/en/c4-train.0000*.json.gz' --vocab-size 32000 --output tokenizer.model"""


def add_steps(parser: argparse.ArgumentParser) -> None:
    """Add the steps to the parser of `prepare`."""
    steps = parser.add_subparsers(dest="step", metavar="STEP", help="tokenize, merge, verify, train-tokenizer")
    _add_tokenize(_step(steps, "tokenize", TOKENIZE, TOKENIZE_EXAMPLES))
    _add_merge(_step(steps, "merge", MERGE, "example:\n  poet-megatron prepare merge --parts parts/train parts/valid --output data/c4"))
    _add_verify(_step(steps, "verify", VERIFY, "example:\n  poet-megatron prepare verify data/c4"))
    _add_train(_step(steps, "train-tokenizer", TRAIN, TRAIN_EXAMPLE))


def _step(steps: Any, name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    return steps.add_parser(name, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter)


def _add_tokenize(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--input", nargs="+", metavar="FILES", help="files or quoted globs: .jsonl or .json (an object a line), .txt (a document a file), "
        "each also .gz and .zst; .parquet")  # fmt: skip
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the parts; the same for all shards")
    add(
        "--tokenizer",
        type=Path,
        required=True,
        metavar="FILE",
        help="SentencePiece .model, tokenizer.json or .tiktoken",
    )
    add("--workers", type=int, metavar="N", help="encoder processes (default: the processors that this process may use)")
    add("--shard", default="0/1", metavar="i/N", help="make only every N-th part, from part i on (0 to N-1): for a Slurm array")
    add("--valid-fraction", type=float, metavar="F", help="share for validation, by a hash of the text (default: 0.001)")
    add("--strict", action="store_true", help="stop at the first record that cannot be used")
    add("--text-key", default="text", metavar="NAME", help="field or column that holds the text (default: text)")
    add(
        "--eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="append the end-of-sequence token to each (default: yes)",
    )
    add("--bos", action=argparse.BooleanOptionalAction, default=False, help="put the begin-of-sequence token before each (default: no)")
    add("--eos-token", default="", metavar="PIECE", help="the end-of-sequence token of a tokenizer.json, if it is not clear")
    add("--bos-token", default="", metavar="PIECE", help="its begin-of-sequence token")
    add("--max-document-bytes", type=int, metavar="N", help="skip longer records (default: 4 MiB); one takes 12 to 60 times its size")
    add("--dedup", action="store_true", help="drop documents whose text was seen before in this shard; up to 16 bytes of memory a document")
    add("--c4-filters", action="store_true", help="apply C4's rules for lines and pages, for text that has not been through them")
    add("--no-space-check", action="store_true", help="begin even if the disk seems too small")
    _add_dataset(parser)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Hugging Face datasets", "instead of --input; needs the datasets package")
    group.add_argument("--dataset", metavar="NAME", help="for example allenai/c4")
    group.add_argument("--dataset-config", default="", metavar="NAME", help="for example en")
    group.add_argument("--dataset-split", default="train", metavar="NAME", help="(default: train)")
    group.add_argument("--dataset-revision", default="", metavar="REV", help="commit or tag, so that a later run reads the same")
    group.add_argument("--dataset-files", nargs="+", default=(), metavar="FILES", help="data_files of the dataset")


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", type=Path, required=True, metavar="DIR", help="folders made by tokenize")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="where the tokenizer is now, if it was moved")
    parser.add_argument("--force", action="store_true", help="overwrite data that is in the folder")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder made by tokenize, merge or prepare --output")
    parser.add_argument("--sources", action="store_true", help="also compare the hashes of the source files")
    parser.add_argument("--samples", type=int, default=3, metavar="N", help="documents to show (default: 3)")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="where the tokenizer is now, if it was moved")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", nargs="+", required=True, metavar="FILES", help="files or quoted globs, as for tokenize")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write, for example tokenizer.model")
    parser.add_argument("--vocab-size", type=int, default=32000, metavar="N", help="tokens (default: 32000)")
    parser.add_argument("--model", choices=("bpe", "unigram"), default="bpe", help="kind of vocabulary (default: bpe)")
    parser.add_argument("--max-mb", type=int, default=256, metavar="N", help="learn from this much text (default: 256)")
    parser.add_argument("--text-key", default="text", metavar="NAME", help="field or column that holds the text (default: text)")


def run(args: argparse.Namespace) -> int:
    """Take a step."""
    return {"tokenize": _tokenize, "merge": _merge, "verify": _verify, "train-tokenizer": _train}[args.step](args)


def _tokenize(args: argparse.Namespace) -> int:
    from data_prep.hub import find_shards
    from data_prep.pool import available_cpus
    from data_prep.settings import Settings, Shard
    from data_prep.sources import find_files
    from data_prep.tokenizing import tokenize

    if bool(args.input) == bool(args.dataset):
        raise UserError("give either --input FILES or --dataset NAME")
    optional = {name: getattr(args, name) for name in ("valid_fraction", "max_document_bytes") if getattr(args, name) is not None}
    names = ("eos", "bos", "eos_token", "bos_token", "text_key", "c4_filters", "dedup")
    settings = Settings(tokenizer=str(args.tokenizer.resolve()), **{name: getattr(args, name) for name in names}, **optional)
    shard = Shard.parse(args.shard)
    sources: Any = find_files(args.input) if args.input else find_shards(
        args.dataset, args.dataset_config, args.dataset_split, args.dataset_revision, args.dataset_files
    )  # fmt: skip
    workers = args.workers if args.workers is not None else available_cpus()
    totals = tokenize(
        sources,
        args.output,
        settings,
        shard=shard,
        workers=workers,
        strict=args.strict,
        check_space=not args.no_space_check,
        command=sys.argv,
    )
    for split, documents in totals.documents.items():
        print(f"{split}: {documents:,} documents, {totals.tokens[split]:,} tokens")
    _print_left_out(totals.skipped, totals.filtered)
    print(f"{args.output}: all {totals.parts} parts of shard {args.shard} are finished ({totals.reused} were there)")
    print(f"next{', when all shards are' if shard.count > 1 else ''}: poet-megatron prepare merge --parts {args.output} --output FOLDER")
    return 0


def _print_left_out(skipped: dict[str, int], filtered: dict[str, int]) -> None:
    for word, counts in (("skipped", skipped), ("filtered", filtered)):
        for reason, number in sorted(counts.items()):
            print(f"{word}: {number:,} records ({reason})")


def _merge(args: argparse.Namespace) -> int:
    from data_prep.merge import merge

    manifest = merge(args.parts, args.output, tokenizer=args.tokenizer, force=args.force, command=sys.argv)
    for name, counts in manifest.splits.items():
        print(f"{name}: {counts.documents:,} documents, {counts.tokens:,} tokens, {counts.text_bytes / 1e6:.2f} MB")
        if not counts.documents:
            print(
                f"warning: the {name} split is empty: tokenize with another --valid-fraction, or add a folder of parts for it",
                file=sys.stderr,
            )
    _print_left_out(manifest.skipped, manifest.details["filtered"])
    print(f"{args.output}: use data.path={args.output} and model.vocab_size={manifest.vocab_size}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from data_prep.verify import verify

    findings = verify(args.folder, check_sources=args.sources, tokenizer=args.tokenizer, samples=args.samples)
    for sample in findings.samples:
        print(sample)
    for problem in findings.problems:
        print(f"problem: {problem}", file=sys.stderr)
    print(
        f"{args.folder}: {findings.files} files, {findings.documents:,} documents, {findings.tokens:,} tokens, "
        f"{len(findings.problems)} problems"
    )
    return 1 if findings.problems else 0


def _train(args: argparse.Namespace) -> int:
    from data_prep.settings import MAX_DOCUMENT_BYTES
    from data_prep.sources import find_files
    from data_prep.tokenizer import train_tokenizer
    from data_prep.train_texts import texts

    skipped: Counter[str] = Counter()
    found = texts(find_files(args.input), args.text_key, MAX_DOCUMENT_BYTES, skipped)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(found, args.output, args.vocab_size, args.max_mb * 1024**2, args.model)
    _print_left_out(skipped, {})
    print(f"{args.output}: {args.model}, {tokenizer.vocab_size:,} tokens, sha256 {tokenizer.sha256[:12]}")
    return 0
