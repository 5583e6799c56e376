"""`poet-megatron launch`: check a run, then submit it to Slurm, alone, in a chain from text to a model, or as a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from poet_megatron.cli.recipe import add_recipe_options

if TYPE_CHECKING:
    from argparse import _SubParsersAction

DESCRIPTION = """\
Checks that a run is possible (layout, cluster, data, run directory), then submits the scripts of launch/slurm. The resolved recipe is
kept in train.run_dir/launch/N with the logs: editing the recipe later does not change a job that waits or is requeued. The job saves
before its time is up and requeues itself until the run is complete; the same launch command continues a run that was stopped.

What belongs to the site (account, partition, modules, network) is in launch/slurm/site.sh, or in the file that POET_SITE names."""

EXAMPLES = """\
examples:
  poet-megatron launch --recipe configs/llama_1b3_poet_bs256.yaml --nodes 2 --time 1-00:00:00 --dry-run
      checks, and the sbatch commands; nothing is submitted, and Slurm need not be here
  poet-megatron launch --recipe configs/llama_1b3_poet_bs256.yaml --nodes 2-4 --time 12:00:00 --optim.poet_lr 2e-3
      two to four nodes: requeued on fewer when one dies
  poet-megatron launch --recipe configs/llama_60m_poet_bs256.yaml --nodes 1 --time 12:00:00 --export --data.path data/c4 \\
      --input 'c4/en/c4-train.*.json.gz' --valid-input 'c4/en/c4-validation.*.json.gz' --tokenizer tokenizer.model
      text -> tokens -> training -> evaluation and Hugging Face model, each job after the one before
  poet-megatron launch --recipe configs/llama_60m_poet_bs256.yaml --nodes 1 --time 12:00:00 --train.run_dir runs/sweep \\
      --sweep optim.poet_lr=1e-3,2e-3 poet.block_size=64,256
      four runs as a job array, then one table and one picture of them

docs/cluster.md goes through all of it. `poet-megatron pretrain --help` lists the settings that --section.key can name."""

TASKS = 32


def add_parser(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `launch` parser."""
    parser = subparsers.add_parser(
        "launch",
        help="check a run and submit it to Slurm",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="poet-megatron launch --recipe YAML --nodes N[-M] --time D-HH:MM:SS [--dry-run] [options] [--section.key VALUE ...]",
    )
    add = parser.add_argument
    add("--recipe", dest="config", metavar="YAML", help="recipe, such as configs/llama_1b3_poet_bs256.yaml; the same as --config")
    add("--nodes", required=True, metavar="N[-M]", help="nodes, or the least and the most that will do")
    add("--gpus-per-node", type=int, default=8, metavar="N", help="GPUs, and ranks, per node (default: 8)")
    add("--time", required=True, metavar="D-HH:MM:SS", help="time limit of each job with GPUs; training goes on in the next one")
    add("--dry-run", action="store_true", help="check and print the commands; submit nothing")
    add("--scripts", type=Path, metavar="DIR", help="clone whose launch/slurm to use (default: the one of this package)")
    _add_slurm(parser)
    _add_text(parser)
    parser.add_argument("--export", action="store_true", help="then evaluate, and export as a Hugging Face model")
    parser.add_argument("--sweep", nargs="+", default=[], metavar="KEY=V,V", help="one run for each combination of these values")
    add_recipe_options(parser)


def _add_slurm(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sbatch", "go before what site.sh sets")
    for name in ("partition", "account", "qos", "constraint", "reservation"):
        group.add_argument(f"--{name}", metavar="NAME", help="option of sbatch" + (" for jobs with GPUs" if name == "constraint" else ""))
    group.add_argument("--cpu-partition", metavar="NAME", help="partition of jobs without GPUs (default: POET_CPU_PARTITION of site.sh)")
    group.add_argument("--sbatch-option", action="append", default=[], metavar="OPTION", help="any other, as --sbatch-option=--nice=100")


def _add_text(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("text", "makes data.path first, in an array of jobs and one that merges (docs/tokenizing.md)")
    add = group.add_argument
    add("--input", nargs="+", metavar="FILES", help="files or quoted globs, as for prepare tokenize")
    add("--valid-input", nargs="+", default=[], metavar="FILES", help="files of the validation split (default: a share of --input)")
    add("--valid-fraction", type=float, metavar="F", help="that share (default: 0.001)")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer to use")
    add("--vocab-size", type=int, metavar="N", help="instead of --tokenizer: train one of N tokens on the text")
    add("--tokenize-tasks", type=int, metavar="N", help=f"tasks of the array (default: one per file, {TASKS} at most)")
    add("--data-time", metavar="D-HH:MM:SS", help="time limit of each job without GPUs (default: --time)")


def run(args: argparse.Namespace) -> int:
    """Check and submit; returns the exit status."""
    from poet_megatron.cli.launch_run import launch

    return launch(args)
