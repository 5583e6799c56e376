"""The parallel layouts whose training is compared, and how a case is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core import parallel_state

from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.data.prepared import PreparedData
from poet_megatron.data.train_data import TrainBatches, build_train_dataset
from poet_megatron.engine.build import build_engine
from poet_megatron.estimate.traffic import group_name
from poet_megatron.optim.merge import merge_model
from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.context import ParallelContext, parallel_context
from poet_megatron.parallel.replicas import check_replicas
from poet_megatron.train.step import train_step

STEPS = 30
MERGES = (10, 20)
BOUND = 1e-5
DATA_PARALLEL_BOUND = 1e-4
ONE_RANK = "1 rank"

MODEL = {
    "model.num_layers": "4",
    "model.hidden_size": "64",
    "model.ffn_hidden_size": "96",
    "model.num_attention_heads": "8",
    "model.num_query_groups": "4",
    "model.seq_length": "32",
    "model.vocab_size": "512",
    "poet.shard_groups": "4",
    "optim.lr": "2e-3",
    "optim.poet_lr": "4e-3",
    "optim.clip_grad": "0.1",
    "optim.eps": "1e-6",  # Adam amplifies rounding of a gradient by up to lr / eps; the rms of the clipped gradients here is 3e-4
    "train.steps": str(STEPS),
    "train.micro_batch_size": "2",
    "train.global_batch_size": "4",
    "train.precision": "fp32",
}
VARIANTS = {
    "bs": {"poet.variant": "bs", "poet.block_size": "16"},  # of shard groups 16, 8 (k, v) and 24 wide: whole, capped and ragged blocks
    "fs": {"poet.variant": "fs", "poet.block_size": "0.5"},
}


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out.

    Attributes:
        name: as in tables.
        ranks: processes.
        settings: what differs from a single rank.
    """

    name: str
    ranks: int
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def data_parallel(self) -> bool:
        """Whether gradients are added up over replicas, in an order of their own."""
        sizes = [int(self.settings.get(f"parallel.{kind}_parallel", "1")) for kind in ("tensor", "pipeline")]
        return self.ranks > sizes[0] * sizes[1]

    @property
    def bound(self) -> float:
        """Largest relative difference to a single rank that a loss may have."""
        return DATA_PARALLEL_BOUND if self.data_parallel else BOUND


def _layout(
    name: str, ranks: int, tensor: int = 1, pipeline: int = 1, sequence: bool = False, micro_batch: int = 2, **settings: str
) -> Layout:
    layout = {"tensor_parallel": str(tensor), "pipeline_parallel": str(pipeline), "sequence_parallel": str(sequence).lower(), **settings}
    parallel = {f"parallel.{key}": value for key, value in layout.items()}
    return Layout(name, ranks, {**parallel, "train.micro_batch_size": str(micro_batch)})


LAYOUTS = [
    Layout(ONE_RANK, 1),
    _layout("TP2", 2, tensor=2),
    _layout("TP2 + SP", 2, tensor=2, sequence=True),
    _layout("TP4 + SP", 4, tensor=4, sequence=True),
    _layout("PP2", 2, pipeline=2),
    _layout("PP2 interleaved", 2, pipeline=2, virtual_stages="2"),
    _layout("DP2", 2),
    _layout("DP2, distributed optimizer", 2, distributed_optimizer="true"),
    _layout("TP2 x DP2", 4, tensor=2),
    _layout("TP2 x PP2 + SP", 4, tensor=2, pipeline=2, sequence=True),
    _layout(
        "PP2 interleaved x DP2, distributed optimizer, overlapped",
        4,
        pipeline=2,
        micro_batch=1,  # interleaving needs a multiple of the number of stages on every replica
        virtual_stages="2",
        distributed_optimizer="true",
        overlap_grad_reduce="true",
    ),
    Layout("DeepSpeed ZeRO-1 DP2", 2, {"engine": "deepspeed", "deepspeed.zero_stage": "1"}),
    Layout("DeepSpeed ZeRO-2 DP2", 2, {"engine": "deepspeed", "deepspeed.zero_stage": "2"}),
]


@dataclass(frozen=True)
class Case:
    """A layout to train in, a variant of POET (or a method), and settings on top."""

    layout: Layout
    variant: str
    settings: Mapping[str, str] = field(default_factory=dict)

    def run(self, data: Path) -> RunConfig:
        """Its RunConfig."""
        settings = {**MODEL, **VARIANTS.get(self.variant, {"method": self.variant}), **self.layout.settings, **self.settings}
        return load_config(None, [f"--{key}={value}" for key, value in {**settings, "data.path": str(data)}.items()])


@dataclass
class Trained:
    """What the main rank saw; the same on every rank but for the collectives.

    Attributes:
        losses: of every step.
        grad_norms: of every step, before clipping.
        collectives: of the first step, {"kind over group": (calls, bytes)}.
    """

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    collectives: dict[str, tuple[int, int]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


def train(run: RunConfig, steps: int, merges: tuple[int, ...] = MERGES) -> Trained:
    """Train on this rank, with clipping to optim.clip_grad, as train.loop does. Collective over the world."""
    result = Trained()
    with parallel_context(run.parallel, run.train.seed) as context:
        engine = build_engine(run, context)
        data = train_batches(run, context)
        for step in range(1, steps + 1):
            with CollectiveCounter() if step == 1 else nullcontext() as counter:
                outcome = train_step(engine, data.micro_batches(), run.optim.clip_grad)
            data.advance()
            result.losses.append(outcome.loss)
            result.grad_norms.append(outcome.grad_norm)
            if counter is not None:
                result.collectives = collectives(counter)
            if step in merges and run.method == "poet":
                check_replicas(engine.chunks, f"before the merge at step {step}")
                merge_model(engine.chunks, engine.states(), run.poet, parallel_state.get_data_parallel_group())
                check_replicas(engine.chunks, f"after the merge at step {step}")
    return result


def collectives(counter: CollectiveCounter) -> dict[str, tuple[int, int]]:
    """{"kind over group": (calls, bytes)} of recorded collectives, without those of a rank with itself."""
    totals: dict[str, tuple[int, int]] = {}
    for record in counter.records:
        if len(record.ranks) > 1:
            name = f"{record.kind} over {group_name(record.ranks)}"
            calls, size = totals.get(name, (0, 0))
            totals[name] = (calls + 1, size + record.bytes)
    return dict(sorted(totals.items()))


def train_batches(run: RunConfig, context: ParallelContext) -> TrainBatches:
    """The run's training data, as `pretrain` reads it."""
    prepared = PreparedData.open(run.data.path, run.model.vocab_size, run.model.seq_length)
    samples = run.train.steps * run.train.global_batch_size
    dataset = build_train_dataset(
        prepared, seq_length=run.model.seq_length, samples=samples, seed=run.train.seed, cache=prepared.path / "cache"
    )
    return TrainBatches(
        dataset,
        micro_batch_size=run.train.micro_batch_size,
        dp_rank=context.data_rank,
        dp_size=context.data_size,
        global_batch_size=run.train.global_batch_size,
        device=context.device,
    )
