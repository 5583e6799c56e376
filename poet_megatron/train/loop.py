"""The training loop, readable top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from poet_megatron.checkpoint.io import save_checkpoint
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.data.train_data import TrainBatches
from poet_megatron.engine.base import Engine
from poet_megatron.engine.state import TrainState
from poet_megatron.optim.merge import clip_threshold, merge_model, rotation_health
from poet_megatron.parallel.replicas import check_replicas
from poet_megatron.train.evaluate import EvalResult
from poet_megatron.train.report import Reporter
from poet_megatron.train.signals import StopFlag
from poet_megatron.train.step import train_step

SKEW_CHECK_INTERVAL = 10


@dataclass(frozen=True)
class Evaluator:
    """Evaluations on the validation data.

    Attributes:
        packed: token-weighted, over packed sequences.
        reference: by the protocol of published tables, one padded sequence per document.
    """

    packed: Callable[[], EvalResult]
    reference: Callable[[], EvalResult]


@dataclass
class Loop:
    """What one start of a run works with.

    Attributes:
        engine: model, optimizer, schedule.
        data: training micro-batches.
        evaluator: runs evaluations on the validation data.
        store: checkpoints.
        reporter: console and metrics.
        stop: whether a signal asked to stop.
    """

    engine: Engine
    data: TrainBatches
    evaluator: Evaluator
    store: CheckpointStore
    reporter: Reporter
    stop: StopFlag

    def run(self, state: TrainState) -> int:
        """Train from `state` to the last step.

        Returns:
            The number of the signal that stopped the run, or 0. In both cases the state reached is saved; an exception saves nothing.
        """
        run, engine = self.engine.run, self.engine
        last = min(run.train.steps, run.train.stop_at_step or run.train.steps)
        if state.step == 0:
            self._evaluate(state)
        while state.step < last:
            clip = clip_threshold(state.step + 1, state.last_merge, run.optim.clip_grad, run.poet)
            result = train_step(engine, self.data.micro_batches(), clip)
            self.data.advance()
            state.step += 1
            state.tokens += result.tokens
            self.reporter.step(result)
            if state.step % run.monitor.log_interval == 0 or state.step == last:
                self.reporter.log(state, result)
            self._merge_if_due(state)
            if run.train.eval_interval and state.step % run.train.eval_interval == 0 and state.step < run.train.steps:
                self._evaluate(state)
            signal_number = self.stop.agreed(engine.context.device)
            if signal_number or state.step == last or (run.checkpoint.interval and state.step % run.checkpoint.interval == 0):
                self._save(state)
                signal_number = signal_number or self.stop.agreed(engine.context.device)  # one that came while saving: all is saved
            if signal_number:
                return signal_number
        if state.step == run.train.steps:
            self.evaluate_finally(state)
        return 0

    def evaluate_finally(self, state: TrainState) -> None:
        """Evaluate the finished run by both protocols."""
        self.reporter.evaluation(state.step, self.evaluator.packed(), self.evaluator.reference())

    def _merge_if_due(self, state: TrainState) -> None:
        poet = self.engine.run.poet
        if self.engine.run.method != "poet":
            return
        due = poet.merge_interval > 0 and state.step % poet.merge_interval == 0
        if not due and poet.merge_at_skew_norm and state.step % SKEW_CHECK_INTERVAL == 0:
            due = self._skews_too_large()
        if due:
            self._merge(state)

    def _skews_too_large(self) -> bool:
        """Whether the largest |Q|_2 of any replica is above poet.merge_at_skew_norm. Collective over all ranks, which merge all or none."""
        group = parallel_state.get_model_parallel_group()
        norm = rotation_health(self.engine.chunks, group)[1]
        above = torch.tensor([norm > self.engine.run.poet.merge_at_skew_norm], dtype=torch.int32, device=self.engine.context.device)
        dist.all_reduce(above, op=dist.ReduceOp.MAX)
        return bool(above.item())

    def _merge(self, state: TrainState) -> None:
        engine = self.engine
        check = engine.run.parallel.check_replicas
        if check:
            check_replicas(engine.chunks, f"before the merge at step {state.step}")
        merge_model(engine.chunks, engine.states(), engine.run.poet, parallel_state.get_data_parallel_group())
        state.merge_index += 1
        state.last_merge = state.step
        if check:
            check_replicas(engine.chunks, f"after the merge at step {state.step}")

    def _evaluate(self, state: TrainState) -> None:
        self.reporter.pause()
        self.reporter.evaluation(state.step, self.evaluator.packed())
        self.reporter.resume()

    def _save(self, state: TrainState) -> None:
        self.reporter.pause()
        path = save_checkpoint(self.store, self.engine, state, dict(self.data.state_dict()))
        self.reporter.note(f"step {state.step}: saved {path}")
        self.reporter.resume()
