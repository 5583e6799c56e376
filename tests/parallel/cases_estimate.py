"""Cases of test_estimate_matches_measured.py; run by torchrun: what a step of each layout really allocates and communicates."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from poet_megatron.config.load import load_config
from poet_megatron.config.run import RunConfig
from poet_megatron.engine.base import Engine
from poet_megatron.engine.build import build_engine
from poet_megatron.engine.deepspeed import DeepSpeedEngine
from poet_megatron.estimate.traffic import count_calls
from poet_megatron.layers.factor_cache import cached_factors, factor_caches
from poet_megatron.layers.rotation import Rotation
from poet_megatron.optim.merge import merge_model, rotated_matrices
from poet_megatron.optim.state import MOMENTS
from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.context import ParallelContext, parallel_context
from poet_megatron.train.signals import StopFlag
from poet_megatron.train.step import train_step

RANKS, DEEPSPEED_RANKS = 4, 2
BASE = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.num_attention_heads": 8,
    "model.num_query_groups": 8,
    "model.seq_length": 32,
    "model.vocab_size": 320,
    "poet.block_size": 16,
    "poet.compute": "input",
    "poet.shard_groups": 4,
    "optim.clip_grad": 1.0,
    "train.micro_batch_size": 2,
    "train.global_batch_size": 8,
    "train.precision": "fp32",
}
TP2, TP4 = {"parallel.tensor_parallel": 2}, {"parallel.tensor_parallel": 4}
PP2 = {"parallel.pipeline_parallel": 2, "model.num_layers": 4}
PP4 = {"parallel.pipeline_parallel": 4, "model.num_layers": 4, "train.global_batch_size": 12}
SP = {"parallel.sequence_parallel": "true"}
BF16, SHARDED = {"train.precision": "bf16"}, {"parallel.distributed_optimizer": "true"}
INSIDE, OUTSIDE = {"poet.tp_placement": "inside"}, {"poet.tp_placement": "outside"}
SHARED, WEIGHT = {"poet.share_input_rotation": "true"}, {"poet.compute": "weight"}
DENSE, OVERLAP = {"method": "adamw"}, {"parallel.overlap_grad_reduce": "true"}
ZERO_1 = {"engine": "deepspeed", "deepspeed.zero_stage": 1, "train.global_batch_size": 12}  # 3 micro-batches on each of 2 ranks
ZERO_2 = {**ZERO_1, "deepspeed.zero_stage": 2}
FULL, SELECTIVE = {"parallel.recompute": "full"}, {"parallel.recompute": "selective"}
CASES: dict[str, dict[str, Any]] = {
    "data parallel": BF16,
    "sharded optimizer": SHARDED,
    "sharded optimizer, bf16, overlap": SHARDED | BF16 | OVERLAP,
    "outside": TP2 | OUTSIDE,
    "inside": TP2 | INSIDE,
    "outside, sequence parallel": TP2 | SP | OUTSIDE,
    "inside, sequence parallel": TP4 | SP | INSIDE,
    "shared, sequence parallel, bf16": TP4 | SP | SHARED | BF16,
    "effective weights": TP2 | WEIGHT | {"optim.clip_grad": 0.0},
    "effective weights, sequence parallel": TP2 | SP | WEIGHT,
    "dense": TP2 | DENSE,
    "dense, sequence parallel, bf16, sharded": TP2 | SP | DENSE | BF16 | SHARDED,
    "full recomputation, sequence parallel": TP2 | SP | OUTSIDE | FULL,
    "selective recomputation": TP2 | OUTSIDE | SELECTIVE,
    "pipeline": PP2,
    "pipeline of 4": PP4 | BF16,
    "pipeline, few micro-batches": PP4 | {"train.global_batch_size": 4},
    "pipeline and tensor, sequence parallel": PP2 | TP2 | SP | OUTSIDE,
    "interleaved": PP2 | {"parallel.virtual_stages": 2, "train.global_batch_size": 24},
    "interleaved and tensor, full recomputation": PP2 | TP2 | FULL | {"parallel.virtual_stages": 2},
    "fully stochastic, one side": TP2 | {"poet.variant": "fs", "poet.block_size": 0.5, "poet.block_size_out": 0},
    "ZeRO-1": ZERO_1,
    "ZeRO-1, bf16": ZERO_1 | BF16,
    "ZeRO-2": ZERO_2,
    "ZeRO-2, bf16": ZERO_2 | BF16,
    "ZeRO-2, one micro-batch": ZERO_2 | {"train.global_batch_size": 4},
    "ZeRO-2, dense, bf16": ZERO_2 | BF16 | DENSE,
}
QUICK = [
    "sharded optimizer, bf16, overlap",
    "outside",
    "inside, sequence parallel",
    "shared, sequence parallel, bf16",
    "effective weights",
    "dense, sequence parallel, bf16, sharded",
    "pipeline and tensor, sequence parallel",
    "interleaved and tensor, full recomputation",
    *(name for name in CASES if name.startswith("ZeRO")),
]


def run_of(name: str) -> RunConfig:
    """The run of a case."""
    return load_config(None, [f"--{key}={value}" for key, value in {**BASE, **CASES[name]}.items()])


def ranks_of(name: str) -> int:
    """Processes of a case."""
    return DEEPSPEED_RANKS if CASES[name].get("engine") == "deepspeed" else RANKS


def stored_bytes(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the distinct storages of tensors."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Every tensor in an object's attributes, and in lists below them."""
    if isinstance(value, Tensor):
        yield value
    for member in value if isinstance(value, list) else vars(value).values() if hasattr(value, "__dict__") else ():
        yield from tensors_in(member)


