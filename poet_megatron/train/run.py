"""`poet-megatron pretrain`: sets up a run, trains, and leaves it so that the same command continues it."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from typing import Any

import psutil
import torch.distributed as dist
from megatron.core import parallel_state

from poet_megatron.checkpoint.io import CONFIG_NAME, choose_checkpoint, load_checkpoint, read_common
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.dump import diff_configs, flat_values, to_yaml
from poet_megatron.config.load import load_config
from poet_megatron.config.resume import forbidden_changes
from poet_megatron.config.run import RunConfig
from poet_megatron.data.corpora import Corpus, open_corpora, resolve_data
from poet_megatron.data.eval_data import packed_eval_batches, reference_protocol_batches
from poet_megatron.data.prepared import PreparedData
from poet_megatron.data.train_data import TrainBatches, build_train_sequences, describe
from poet_megatron.engine.base import Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.engine.state import TrainState
from poet_megatron.errors import EXIT_SAVED, UserError
from poet_megatron.guard.losses import LossGuard
from poet_megatron.guard.stragglers import StragglerMeter
from poet_megatron.guard.watchdog import Watchdog
from poet_megatron.model.count import count_parameters
from poet_megatron.monitor.metrics import MetricsLogger, read_metrics
from poet_megatron.monitor.run_dir import BatchJob, RunDirectory
from poet_megatron.optim.fused import fused_kernels
from poet_megatron.parallel.context import ParallelContext, launched_ranks, parallel_context
from poet_megatron.parallel.host_memory import use_huge_pages
from poet_megatron.parallel.layout import check_layout
from poet_megatron.profiling.profiler import StepProfiler
from poet_megatron.train.loop import Evaluator, Loop
from poet_megatron.train.report import Reporter
from poet_megatron.train.signals import reason_of, stop_on_signals

HANG_SHARE = 0.8
"""Of parallel.timeout_minutes, after which collectives fail by themselves: the watchdog is to be first."""
logger = logging.getLogger(__name__)


def pretrain(run: RunConfig, job: BatchJob | None = None) -> int:
    """Train as `run` says, continuing from its run directory's newest intact checkpoint.

    Args:
        run: the settings.
        job: the batch job that this start belongs to, if any.

    Returns:
        0 when the run is complete (or reached train.stop_at_step), EXIT_SAVED (75) when a signal or train.exit_minutes ended it after
        saving. The watchdog ends the process with EXIT_HANG.

    Raises:
        UserError, FaultError: with the status for the shell in `exit_status`; see poet_megatron.errors.
    """
    if not run.train.run_dir:
        raise UserError("train.run_dir is empty: give the run a directory, for example --train.run_dir runs/first")
    run = _resolved(run)
    check_layout(run, launched_ranks())  # before ranks wait for each other
    corpora = open_corpora(run.data, run.model.vocab_size, run.model.seq_length)
    prepared = PreparedData.open(run.data.path, run.model.vocab_size, run.model.seq_length)
    with parallel_context(run.parallel, run.train.seed) as context:
        if context.device.type == "cpu":
            use_huge_pages()
        directory = RunDirectory(run.train.run_dir)
        _on_main(context, directory.acquire)
        try:
            return _train(run, context, directory, prepared, corpora, job)
        finally:
            if context.is_main:
                directory.release()


def _resolved(run: RunConfig) -> RunConfig:
    """Settings as checkpoints keep them: absolute paths, for commands started in another folder."""
    return dataclasses.replace(run, data=resolve_data(run.data))


def _with_shard_groups(run: RunConfig, store: CheckpointStore, resume_step: int | None) -> RunConfig:
    """Settings with a number of shard groups: the checkpoint's where none is given, the tensor-parallel size of a new run."""
    if run.poet.shard_groups:
        return run
    saved = 0 if resume_step is None else load_config(store.path(resume_step) / CONFIG_NAME).poet.shard_groups
    return dataclasses.replace(run, poet=dataclasses.replace(run.poet, shard_groups=saved or run.parallel.tensor_parallel))


def _train(
    run: RunConfig,
    context: ParallelContext,
    directory: RunDirectory,
    prepared: PreparedData,
    corpora: tuple[Corpus, ...],
    job: BatchJob | None,
) -> int:
    store = CheckpointStore(directory.checkpoints_path, run.checkpoint.keep_last)
    resume_step = choose_checkpoint(store, run.checkpoint.resume, context.is_main)
    _on_main(context, lambda: _note_start(directory, job, resume_step or 0, run.guard.max_idle_restarts))
    run = _with_shard_groups(run, store, resume_step)
    common = _checked_common(store, resume_step, run, context.is_main)
    engine = build_engine(run, context)
    data = _train_batches(run, context, corpora)
    state, guard = TrainState(), LossGuard(run.guard)
    if common is not None and resume_step is not None:
        state = load_checkpoint(store.path(resume_step), engine, common)
        data.load_state_dict(common["data"])
        guard.load_state_dict(common.get("guard", {}))
    if context.is_main:
        directory.write_config(to_yaml(run))
        shutil.copyfile(prepared.tokenizer_path, directory.path / prepared.tokenizer_path.name)
    with closing(data), MetricsLogger(directory, run.monitor, context.rank, flat_values(run)) as metrics:
        metrics.rewind(state.step)
        reporter = Reporter(engine, metrics, state.step)
        _announce(run, engine, reporter, state, directory)
        for line in describe(data.dataset, corpora):
            reporter.note(line)
        stopped = _loop(Loop(engine, data, _evaluator(run, engine, prepared), store, reporter, guard=guard), state, directory)
    if stopped:
        reporter.note(f"stopped by {reason_of(stopped)} at step {state.step}; the same command continues from there")
        return EXIT_SAVED
    return 0


