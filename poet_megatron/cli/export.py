"""`poet-megatron export`: a finished or running run as a Hugging Face model."""

from __future__ import annotations

import argparse
from pathlib import Path

DESCRIPTION = """\
Write a checkpoint of a run as a Hugging Face Llama folder.

The rotations are merged into the weights (W = R W0 P), so the result is an ordinary dense Llama: nothing about POET is needed
to load it, and it is as fast as any model of its size. The folder holds the weights (safetensors, without the rows that pad the
vocabulary), config.json, generation_config.json and the tokenizer. It appears complete or not at all; an earlier export in the
same place is replaced, anything else is left alone with an error. Exporting only reads the run's checkpoints; it takes one
process, whatever parallel layout trained the run.
"""

EXAMPLES = """\
examples:
  poet-megatron export --run runs/demo
      newest checkpoint, fp32, to runs/demo/export
  poet-megatron export --run runs/demo --step 2000 --dtype bf16 --output models/demo-2000
      the checkpoint of step 2000 at half the size

then, in Python:
  from transformers import AutoModelForCausalLM, AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained("runs/demo/export")
  model = AutoModelForCausalLM.from_pretrained("runs/demo/export")
  inputs = tokenizer("The weather today", return_tensors="pt")
  print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `export` command."""
    parser = subparsers.add_parser(
        "export",
        help="write a checkpoint as a Hugging Face Llama model",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="run directory, the one training wrote")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write (default: <run>/export)")
    parser.add_argument("--step", type=int, metavar="N", help="step whose checkpoint to export (default: the newest complete one)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="dtype of the stored weights: fp32 does not round rotated weights, bf16 and fp16 take half the space (default: %(default)s)",
    )
    parser.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="write the weights alone, for a tokenizer that cannot be converted; texts are encoded with the one of the data then",
    )


def run(args: argparse.Namespace) -> int:
    """Export as `args` says, print the folder and return the exit code."""
    from poet_megatron.train.export_run import export_run

    folder = export_run(args.run, args.output, args.step, args.dtype, tokenizer=not args.no_tokenizer)
    print(f"exported to {folder}")
    print(f'load it with transformers.AutoModelForCausalLM.from_pretrained("{folder}")')
    return 0
