"""Cases of test_training_layouts.py that look inside the engine: initial weights, counts, recomputation, clipping. Run as a script, which
forks a world of each size and writes {case: what rank 0 saw} as JSON."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from benchmarks.layout_cases import LAYOUTS, Case, Layout, train_batches
from benchmarks.layouts import prepare_data, why_not
from benchmarks.worlds import WorldFailed, run_world
from poet_megatron.engine.base import Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.layers.rotation import Rotation
from poet_megatron.model.canonical import canonical_slots
from poet_megatron.model.config import INITS
from poet_megatron.model.count import count_parameters
from poet_megatron.model.init import initialize
from poet_megatron.ops.cayley import OrthogonalMap
from poet_megatron.parallel.context import parallel_context
from poet_megatron.train.report import mean_step_flops
from poet_megatron.train.step import train_step

METHODS = ("bs", "adamw")
RECOMPUTE = ("none", "selective", "full")
RECOMPUTE_LAYOUTS = ("1 rank", "TP2 + SP", "PP2 interleaved")
COMPUTE = ("input", "weight")
BUILT = [layout for layout in LAYOUTS if layout.settings.get("engine") != "deepspeed"]
TIMEOUT = 600.0


def named(layout: str) -> Layout:
    """The layout of that name."""
    return next(entry for entry in LAYOUTS if entry.name == layout)


def built_cases() -> dict[str, tuple[Case, str]]:
    """Build the model, train nothing."""
    settings = {"poet.compute": "input"}  # auto depends on the layout
    return {f"built|{layout.name}|{method}": (Case(layout, method, settings), "built") for layout in BUILT for method in METHODS}


def recompute_cases() -> dict[str, tuple[Case, str]]:
    """Three steps in every recomputation mode."""
    return {
        f"recompute|{layout}|{compute}|{mode}": (
            Case(named(layout), "bs", {"poet.compute": compute, "parallel.recompute": mode}),
            "recompute",
        )
        for layout, compute, mode in itertools.product(RECOMPUTE_LAYOUTS, COMPUTE, RECOMPUTE)
    }


CASES = {**built_cases(), **recompute_cases()}


def built(case: Case, data: Path) -> dict:
    """Hashes of all initial weights by every scheme, parameter counts, flops of a step over all ranks."""
    run = case.run(data)
    with parallel_context(run.parallel, run.train.seed) as context:
        engine = build_engine(run, context)
        counts = count_parameters(engine.chunks, parallel_state.get_model_parallel_group())
        flops = mean_step_flops(engine) * context.world_size
        hashes = {}
        for init in INITS:
            model = dataclasses.replace(run.model, init=init)
            for chunk in engine.chunks:
                initialize(chunk, model, run.train.seed)
            hashes[init] = {name: _hash(tensor) for name, tensor in sorted(whole_model(engine).items())}
    return {"hashes": hashes, "total": counts[0], "trainable": counts[1], "flops": flops}


def whole_model(engine: Engine) -> dict[str, torch.Tensor]:
    """Every canonical tensor of the model, put together from the parts of all ranks, which must agree where they overlap."""
    mine = [
        (slot.name, slot.shape, slot.part, slot.read().clone())
        for chunk in engine.chunks
        for slot in canonical_slots(chunk, engine.run.model)
    ]
    everyone: list[list] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape, part, value in itertools.chain.from_iterable(everyone):
        tensor = tensors.setdefault(name, torch.full(shape, torch.nan))
        known = tensor[part]
        assert known.isnan().all() or torch.equal(known, value), f"{name} differs between ranks"
        tensor[part] = value
    assert not any(tensor.isnan().any() for tensor in tensors.values()), "a part of a tensor is on no rank"
    return tensors


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def recompute(case: Case, data: Path) -> dict:
    """Losses, norms and hashes of this rank's gradients over three steps, and how often an increment was computed."""
    run = case.run(data)
    calls = 0
    compute = OrthogonalMap.increment

    def counted(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return compute(*args, **kwargs)

    found: dict[str, list] = {"losses": [], "grad_norms": [], "gradients": [], "increments": []}
    with parallel_context(run.parallel, run.train.seed) as context, mock.patch.object(OrthogonalMap, "increment", counted):
        engine = build_engine(run, context)
        batches = train_batches(run, context)
        for _ in range(3):
            calls = 0
            result = train_step(engine, batches.micro_batches(), run.optim.clip_grad)
            batches.advance()
            gradients = {name: _hash(parameter.main_grad) for name, parameter in engine.trainable().items()}
            for key, value in zip(found, (result.loss, result.grad_norm, _all_ranks(gradients), _all_ranks(calls)), strict=True):
                found[key].append(value)
        rotations = [module for chunk in engine.chunks for module in chunk.modules() if isinstance(module, Rotation)]
        found["runs"] = _all_ranks(sum(len(rotation.layout.runs) for rotation in rotations))
    return found


def _all_ranks(value: object) -> list:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def run_cases(data: Path, output: Path) -> None:
    """Run this world's cases on this rank."""
    for name, (case, kind) in CASES.items():
        if case.layout.ranks != dist_size() or why_not(case.layout):
            continue
        result = {"built": built, "recompute": recompute}[kind](case, data)
        if os.environ["RANK"] == "0":
            with output.open("a") as file:
                file.write(json.dumps({"case": name, **result}) + "\n")


def dist_size() -> int:
    """Ranks of this world."""
    return int(os.environ["WORLD_SIZE"])


def main(output: Path) -> None:
    """One world after another."""
    data = prepare_data(output.parent)
    for ranks in sorted({case.layout.ranks for case, _ in CASES.values()}):
        try:
            run_world(ranks, functools.partial(run_cases, data, output), TIMEOUT)
        except WorldFailed as error:
            print(error, file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