def _note_start(directory: RunDirectory, job: BatchJob | None, step: int, most: int) -> None:
    """Write down, before anything can go wrong, that a start continues from `step`; refuse one that is a restart too many."""
    if job is not None:
        directory.check_progress(job, step, most)
    directory.write_run_info(resumed_from=step, job=job)


def _loop(loop: Loop, state: TrainState, directory: RunDirectory) -> int:
    """Run the loop with everything that watches it; what asked it to stop, or 0."""
    engine = loop.engine
    run, context = engine.run, engine.context
    profiler = StepProfiler(run.profile, directory.path, context.rank, context.world_size, context.device, loop.reporter.note)
    seconds = 60 * run.train.exit_minutes - process_age() if run.train.exit_minutes else math.inf
    with stop_on_signals(seconds) as loop.stop, _watchdog(run, context, directory) as watchdog, profiler:
        loop.beat, loop.stragglers, loop.profiler = watchdog.beat, StragglerMeter(engine, run.guard), profiler
        profiler.announce(state.step)
        if state.step < run.train.steps:
            return loop.run(state)
        loop.reporter.note("nothing to do: the run is complete; raise train.steps in a new run to train longer")
        if not _final_evaluation_exists(directory, state.step):
            loop.evaluate_finally(state)
        return 0


def process_age() -> float:
    """Seconds since this process was started."""
    return time.time() - psutil.Process().create_time()


def _watchdog(run: RunConfig, context: ParallelContext, directory: RunDirectory) -> Watchdog:
    """The watchdog of this start, or one that waits for ever. Collective: all ranks report into the same folder."""
    minutes = run.guard.hang_minutes or HANG_SHARE * run.parallel.timeout_minutes
    started = [datetime.now(UTC).strftime("%Y%m%dT%H%M%S")]
    dist.broadcast_object_list(started, src=0)
    folder = directory.path / "hangs" / started[0]
    seconds = 60 * minutes if run.guard.watchdog else math.inf
    return Watchdog(seconds, folder, context.rank, context.world_size, context.nodes[context.rank])


def _train_batches(run: RunConfig, context: ParallelContext, corpora: tuple[Corpus, ...]) -> TrainBatches:
    samples = run.train.steps * run.train.global_batch_size
    dataset = build_train_sequences(
        corpora, run.data.protocol, seq_length=run.model.seq_length, samples=samples, seed=run.train.seed, cache=run.data.cache
    )
    return TrainBatches(
        dataset,
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=context.data_rank,
        dp_size=context.data_size,
        global_batch_size=run.train.global_batch_size,
        device=context.device,
        prefetch=run.data.prefetch,
    )


def _evaluator(run: RunConfig, engine: Engine, prepared: PreparedData) -> Evaluator:
    context = engine.context
    batch_size = run.train.eval_batch_size or run.train.micro_batch_size
    place = (run.model.seq_length, batch_size, context.data_rank, context.data_size, run.train.eval_tokens, context.device)
    packed = packed_eval_batches(prepared.valid_prefix, *place)
    reference = reference_protocol_batches(prepared.valid_prefix, *place)
    return Evaluator(packed, reference)


def _final_evaluation_exists(directory: RunDirectory, step: int) -> bool:
    """Whether metrics.jsonl has the evaluation of `step`; the same answer on every rank."""
    answer = [any(int(entry["step"]) == step and "eval/ppl" in entry for entry in read_metrics(directory.metrics_path))]
    dist.broadcast_object_list(answer, src=0)
    return answer[0]


def _checked_common(store: CheckpointStore, step: int | None, run: RunConfig, is_main: bool) -> dict[str, Any] | None:
    """Plain part of the checkpoint to continue from; UserError if it belongs to another model. Changed settings are named on rank 0."""
    if step is None:
        return None
    path = store.path(step)
    common = read_common(path)
    saved = load_config(path / CONFIG_NAME)
    if fatal := forbidden_changes(saved, run):
        raise UserError(
            f"{path} was written by another model and cannot continue with: {'; '.join(fatal)}. "
            "Undo the change or choose another train.run_dir"
        )
    if is_main and (changes := diff_configs(saved, run)):
        logger.warning("resuming with changed settings: %s", "; ".join(changes))
    return common


def _announce(run: RunConfig, engine: Engine, reporter: Reporter, state: TrainState, directory: RunDirectory) -> None:
    total, trainable = count_parameters(engine.chunks, parallel_state.get_model_parallel_group())
    batch = run.train.global_batch_size * run.model.seq_length
    reporter.note(
        f"{run.method}: {total / 1e6:.2f} M parameters, {trainable / 1e6:.2f} M trainable; {engine.context.world_size} rank(s) on "
        f"{engine.context.device.type}, {run.train.precision}; {batch:,} tokens per step, {run.train.steps} steps, in {directory.path}"
    )
    reporter.note(fused_kernels(engine.context.device.type, run.engine).describe())
    if state.step:
        reporter.note(f"continuing from step {state.step} of {run.train.steps}")


def _on_main(context: ParallelContext, action: Callable[[], None]) -> None:
    """Run `action` on rank 0; a UserError there ends every rank with the same message."""
    message: list[str | None] = [None]
    if context.is_main:
        try:
            action()
        except (UserError, OSError) as error:
            message[0] = str(error)
    dist.broadcast_object_list(message, src=0)
    if message[0]:
        raise UserError(message[0])
