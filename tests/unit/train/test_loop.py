"""Decisions of the training loop that every rank must take alike, and when it looks at the stop flag; nothing is trained."""

from __future__ import annotations

import signal
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from poet_megatron.engine.state import TrainState
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import parallel_context
from poet_megatron.train import loop
from poet_megatron.train.signals import StopFlag
from poet_megatron.train.step import StepResult


def make_loop(run: Any, chunks: list | None = None) -> loop.Loop:
    engine = SimpleNamespace(run=run, chunks=chunks or [], context=SimpleNamespace(device=torch.device("cpu"), world_size=1))
    others = [mock.MagicMock() for _ in range(4)]
    return loop.Loop(engine, *others, StopFlag())  # type: ignore[arg-type]


@pytest.mark.parametrize(("here", "elsewhere", "merges"), [(0.0, True, 1), (0.9, False, 1), (0.0, False, 0)])
def test_an_early_merge_is_decided_by_all_replicas_together(tiny_run, monkeypatch, here: float, elsewhere: bool, merges: int):
    """One replica may see a skew just above the threshold and another one just below: they merge all or none."""
    run = tiny_run("run", {"poet.merge_interval": "0", "poet.merge_at_skew_norm": "0.5"})
    subject = make_loop(run)
    all_reduce = dist.all_reduce

    def with_another_replica(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, **others: Any) -> Any:
        if op == dist.ReduceOp.MAX and (group is None or group == dist.group.WORLD):
            tensor.clamp_(min=int(elsewhere))
        return all_reduce(tensor, op=op, group=group, **others)

    monkeypatch.setattr(loop, "rotation_health", lambda chunks, group: (0.0, here))
    monkeypatch.setattr(dist, "all_reduce", with_another_replica)
    with parallel_context(ParallelConfig(), 0), mock.patch.object(loop.Loop, "_merge") as merge:
        subject._merge_if_due(TrainState(step=loop.SKEW_CHECK_INTERVAL))
    assert merge.call_count == merges


@pytest.mark.parametrize(("interval", "steps", "saves"), [(2, 4, [2]), (0, 4, [4])])
def test_a_signal_during_a_save_stops_the_run_there(tiny_run, monkeypatch, interval: int, steps: int, saves: list[int]):
    """What was just saved need not be saved again a step later."""
    run = tiny_run("run", {"method": "adamw", "checkpoint.interval": str(interval), "train.steps": str(steps)})
    subject, saved = make_loop(run), []

    def save(store: Any, engine: Any, state: TrainState, data: dict) -> str:
        saved.append(state.step)
        subject.stop.signal_number = signal.SIGTERM
        return "a checkpoint"

    monkeypatch.setattr(loop, "save_checkpoint", save)
    monkeypatch.setattr(loop, "train_step", lambda *args: StepResult(1.0, 1, 1.0))
    with parallel_context(ParallelConfig(), 0):
        assert subject.run(TrainState()) == signal.SIGTERM
    assert saved == saves
