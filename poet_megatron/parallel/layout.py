"""Whether a run fits a number of processes: the divisions that a parallel layout needs, checked before anything is built."""

from __future__ import annotations

from poet_megatron.config.run import RunConfig
from poet_megatron.errors import UserError


def check_layout(run: RunConfig, world_size: int) -> None:
    """Check that the run can be laid out over `world_size` processes.

    Raises:
        UserError: (a ValueError) with the value, what it has to divide or be divided by, and what to set instead.
    """
    parallel = run.parallel
    if world_size < 1:
        raise UserError(f"the world size is {world_size}; at least 1 process is needed")
    model_size = parallel.tensor_parallel * parallel.pipeline_parallel
    if run.engine == "deepspeed" and model_size > 1:
        raise UserError(
            f"engine is deepspeed with parallel.tensor_parallel x parallel.pipeline_parallel = {parallel.tensor_parallel} x "
            f"{parallel.pipeline_parallel}: it is data-parallel only; set both to 1, or engine to megatron"
        )
    if world_size % model_size:
        below = world_size // model_size * model_size
        choice = f"{below} or {below + model_size}" if below else str(model_size)
        raise UserError(
            f"{world_size} processes cannot be split into groups of parallel.tensor_parallel x parallel.pipeline_parallel = "
            f"{parallel.tensor_parallel} x {parallel.pipeline_parallel} = {model_size}: launch {choice}"
        )
    _check_tensor_parallel(run)
    if run.method == "poet":
        _check_shard_groups(run)
    _check_pipeline(run)
    _check_batch(run, world_size // model_size)


def data_parallel_size(run: RunConfig, world_size: int) -> int:
    """Data-parallel replicas among `world_size` processes."""
    return world_size // (run.parallel.tensor_parallel * run.parallel.pipeline_parallel)


def micro_batches(run: RunConfig, world_size: int) -> int:
    """Micro-batches of one rank in one optimizer step."""
    return run.train.global_batch_size // (run.train.micro_batch_size * data_parallel_size(run, world_size))


def _check_tensor_parallel(run: RunConfig) -> None:
    model, size = run.model, run.parallel.tensor_parallel
    split = {
        "model.num_attention_heads": model.num_attention_heads,
        "model.num_query_groups (key/value heads)": model.query_groups,
        "model.ffn_hidden_size": model.ffn_hidden_size,
        f"the padded vocabulary (model.vocab_size {model.vocab_size} rounded up by model.vocab_divisible_by)": model.padded_vocab_size,
    }
    if run.parallel.sequence_parallel:
        split["model.seq_length (split by parallel.sequence_parallel)"] = model.seq_length
    for name, value in split.items():
        if value % size:
            raise UserError(f"parallel.tensor_parallel is {size}, which does not divide {name} = {value}: choose {_divisors(value, size)}")


def _check_shard_groups(run: RunConfig) -> None:
    model, size = run.model, run.parallel.tensor_parallel
    groups = run.poet.shard_groups or size
    if groups % size:
        raise UserError(
            f"parallel.tensor_parallel is {size}, which does not divide poet.shard_groups = {groups}: choose {_divisors(groups, size)}"
        )
    widths = {
        "model.hidden_size": model.hidden_size,
        "the key/value width (key/value heads x head size)": model.query_groups * model.head_size,
        "model.ffn_hidden_size": model.ffn_hidden_size,
    }
    for name, value in widths.items():
        if value % groups:
            raise UserError(f"poet.shard_groups is {groups}, which does not divide {name} = {value}: choose {_divisors(value, groups)}")


def _check_pipeline(run: RunConfig) -> None:
    layers, stages, chunks = run.model.num_layers, run.parallel.pipeline_parallel, run.parallel.virtual_stages
    if layers % (stages * chunks):
        raise UserError(
            f"model.num_layers is {layers}, not a multiple of parallel.pipeline_parallel x parallel.virtual_stages = "
            f"{stages} x {chunks} = {stages * chunks}: choose numbers whose product divides {layers}"
        )


def _check_batch(run: RunConfig, replicas: int) -> None:
    train, stages = run.train, run.parallel.pipeline_parallel
    per_turn = train.micro_batch_size * replicas
    if train.global_batch_size % per_turn:
        above = -(-train.global_batch_size // per_turn) * per_turn
        raise UserError(
            f"train.global_batch_size is {train.global_batch_size}; it must be a multiple of train.micro_batch_size x data-parallel "
            f"ranks = {train.micro_batch_size} x {replicas} = {per_turn}: set it to {above}, or change train.micro_batch_size or "
            "the number of processes"
        )
    batches = train.global_batch_size // per_turn
    if run.parallel.virtual_stages > 1 and batches % stages:
        raise UserError(
            f"there are {batches} micro-batches per rank and step (train.global_batch_size / (train.micro_batch_size x {replicas})); with "
            f"parallel.virtual_stages above 1 they must be a multiple of parallel.pipeline_parallel = {stages}: "
            f"set train.global_batch_size to a multiple of {per_turn * stages}, or parallel.virtual_stages to 1"
        )


def _divisors(value: int, bound: int) -> str:
    """Divisors of `value` around `bound`, to suggest: the largest below it and the smallest above it."""
    divisors = [number for number in range(1, value + 1) if value % number == 0]
    near = [max(number for number in divisors if number < bound)] + [number for number in divisors if number > bound][:1]
    return " or ".join(map(str, near))
