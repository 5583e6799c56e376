"""Runs and checks of test_deepspeed.py; torchrun calls `main` on 2 data-parallel ranks.

RUNS are whole `pretrain` runs, whose metrics and checkpoints the test compares; CHECKS look into an engine.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.engine import zero
from poet_megatron.engine.base import Batch, Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.guard.losses import NonFiniteError
from poet_megatron.optim.merge import merge_model
from poet_megatron.optim.state import MOMENTS, AdamState
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import parallel_context
from poet_megatron.train.run import pretrain
from poet_megatron.train.step import train_step

RANKS = 2
HALF = 15  # steps of a run that is continued
STAGES = {"1": {"deepspeed.zero_stage": "1"}, "2": {"deepspeed.zero_stage": "2"}}
# 4 micro-batches on one rank, 2 on each of two; a merge before and after the checkpoint that runs continue from
COMMON = {
    "model.num_layers": "1",
    "train.global_batch_size": "8",
    "train.steps": "30",
    "poet.merge_interval": "10",
    "monitor.log_interval": "3",
    "train.eval_tokens": "256",
    "checkpoint.interval": "0",
}
SAVED_HALFWAY = {"checkpoint.interval": str(HALF)}
VARIANTS = {
    "bs": SAVED_HALFWAY,
    "fs": {"poet.variant": "fs", "poet.block_size": "0.5"},
    "bf16": {"train.precision": "bf16", **SAVED_HALFWAY},
}
RUNS = ["bs-1", "bs-2", "fs-1", "fs-2", "bf16-1"]
CONTINUED = {"bs-2-again": "bs-2", "bf16-1-again": "bf16-1", "bs-2-from-megatron": "megatron-bs"}


def settings_of(name: str) -> dict[str, str]:
    """Settings of a run on DeepSpeed by its name, such as "bs-2" or "bs-2-again"."""
    variant, stage = name.split("-")[:2]
    return {**COMMON, **VARIANTS[variant], **STAGES[stage], "engine": "deepspeed"}


def copy_first_half(source: Path, target: Path) -> None:
    """A run directory as it was after HALF steps."""
    shutil.copytree(source, target)
    for later in (target / "checkpoints").glob("step-*"):
        if later.name != f"step-{HALF:08d}":
            shutil.rmtree(later)


# -- engines in the small, on made-up batches --


def batches(engine: Engine, step: int) -> list[Batch]:
    """This rank's two micro-batches of two sequences; rank 0 has many more tokens that count than rank 1."""
    generator = torch.Generator().manual_seed(step)
    rows, length = 4 * RANKS, engine.run.model.seq_length
    tokens = torch.randint(0, 300, (rows, length + 1), generator=generator)
    mask = (torch.rand(rows, length, generator=generator) > 0.2).float()
    mask[4:] *= (torch.arange(length) < 5).float()
    positions = torch.arange(length).expand(2, length)
    first = 4 * engine.context.data_rank
    return [
        {
            "tokens": tokens[row : row + 2, :-1],
            "labels": tokens[row : row + 2, 1:],
            "position_ids": positions,
            "loss_mask": mask[row : row + 2],
        }
        for row in (first, first + 2)
    ]


def whole(engine: Engine, name: str, part: Tensor | None) -> Tensor:
    """A tensor of the shape of a parameter, from the parts that the ranks hold of it."""
    total = torch.zeros(engine.trainable()[name].shape)
    state = engine.states().get(name)
    if state is not None and part is not None:
        state.part_of(total).copy_(part.view(state.param.shape))
    dist.all_reduce(total, group=engine.state_group)
    return total


def whole_gradients(engine: Engine) -> dict[str, Tensor]:
    mine = dict(engine.named_gradients())
    return {name: whole(engine, name, mine.get(name)) for name in engine.trainable()}


