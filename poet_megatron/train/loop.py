"""The training loop, readable top to bottom."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.profiler import record_function

from poet_megatron.checkpoint.io import save_checkpoint
from poet_megatron.checkpoint.room import CheckpointError
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.data.train_data import TrainBatches
from poet_megatron.engine.base import Batch, Engine
from poet_megatron.engine.state import TrainState
from poet_megatron.guard.losses import ROLLBACK, LossGuard
from poet_megatron.guard.stragglers import StragglerMeter
from poet_megatron.optim.merge import clip_threshold, merge_model, rotation_health
from poet_megatron.parallel.replicas import check_replicas
from poet_megatron.profiling.profiler import StepProfiler
from poet_megatron.train.evaluate import evaluate
from poet_megatron.train.report import Reporter
from poet_megatron.train.rollback import roll_back
from poet_megatron.train.signals import StopFlag
from poet_megatron.train.step import StepResult, train_step

SKEW_CHECK_INTERVAL = 10


@dataclass(frozen=True)
class Evaluator:
    """Validation data; every rank has the same number of batches.

    Attributes:
        packed: packed sequences, for the token-weighted loss.
        reference: by the protocol of published tables, one padded sequence per document.
    """

    packed: Iterable[Batch]
    reference: Iterable[Batch]


@dataclass
class Loop:
    """What one start of a run works with.

    Attributes:
        engine: model, optimizer, schedule.
        data: training micro-batches.
        evaluator: validation data.
        store: checkpoints.
        reporter: console and metrics.
        stop: whether something asked to stop.
        guard: judges the loss and the gradients of each step.
        beat: called with the name of each part of the run as it begins.
        stragglers: measures ranks, if there is one.
        profiler: records some steps.
    """

    engine: Engine
    data: TrainBatches
    evaluator: Evaluator
    store: CheckpointStore
    reporter: Reporter
    stop: StopFlag = field(default_factory=StopFlag)
    guard: LossGuard = field(default_factory=LossGuard)
    beat: Callable[[str], None] = lambda name: None
    stragglers: StragglerMeter | None = None
    profiler: StepProfiler = field(default_factory=StepProfiler.off)
    _failed_saves: int = 0
    _compared: int = 0

    def run(self, state: TrainState) -> int:
        """Train from `state` to the last step.

        Returns:
            What asked to stop (StopFlag), or 0. In both cases the state reached is saved; an exception saves nothing.
        """
        run = self.engine.run
        last = min(run.train.steps, run.train.stop_at_step or run.train.steps)
        if state.step == 0:
            self._evaluate(state)
        while state.step < last:
            self.profiler.step_begin(state.step + 1)
            result = self._step(state)
            if state.step % run.monitor.log_interval == 0 or state.step == last:
                self.reporter.log(state, result, self.guard.skipped)
            if result.verdict.reason:
                self._report_and_roll_back(state, result)
            self._merge_if_due(state)
            self._check_replicas_if_due(state)
            self.profiler.step_end(state.step)
            if run.train.eval_interval and state.step % run.train.eval_interval == 0 and state.step < run.train.steps:
                self._evaluate(state)
            stopped = self.stop.agreed(self.engine.context.device)
            if stopped or state.step == last or (run.checkpoint.interval and state.step % run.checkpoint.interval == 0):
                saved = self._save(state, must=bool(stopped) or state.step == last)
                if saved and not stopped:
                    stopped = self.stop.agreed(self.engine.context.device)  # one that came while saving: all is saved
            if stopped:
                return stopped
        if state.step == run.train.steps:
            self.evaluate_finally(state)
        return 0

    def evaluate_finally(self, state: TrainState) -> None:
        """Evaluate the finished run by both protocols."""
        with self._phase(f"the evaluation after step {state.step}"):
            results = [evaluate(self.engine, self._beating(batches)) for batches in (self.evaluator.packed, self.evaluator.reference)]
            self.reporter.evaluation(state.step, *results)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """A part of the run, for the watchdog and the profiler."""
        self.beat(name)
        with record_function(name):
            yield
        self.beat(f"what follows {name}")

    def _beating(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of an evaluation, each of which is progress."""
        for number, batch in enumerate(batches, 1):
            self.beat(f"batch {number} of an evaluation")
            yield batch

    def _step(self, state: TrainState) -> StepResult:
        """Take the next step, with or without an update, and count it."""
        run, number = self.engine.run, state.step + 1
        clip = clip_threshold(number, state.last_merge, run.optim.clip_grad, run.poet)
        meter = self.stragglers if self.stragglers is not None and self.stragglers.due(number) else None
        measure = functools.partial(meter.measure, number) if meter else None
        with self._phase(f"step {number}"):
            beat = functools.partial(self.beat, f"step {number}")
            result = train_step(self.engine, self.data.micro_batches(), clip, self.guard, measure, beat)
        self.data.advance()
        state.step = number
        state.tokens += result.tokens
        self.reporter.step(result)
        if meter:
            self.reporter.own_times(meter.last, meter.report())
        return result

    def _report_and_roll_back(self, state: TrainState, result: StepResult) -> None:
        """Say what the guard noticed about a step, and go back to the last checkpoint if it wants that."""
        reason = f"step {state.step}: {result.verdict.reason}"
        if result.updated:
            self.reporter.note(f"warning: {reason}")
            return
        back = None
        if result.verdict.action == ROLLBACK:
            with self._phase(f"going back after step {state.step}"):
                back = roll_back(self.store, self.engine, state, self.guard)
        if back is None:
            ending = ", as there is no checkpoint to go back to yet" if result.verdict.action == ROLLBACK else ""
            self.reporter.note(f"warning: {reason}; the batch is skipped{ending}")
        else:
            self.reporter.note(
                f"warning: {reason}; back to the weights of step {back}, the batches of steps {back + 1} to {state.step} are passed over"
            )

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
        with self._phase(f"the merge after step {state.step}"):
            self._check_replicas(state, f"before the merge at step {state.step}")
            merge_model(engine.chunks, engine.states(), engine.run.poet, parallel_state.get_data_parallel_group())
            state.merge_index += 1
            state.last_merge = state.step
            self._check_replicas(state, f"after the merge at step {state.step}")

    def _check_replicas(self, state: TrainState, when: str) -> None:
        """Compare replicas, unless the settings say no."""
        if self.engine.run.parallel.check_replicas:
            check_replicas(self.engine.chunks, when, self.engine.replicated_state(), self.engine.context.nodes)
        self._compared = state.step

    def _check_replicas_if_due(self, state: TrainState) -> None:
        interval = self.engine.run.parallel.check_replicas_interval
        if interval and state.step % interval == 0 and state.step != self._compared and self.engine.context.world_size > 1:
            with self._phase(f"the comparison of replicas after step {state.step}"):
                self._check_replicas(state, f"after step {state.step}")

    def _evaluate(self, state: TrainState) -> None:
        self.reporter.pause()
        with self._phase(f"the evaluation after step {state.step}"):
            self.reporter.evaluation(state.step, evaluate(self.engine, self._beating(self.evaluator.packed)))
        self.reporter.resume()

    def _save(self, state: TrainState, must: bool) -> bool:
        """Write a checkpoint of replicas that agree. If it fails and need not be now, training goes on, a few times.

        Returns:
            Whether it was written.

        Raises:
            CheckpointError: it failed for good.
        """
        self.reporter.pause()
        try:
            with self._phase(f"the checkpoint of step {state.step}"):
                if self.engine.context.world_size > 1 and state.step != self._compared:
                    self._check_replicas(state, f"before the checkpoint of step {state.step}")
                parts = {"data": dict(self.data.state_dict()), "guard": self.guard.state_dict()}
                self.reporter.note(f"step {state.step}: saved {save_checkpoint(self.store, self.engine, state, parts)}")
            self._failed_saves = 0
        except CheckpointError as error:
            self._failed_saves += 1
            most = self.engine.run.checkpoint.max_failures
            if must or self._failed_saves >= most:
                raise
            self.reporter.note(f"warning: {error}. Training goes on; failure {self._failed_saves} of checkpoint.max_failures {most}")
        self.reporter.resume()
        return not self._failed_saves
