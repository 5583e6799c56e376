"""`poet-megatron evaluate`: validation loss and perplexity of a run's checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

DESCRIPTION = """\
Measure a checkpoint on held-out text.

The loss is the mean over tokens, not over batches, so that it does not depend on the batch size, on padding or on the number of GPUs.
"""

EXAMPLES = """\
examples:
  poet-megatron evaluate --run runs/demo
      newest checkpoint on the run's own validation data
  poet-megatron evaluate --run runs/demo --step 2000 --tokens 100000
      a quick look at step 2000
  poet-megatron evaluate --run runs/demo --data data/other --json
      on other data, prepared with the same tokenizer, for a script to read
"""

MEANINGS = {
    "loss": "Mean cross-entropy in nats per token; lower is better, and guessing uniformly among V tokens gives ln V.",
    "ppl": "exp(loss): as uncertain as a uniform choice among this many tokens; compare it between runs of one tokenizer only.",
    "ppl_reference_protocol": (
        "The perplexity as the code behind the published tables counts it (the summed loss of n batches divided by n + 1), "
        "which is too low: use it only beside those tables."
    ),
}
"""What each printed number means."""

DEFAULT_TOKENS = 10_000_000
"""Tokens to evaluate on: the protocol of the paper's tables."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `evaluate` command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="validation loss and perplexity of a checkpoint",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, the one training wrote")
    parser.add_argument("--step", type=int, metavar="N", help="step whose checkpoint to evaluate (default: the newest complete one)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data whose validation split to use (default: the run's)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=DEFAULT_TOKENS,
        metavar="N",
        help="stop after this many tokens, or at the end of the data (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(args: argparse.Namespace) -> int:
    """Evaluate as `args` says, print the results and return the exit code."""
    from poet_megatron.errors import UserError

    if args.tokens < 1:
        raise UserError(f"--tokens is {args.tokens}; it must be at least 1")
    from poet_megatron.train.evaluate_run import evaluate_run

    results = evaluate_run(args.run, args.step, args.data, args.tokens)
    print(json.dumps(results) if args.json else describe(results))
    return 0


def describe(results: dict[str, float]) -> str:
    """The results as text: each number with one sentence on what it means, anything else by name."""
    width, lines = max(map(len, results), default=0) + 2, []
    for name, value in results.items():
        lines.append(f"{name:<{width}}{value:.10g}" if name not in MEANINGS else f"{name:<{width}}{value:.4f}\n    {MEANINGS[name]}")
    return "\n".join(lines)
