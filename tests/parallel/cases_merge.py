"""Cases of test_distributed_merge.py; as a script, runs them on 4 ranks, which take one layout after the other."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import merge_checks
import torch.distributed as dist
from merge_checks import RANKS

from benchmarks.worlds import run_world
from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.engine.build import build_engine
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import parallel_context

TIMEOUT = 600.0
SETTINGS = {
    "model.num_layers": 1,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.num_attention_heads": 4,
    "model.num_query_groups": 2,
    "model.seq_length": 16,
    "model.vocab_size": 128,
    "poet.block_size": 12,  # ragged in widths of 16, 32, 64 and 96
    "poet.orthogonal_map": "cayley",
    "optim.poet_lr": 1e-2,
    "optim.schedule": "constant",
    "train.micro_batch_size": 1,
    "train.global_batch_size": 8,
    "train.precision": "fp32",
    "parallel.timeout_minutes": 1,
}
DP4, TP2, TP2_SP, PP2 = {}, {"tensor_parallel": 2}, {"tensor_parallel": 2, "sequence_parallel": True}, {"pipeline_parallel": 2}
TWO_LAYERS = {"model.num_layers": 2}
BF16, SHARDED = {"train.precision": "bf16"}, {"parallel.distributed_optimizer": True}


@dataclass(frozen=True)
class Case:
    """One check on an engine in one layout; `arguments` go to the check."""

    name: str
    check: str
    layout: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: tuple = ()

    @property
    def run(self) -> RunConfig:
        parallel = {f"parallel.{key}": value for key, value in self.layout.items()}
        settings = {**SETTINGS, **parallel, **self.settings}
        return load_config(None, [f"--{key}={str(value).lower()}" for key, value in settings.items()])


def _cases() -> list[Case]:
    flavours = {"plain": {}, "sharded": SHARDED, "bf16": BF16, "bf16-sharded": {**BF16, **SHARDED}}
    cases = [Case(f"merge-dp4-{name}", "merge", DP4, settings) for name, settings in flavours.items()]
    shared = {"poet.share_input_rotation": True}
    cases.append(Case("merge-dp4-bf16-shared", "merge", DP4, {**BF16, **shared}))
    cases.append(
        Case("merge-dp4-bf16-weight-fs", "merge", DP4, {**BF16, "poet.variant": "fs", "poet.block_size": 0.5, "poet.compute": "weight"})
    )
    cases.append(Case("overlap-dp4", "overlap", DP4))
    cases.append(Case("majority-dp4", "plants", DP4, arguments=(("weight", 2, ["on rank 2 differs from ranks 0, 1, 3"]),)))
    cases += [
        Case(f"merge-tp2-{name}", "merge", TP2_SP, settings) for name, settings in flavours.items() if name in ("plain", "bf16-sharded")
    ]
    plants = (
        ("skew", 1, ["differs between rank 0 and rank 1", "differs between rank 1 and rank 3"]),
        ("perm", 2, ["differs between rank 2 and rank 3", "differs between rank 0 and rank 2"]),
        ("weight", 3, ["differs between rank 1 and rank 3"]),
        ("norm", 0, ["differs between rank 0 and rank 1", "differs between rank 0 and rank 2"]),
    )
    cases.append(Case("plants-tp2-sp", "plants", TP2_SP, {**BF16, **SHARDED}, plants))
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "num_query_groups": 4}
    wide = {"poet.block_size": 64, **{f"model.{key}": value for key, value in sizes.items()}}
    for name, settings in {"masters": {}, "rounded": {"poet.master_weights": False}}.items():
        cases.append(Case(f"spectrum-tp2-{name}", "spectrum", TP2, {**BF16, **SHARDED, **wide, **settings}))
    cases.append(Case("merge-pp2-plain", "merge", PP2, TWO_LAYERS))
    cases.append(Case("merge-pp2-bf16-sharded", "merge", PP2, {**TWO_LAYERS, **BF16, **SHARDED}))
    cases.append(Case("plants-pp2", "plants", PP2, TWO_LAYERS, (("norm", 3, ["differs between rank 2 and rank 3"]),)))
    return cases


CASES = {case.name: case for case in _cases()}
CHECKS: dict[str, Callable] = {
    "merge": merge_checks.check_merge,
    "overlap": merge_checks.check_overlap,
    "spectrum": merge_checks.check_spectrum,
    "plants": merge_checks.check_plants,
}


def run_case(case: Case, context: Any, alone: dist.ProcessGroup) -> dict:
    """{"error": text, empty if all ranks pass, ...figures}."""
    figures = None
    try:
        figures = CHECKS[case.check](build_engine(case.run, context), alone, *case.arguments)
    except Exception:
        merge_checks.FAILED.append(f"rank {context.rank}: {traceback.format_exc()}")
    failed: list[list[str]] = [[] for _ in range(RANKS)]
    dist.all_gather_object(failed, merge_checks.FAILED)
    merge_checks.FAILED.clear()
    return {"error": "\n".join(itertools.chain(*failed)), **(figures or {})}


def run_cases(output: Path) -> None:
    """Run every case on this rank; rank 0 writes the results."""
    results = {}
    for layout, cases in itertools.groupby(CASES.values(), key=lambda case: case.layout):
        with parallel_context(ParallelConfig(timeout_minutes=1, **layout), seed=1) as context:
            alone = [dist.new_group([rank]) for rank in range(RANKS)][context.rank]
            results |= {case.name: run_case(case, context, alone) for case in cases}
    if context.rank == 0:
        output.write_text(json.dumps(results))


if __name__ == "__main__":
    run_world(RANKS, functools.partial(run_cases, Path(sys.argv[1])), TIMEOUT)