def close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Sums over ranks and micro-batches differ in their order only: fp32 rounding of sums, or of one update."""
    error = (actual - expected).abs().max().item() / expected.abs().max().clamp_min(1e-12).item()
    assert error < 2e-5, f"{what}: off by {error:.1e}"


def agree(problems: list[str]) -> None:
    """Fail on every rank if there is a problem on one of them: a rank that went on would wait for the others."""
    gathered: list[list[str]] = [[] for _ in range(RANKS)]
    dist.all_gather_object(gathered, problems)
    assert not any(gathered), gathered


def check_gradients(run: RunConfig, megatron: Engine, deepspeed: Engine) -> None:
    """Gradients, their norm, losses and two clipped updates equal Megatron's, also after gradients that were dropped."""
    for step in range(2):
        expected_losses = megatron.accumulate(batches(megatron, step))
        for _ in range(2):  # gradients of a step that was not taken leave nothing behind
            losses = deepspeed.accumulate(batches(deepspeed, step))
        agree(["losses"] if (torch.stack(losses) - torch.stack(expected_losses)).abs().max() > 1e-2 else [])  # sums of up to 300
        expected = {name: parameter.main_grad for name, parameter in megatron.trainable().items()}
        for name, gradient in whole_gradients(deepspeed).items():
            assert expected[name].abs().max() > 0, f"{name}: Megatron has no gradient to speak of"
            close(gradient, expected[name], f"gradient of {name}")
        norms = deepspeed.update(0.1), megatron.update(0.1)
        assert norms[1] > 0.2, "the case must clip"
        close(torch.tensor(norms[0]), torch.tensor(norms[1]), "gradient norm")
        for engine in (megatron, deepspeed):
            engine.scheduler.step(1)
        compare_states(megatron, deepspeed)


def compare_states(megatron: Engine, deepspeed: Engine) -> None:
    expected, states = megatron.states(), deepspeed.states()
    for key in ("step", "lr", "weight_decay"):
        agree([f"{key} of {name}" for name, state in states.items() if number(state, key) != number(expected[name], key)])
    for name, parameter in deepspeed.trainable().items():
        mine = states.get(name)
        for key in MOMENTS:
            close(whole(deepspeed, name, mine and mine.slots[key]), expected[name].slots[key], f"{key} of {name}")
        master = whole(deepspeed, name, mine and mine.param)
        assert torch.equal(master.to(parameter.dtype), parameter), f"{name} is not its master"
        close(master, expected[name].param.detach(), f"master of {name}")


def number(state: AdamState, key: str) -> float:
    return state.step if key == "step" else state.group[key]


def check_frozen(run: RunConfig, megatron: Engine, deepspeed: Engine) -> None:
    """Steps leave frozen weights alone; ZeRO does not know them."""
    (chunk,) = deepspeed.chunks
    frozen = {name: p.clone() for name, p in chunk.named_parameters() if not p.requires_grad}
    assert frozen
    for step in range(2):
        train_step(deepspeed, batches(deepspeed, step), 1.0)
    agree([name for name, parameter in chunk.named_parameters() if name in frozen and not torch.equal(parameter, frozen[name])])
    elements = sum(flat.numel() for group in deepspeed.param_groups for flat in group["params"])
    trainable = sum(parameter.numel() for parameter in deepspeed.trainable().values())
    assert elements * RANKS - trainable < 4 * RANKS * len(deepspeed.param_groups), "beyond padding"


def check_merge(run: RunConfig, megatron: Engine, deepspeed: Engine) -> None:
    """A merge zeroes skews, their masters, moments and step, and leaves every other bit of the optimizer alone."""
    before = {name: copy_of(state) for name, state in deepspeed.states().items()}
    parameters = {name: parameter.clone() for name, parameter in deepspeed.trainable().items()}
    merge_model(deepspeed.chunks, deepspeed.states(), run.poet, parallel_state.get_data_parallel_group())
    agree([name for name, state in deepspeed.states().items() if not merged_well(name, before[name], copy_of(state))])
    agree([name for name, parameter in deepspeed.trainable().items() if not merged_well(name, [parameters[name]], [parameter])])
    update_after_merge(deepspeed)


def copy_of(state: AdamState) -> list[Tensor]:
    return [state.param.clone(), *(state.slots[moment].clone() for moment in MOMENTS), torch.tensor(state.step)]


def merged_well(name: str, before: Sequence[Tensor], after: Sequence[Tensor]) -> bool:
    """Zero now and not before for skews; the same for everything else."""
    if name.endswith(".skew"):
        return all(old.any() and not new.any() for old, new in zip(before, after, strict=True))
    return all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def update_after_merge(engine: Engine) -> None:
    """The next step is a first step for the skews: Adam's bias correction makes it an update of about lr, whatever the gradient."""
    skew_groups = [group for group in engine.param_groups if "start_wd" in group]
    agree([] if len(skew_groups) == 1 else ["groups of skews"])
    rate = skew_groups[0]["lr"]
    train_step(engine, batches(engine, 7), 0.0)
    largest = max(state.param.abs().max().item() for name, state in engine.states().items() if name.endswith(".skew"))
    agree([] if abs(largest / rate - 1) < 0.05 else [f"the first update after a merge is {largest / rate:.3f} x lr"])


