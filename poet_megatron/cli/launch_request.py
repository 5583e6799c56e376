"""Arguments of `poet-megatron launch` to what is submitted."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.sources import find_files
from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.data.corpora import resolve_data
from poet_megatron.errors import UserError
from poet_megatron.launch.check import made_already, parse_nodes
from poet_megatron.launch.jobs import Request, Text
from poet_megatron.launch.record import next_folder
from poet_megatron.launch.sweep import parse_sweep

TASKS = 32
"""Tasks of a tokenization array at most, unless more are asked for."""


def absolute(run: RunConfig) -> RunConfig:
    """The run with absolute paths, since jobs run in the clone."""
    if not run.train.run_dir:
        raise UserError("train.run_dir is empty: give the run a directory, for example --train.run_dir runs/first")
    train = dataclasses.replace(run.train, run_dir=str(Path(run.train.run_dir).resolve()))
    return dataclasses.replace(run, data=resolve_data(run.data), train=train)


def make_request(args: argparse.Namespace, run: RunConfig, root: Path, environment: Mapping[str, str]) -> Request:
    """The request of `args`; `environment` is the site's."""
    if args.gpus_per_node < 1:
        raise UserError(f"--gpus-per-node is {args.gpus_per_node}; it must be at least 1")
    if args.export and args.sweep:
        raise UserError("--export with --sweep: export the best run afterwards, with sbatch launch/slurm/export.sbatch DIR")
    run_dir = Path(run.train.run_dir)
    return Request(
        root=root,
        run_dir=run_dir,
        folder=next_folder(run_dir),
        nodes=parse_nodes(args.nodes),
        gpus_per_node=args.gpus_per_node,
        time=args.time,
        data_time=args.data_time or args.time,
        options=(*_named(args, "account", "qos", "reservation"), *args.sbatch_option),
        gpu_options=_named(args, "partition", "constraint"),
        cpu_options=_cpu_options(args, environment),
        text=_text(args, run),
        points=tuple(parse_sweep(args.sweep)),
        export=args.export,
    )


def variants(args: argparse.Namespace, run: RunConfig, request: Request) -> dict[Path, RunConfig]:
    """Settings of every run by its directory: one, or the points of the sweep."""
    if not request.points:
        return {request.run_dir: run}
    found = {}
    for point in request.points:
        try:
            found[request.run_dir / point.name] = absolute(load_config(args.config, [*args.overrides, *point.words]))
        except ValueError as error:
            raise UserError(f"--sweep, point {point.name}: {error}") from error
    return found


def _named(args: argparse.Namespace, *names: str) -> tuple[str, ...]:
    return tuple(f"--{name}={getattr(args, name)}" for name in names if getattr(args, name))


def _cpu_options(args: argparse.Namespace, environment: Mapping[str, str]) -> tuple[str, ...]:
    partition = args.cpu_partition or environment.get("POET_CPU_PARTITION") or args.partition
    gpu_alone = ("--constraint=",) if environment.get("SBATCH_CONSTRAINT") else ()  # such as a kind of GPU: not for these jobs
    return (*((f"--partition={partition}",) if partition else ()), *gpu_alone)


def _text(args: argparse.Namespace, run: RunConfig) -> Text | None:
    """What is to become the data; None if nothing is, or if an earlier submission made it."""
    if not args.input:
        for name in ("valid_input", "valid_fraction", "tokenizer", "vocab_size", "tokenize_tasks", "data_time"):
            if getattr(args, name):
                raise UserError(f"--{name.replace('_', '-')} is for text: give --input FILES too, or leave it out")
        return None
    if bool(args.tokenizer) == bool(args.vocab_size):
        raise UserError("--input needs one of --tokenizer FILE and --vocab-size N (which trains a tokenizer of N tokens)")
    if args.valid_input and args.valid_fraction is not None:
        raise UserError("--valid-fraction is a share of --input, and --valid-input takes its place: leave one of them out")
    if run.data.blend:
        raise UserError("data.blend with --input, which makes data.path: leave data.blend out, or tokenize first (docs/tokenizing.md)")
    if not run.data.path:
        raise UserError("data.path is empty: name the folder that --input becomes, for example --data.path data/c4")
    text = Text(
        inputs=tuple(_absolute(pattern) for pattern in args.input),
        valid_inputs=tuple(_absolute(pattern) for pattern in args.valid_input),
        tokenizer=str(args.tokenizer.resolve()) if args.tokenizer else "",
        vocab_size=args.vocab_size or 0,
        tasks=_tasks(args.input, args.tokenize_tasks),
        valid_tasks=_tasks(args.valid_input, None) if args.valid_input else 0,
        valid_fraction=args.valid_fraction,
        output=Path(run.data.path),
    )
    return None if made_already(text) else text


def _absolute(pattern: str) -> str:
    return os.path.abspath(pattern)  # noqa: PTH100 (Path.resolve would follow a link named in a glob)


def _tasks(inputs: Sequence[str], wanted: int | None) -> int:
    return min(TASKS, len(find_files(inputs))) if wanted is None else wanted