class FactorBytes:
    """Bytes of what a step computes once, with permutations: looked at after the last micro-batch, before it is dropped."""

    def __init__(self) -> None:
        self.found = 0

    @contextmanager
    def cached_factors(self, chunks: list, micro_batches: int) -> Iterator[None]:
        with cached_factors(chunks, micro_batches):
            yield
            kept = [tensor for chunk in chunks for cache in factor_caches(chunk) for tensor in tensors_in(cache)]
            rotations = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Rotation)]
            permutations = [buffer for rotation in rotations if rotation.skew is not None for buffer in (rotation.perm, rotation.inverse)]
            self.found = stored_bytes([*kept, *permutations])


class ZeroGradients:
    """The most bytes of gradients and buckets that DeepSpeed has at the start of a reduction, or at the end of one."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.peak = optimizer, 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        def looked_at(function: Any) -> Any:
            def call(*args: Any, **others: Any) -> Any:
                self.peak = max(self.peak, stored_bytes(self._held()))
                return function(*args, **others)

            return call

        names = ("reduce_gradients", "_release_ipg_buffers")
        with mock.patch.multiple(self.optimizer, **{name: looked_at(getattr(self.optimizer, name)) for name in names}):
            yield

    def _held(self) -> Iterator[Tensor | None]:
        for parameter in (parameter for group in self.optimizer.bit16_groups for parameter in group):
            yield parameter.grad
            yield parameter.grad_accum
        for bucket in self.optimizer.ipg_buckets.values():
            yield from bucket.buffer
        for held in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
            for gradients in held.values():
                yield from gradients or ()
        yield getattr(self.optimizer, "grads_in_partition", None)


class SavedBytes:
    """Bytes of distinct storages that autograd keeps for backward, and their peak; parameters, buffers and inputs do not count."""

    def __init__(self, known: Iterator[Tensor]) -> None:
        self.live = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key)
        return tensor

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def counted_saves(engine: Engine, batch: dict[str, Tensor]) -> Iterator[SavedBytes]:
    saved = SavedBytes(t for chunk in engine.chunks for t in (*chunk.parameters(), *torch.nn.Module.buffers(chunk), *batch.values()))
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        yield saved


def memory_of(engine: Any) -> dict[str, int]:
    """Bytes on this rank after a step, by part of the estimate."""
    parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
    masters = [matrix.master for matrix in rotated_matrices(engine.chunks) if matrix.master is not None]
    frozen = {
        "frozen W0": sum(p.nbytes for p in parameters if not p.requires_grad),
        "fp32 master of W0": sum(master.nbytes for master in masters),
    }
    return frozen | (zero_memory(engine) if engine.run.engine == "deepspeed" else megatron_memory(engine, parameters))


def zero_memory(engine: Any) -> dict[str, int]:
    """What DeepSpeed keeps between steps."""
    optimizer = engine.zero.optimizer
    moments = [slots[moment] for slots in engine.adam.state.values() for moment in MOMENTS]
    return {
        "trainable weights": stored_bytes(optimizer.bit16_groups_flat),
        "optimizer": stored_bytes([*moments, *optimizer.single_partition_of_fp32_groups]),
    }


def megatron_memory(engine: Any, parameters: list[Tensor]) -> dict[str, int]:
    """What Megatron keeps between steps."""
    buffers = [buffer for chunk in engine.wrapped for buffer in chunk.buffers]
    state: dict[int, Tensor] = {}
    for inner in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for param, slots in inner.optimizer.state.items():
            tensors = [slots["exp_avg"], slots["exp_avg_sq"], *([param] if engine.run.train.precision == "bf16" else [])]
            state |= {tensor.untyped_storage()._cdata: tensor for tensor in tensors}
    return {
        "trainable weights": sum(p.nbytes for p in parameters if p.requires_grad),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": sum(tensor.nbytes for tensor in state.values()),
    }


def measure(run: RunConfig, context: ParallelContext) -> dict[str, Any]:
    """One step and one merge on this rank."""
    engine = build_engine(run, context)
    shape = (run.train.micro_batch_size, run.model.seq_length)
    words = torch.randint(run.model.vocab_size, shape)
    positions = torch.arange(shape[1]).expand(shape).contiguous()
    batch = {"tokens": words, "labels": words.clone(), "position_ids": positions, "loss_mask": torch.ones(shape)}
    factors, gradients = FactorBytes(), ZeroGradients(engine.zero.optimizer) if isinstance(engine, DeepSpeedEngine) else None
    with CollectiveCounter() as step, counted_saves(engine, batch) as saved, gradients.watched() if gradients else nullcontext():
        with mock.patch(f"{type(engine).__module__}.cached_factors", factors.cached_factors):
            train_step(engine, [batch] * engine.micro_batches, run.optim.clip_grad)
        StopFlag().agreed(context.device)
    memory = memory_of(engine) | {"activations": saved.peak, "factors": factors.found}
    if gradients:
        memory["gradients"] = gradients.peak
    with CollectiveCounter() as merge:
        merge_model(engine.chunks, engine.states(), run.poet, parallel_state.get_data_parallel_group())
    return {
        "rank": context.rank,
        "stage": parallel_state.get_pipeline_model_parallel_rank(),
        "step": [[*key, times] for key, times in count_calls(step.records).items()],
        "merge": [[*key, times] for key, times in count_calls(merge.records).items()],
        "memory": memory,
    }


def main(output: Path, names: list[str]) -> None:
    results: dict[str, list] = {}
    for name in names:
        with parallel_context(run_of(name).parallel, 0) as context:
            gathered: list[Any] = [None] * context.world_size
            dist.all_gather_object(gathered, measure(run_of(name), context))
            results[name] = gathered
            if context.is_main:
                output.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