def check_not_finite(run: RunConfig, megatron: Engine, deepspeed: Engine) -> None:
    """A gradient that overflows on one rank stops every rank before the update, and the message names the parameter."""
    name = "0.decoder.final_layernorm.weight"
    before = {key: parameter.clone() for key, parameter in deepspeed.trainable().items()}
    if deepspeed.context.rank == 1:
        deepspeed.trainable()[name].register_hook(lambda gradient: gradient * torch.inf)
    try:
        train_step(deepspeed, batches(deepspeed, 0), 1.0)
    except NonFiniteError as error:
        assert name in str(error), str(error)
    else:
        raise AssertionError("the step was taken")
    assert all(torch.equal(parameter, before[key]) for key, parameter in deepspeed.trainable().items())


Check = Callable[[RunConfig, Engine, Engine], None]
CHECKS: dict[str, Check] = {"gradients": check_gradients, "frozen": check_frozen, "merge": check_merge, "not_finite": check_not_finite}


@dataclass(frozen=True)
class Place:
    """What a pair of engines is built with, and the checks that it goes through, in order.

    Attributes:
        settings: those of the run.
        checks: names of CHECKS.
        bucket: elements reduced at once.
    """

    settings: dict[str, str]
    checks: Sequence[str] = ("gradients",)
    bucket: int = zero.BUCKET


def _places() -> Iterator[tuple[str, Place]]:
    for precision in ("fp32", "bf16"):
        for stage, settings in STAGES.items():
            # Adam divides by |g| + eps: with a small eps, an element of the gradient that is next to 0 moves by its rounding error's sign
            settings = {**COMMON, **settings, "train.precision": precision, "optim.eps": "1e-4"}
            yield f"{precision}-{stage}", Place(settings, tuple(CHECKS))
            yield f"{precision}-{stage}-buckets", Place(settings, bucket=2000)  # many, and parameters that do not fit into one
    yield "fp32-2-overlap", Place({**settings, "train.precision": "fp32", "parallel.overlap_grad_reduce": "true"})
    yield "fp32-2-adamw", Place({**settings, "train.precision": "fp32", "method": "adamw"})
    yield "bf16-2-recompute", Place({**settings, "parallel.recompute": "full"})


PLACES = dict(_places())


# -- on the ranks --


def main() -> None:
    """Execute all runs and checks in the folder given, and write {name: traceback or ""} there."""
    folder = Path(sys.argv[1])
    base: dict[str, str] = json.loads((folder / "settings.json").read_text())
    errors: dict[str, str] = {}
    for name in RUNS:
        with recorded(name, errors):
            pretrain(config({**base, **settings_of(name), "train.run_dir": str(folder / name)}))
    for name, source in CONTINUED.items():
        with recorded(name, errors):
            with parallel_context(ParallelConfig(), 0) as context:
                if context.is_main:
                    copy_first_half(folder / source, folder / name)
                dist.barrier()
            pretrain(config({**base, **settings_of(name), "train.run_dir": str(folder / name)}))
    for name, place in PLACES.items():
        check_place(name, place, base, errors)
    (folder / f"errors-{os.environ['RANK']}.json").write_text(json.dumps(errors))


def check_place(name: str, place: Place, base: dict[str, str], errors: dict[str, str]) -> None:
    """Put one pair of engines through the checks of a place."""
    settings = {**base, **place.settings}
    run = config({**settings, "engine": "deepspeed"})
    with parallel_context(run.parallel, run.train.seed) as context, mock.patch.object(zero, "BUCKET", place.bucket):
        megatron, deepspeed = build_engine(config({**settings, "engine": "megatron"}), context), build_engine(run, context)
        for check in place.checks:
            with recorded(f"{check}-{name}", errors):
                CHECKS[check](run, megatron, deepspeed)


def config(settings: dict[str, str]) -> RunConfig:
    return load_config(None, [f"--{key}={value}" for key, value in settings.items()])


@contextmanager
def recorded(name: str, errors: dict[str, str]) -> Iterator[None]:
    """Keep the traceback of a failure and go on."""
    try:
        yield
        errors[name] = ""
    except Exception:
        errors[name] = traceback.format_exc()
