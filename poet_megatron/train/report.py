"""Turns what happened in a log interval into metrics, the console line and the files of the run."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from statistics import median

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from poet_megatron.engine.base import Engine
from poet_megatron.engine.state import TrainState
from poet_megatron.guard.stragglers import OwnTimes
from poet_megatron.model.flops import step_flops
from poet_megatron.monitor.console import format_line
from poet_megatron.monitor.eta import EtaEstimator
from poet_megatron.monitor.metrics import MetricsLogger
from poet_megatron.optim.build import learning_rates
from poet_megatron.optim.merge import rotation_health
from poet_megatron.train.evaluate import EvalResult, perplexity
from poet_megatron.train.step import StepResult

GIB = 2**30
TERA = 1e12
logger = logging.getLogger(__name__)


class Reporter:
    """Console and metrics of one start of a run; silent on ranks other than 0."""

    def __init__(self, engine: Engine, metrics: MetricsLogger, start_step: int) -> None:
        """Collective over the ranks that share a model."""
        self.engine, self.metrics = engine, metrics
        self.eta = EtaEstimator(engine.run.train.steps)
        self.eta.update(start_step, time.monotonic())
        self._flops = mean_step_flops(engine)
        self._losses: list[float] = []
        self._own: dict[str, float] = {}
        self._tokens, self._steps, self._since = 0, 0, time.monotonic()

    def step(self, result: StepResult) -> None:
        """Take note of one step; the loss of a batch that made no update is left out of the mean."""
        if result.updated:
            self._losses.append(result.loss)
        self._tokens += result.tokens
        self._steps += 1

    def own_times(self, found: OwnTimes | None, straggler: str) -> None:
        """Take note of a measurement of the ranks, and name the straggler, if there is one."""
        if found is not None:
            self._own = {"perf/own_seconds_median": median(found.totals), "perf/own_seconds_max": max(found.totals)}
        if straggler:
            self.note(straggler)

    def log(self, state: TrainState, result: StepResult, skipped: int = 0) -> None:
        """Report the interval that ends with `result`; the loss is its mean over the interval.

        Args:
            state: counters of the run.
            result: of the last step.
            skipped: steps of the run that made no update.
        """
        rates = learning_rates(self.engine.param_groups)
        poet_metrics = self._poet_metrics(state, rates)
        if not self.engine.context.is_main:
            self._reset()
            return
        elapsed = max(time.monotonic() - self._since, 1e-9)
        loss = sum(self._losses) / len(self._losses) if self._losses else math.nan
        world = self.engine.context.world_size
        metrics = {
            "step": state.step,
            "train/loss": loss,
            "train/ppl": perplexity(loss),
            "optim/lr": rates["base"],
            "optim/grad_norm": result.grad_norm,
            "perf/tokens_per_s": self._tokens / elapsed,
            "perf/tokens_per_s_per_gpu": self._tokens / elapsed / world,
            "mem/peak_gib": peak_memory() / GIB,
            "data/tokens": state.tokens,
        }
        if (peak := self.engine.run.monitor.peak_tflops) > 0:
            metrics["perf/mfu"] = self._flops * self._steps / elapsed / (peak * TERA)
        if skipped:
            metrics["train/skipped"] = skipped
        metrics |= poet_metrics | self._own
        self.metrics.log(metrics, state.step)
        eta = self.eta.update(state.step, time.monotonic())
        print(format_line(metrics, self.engine.run.train.steps, world, eta), flush=True)
        self._reset()

    def evaluation(self, step: int, result: EvalResult, reference: EvalResult | None = None) -> None:
        """Report an evaluation."""
        if not self.engine.context.is_main:
            return
        metrics = {"eval/loss": result.loss, "eval/ppl": result.ppl, "eval/tokens": float(result.tokens)}
        if reference is not None:
            metrics["eval/ppl_reference_protocol"] = reference.ppl_reference_protocol
        self.metrics.log(metrics, step)
        print(f"step {step}: validation loss {result.loss:.4f}, perplexity {result.ppl:.2f} ({result.tokens:,} tokens)", flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own."""
        if self.engine.context.is_main:
            print(text, flush=True)

    def pause(self) -> None:
        """Leave what follows (an evaluation, a checkpoint) out of the next interval's speed; `resume` ends it."""
        self._paused = time.monotonic()

    def resume(self) -> None:
        """End a pause."""
        self._since += time.monotonic() - self._paused

    def _poet_metrics(self, state: TrainState, rates: dict[str, float]) -> dict[str, float]:
        run = self.engine.run
        if run.method != "poet":
            return {}
        error, norm = rotation_health(self.engine.chunks, parallel_state.get_model_parallel_group())
        metrics = {"optim/poet_lr": rates.get("poet", 0.0), "poet/ortho_error": error, "poet/skew_norm": norm}
        metrics["poet/merge_index"] = state.merge_index
        if interval := run.poet.merge_interval:
            metrics["poet/steps_to_merge"] = interval - state.step % interval
        return metrics

    def _reset(self) -> None:
        self._losses, self._tokens, self._steps, self._since = [], 0, 0, time.monotonic()
        self._own = {}


def mean_step_flops(engine: Engine) -> float:
    """Flops of an optimizer step per rank, the mean over the ranks that share a model: pipeline stages differ. Collective over them."""
    tokens = engine.run.train.global_batch_size * engine.run.model.seq_length // engine.context.data_size
    group = parallel_state.get_model_parallel_group()
    flops = torch.tensor(step_flops(engine.run, engine.chunks, tokens), dtype=torch.float64, device=engine.context.device)
    dist.all_reduce(flops, group=group)
    return flops.item() / group.size()


def peak_memory() -> int:
    """Peak bytes of this process: allocated on its GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return psutil.Process().memory_info().rss
