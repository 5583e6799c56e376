"""DeepSpeed's ZeRO-1 and ZeRO-2 as a library: starting it in our process groups, and views of its flat partitions.

What depends on DeepSpeed's internals is here: of every parameter group its optimizer keeps the trainable parameters one after the other in
a flat tensor, and every data-parallel rank updates one equal part of it, in fp32. `_hp_mapping` of a parameter says which of its elements
lie in this rank's part, and where.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from poet_megatron.config.run import RunConfig
from poet_megatron.errors import UserError
from poet_megatron.optim.state import MOMENTS, AdamState
from poet_megatron.parallel.context import ParallelContext

FIX = "pip install '.[deepspeed]' (docs/dependencies.md), or set engine to megatron"
OLDEST, BELOW = (0, 19, 8), (0, 20)  # gradient_allreduce_op is ignored by releases that do not know it, and gradients would be averaged
BUCKET = 50_000_000  # elements that are reduced at once, at most; DeepSpeed allocates a buffer of this size in every step


class DataParallelGroups:
    """Megatron's process groups, under the names by which DeepSpeed asks a "model parallel unit"."""

    get_data_parallel_group = staticmethod(parallel_state.get_data_parallel_group)
    get_data_parallel_rank = staticmethod(parallel_state.get_data_parallel_rank)
    get_data_parallel_world_size = staticmethod(parallel_state.get_data_parallel_world_size)
    get_model_parallel_group = staticmethod(parallel_state.get_model_parallel_group)
    get_model_parallel_rank = get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)


def import_deepspeed(context: ParallelContext) -> Any:
    """The package, told about our device and process groups, so that it compiles nothing and looks for no launcher.

    Raises:
        UserError: it is not installed, or in a release that this engine does not know.
    """
    try:
        installed = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"engine is deepspeed, and DeepSpeed is not installed: {FIX}") from None
    if not OLDEST <= tuple(int(number) for number in re.findall(r"\d+", installed)[:3]) < BELOW:
        raise UserError(f"engine is deepspeed, and DeepSpeed {installed} is installed; it must be 0.19.8 or a later 0.19: {FIX}")
    os.environ.setdefault("DS_ACCELERATOR", context.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING if context.is_main else logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else two minutes of g++ at the first start on a CPU
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    return deepspeed


def start_zero(deepspeed: Any, model: nn.Module, optimizer: torch.optim.Optimizer, run: RunConfig, micro_batches: int) -> Any:
    """DeepSpeed's engine for `model`, whose trainable parameters are those of `optimizer`; from here on it updates flat partitions.

    DeepSpeed's own bf16 mode stays off: the model is in bf16 already, and the mode would take another optimizer for stage 1. Gradients are
    accumulated and reduced in fp32 either way.
    """
    elements = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
    settings = {
        "train_micro_batch_size_per_gpu": run.train.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_allreduce_op": "sum",
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": run.deepspeed.zero_stage,
            "overlap_comm": run.parallel.overlap_grad_reduce,
            "reduce_bucket_size": min(BUCKET, elements),
        },
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=DataParallelGroups, dist_init_required=False)
    for group in optimizer.param_groups:  # before the first step, so that every view of the state is of what the optimizer uses
        (flat,) = group["params"]
        optimizer.state[flat].update({moment: torch.zeros_like(flat) for moment in MOMENTS})
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.state[flat]["step"] = torch.tensor(0.0)
    return engine


def zero_states(adam: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> dict[str, AdamState]:
    """Adam's state of the parts of named parameters that this rank updates, as views into its flat partitions."""
    states = {}
    for name, parameter in parameters.items():
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            continue
        group = adam.param_groups[mapping.param_group_index]
        (flat,) = group["params"]
        here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
        slots = {key: value.narrow(0, here.start, here.numel) if key in MOMENTS else value for key, value in adam.state[flat].items()}
        master = flat.detach().narrow(0, here.start, here.numel)
        states[name] = AdamState(master, slots, group, there.start, there.start + there.numel, not isinstance(adam, torch.optim.AdamW))
    return states


def zero_gradients(zero: Any) -> Iterator[Tensor]:
    """The reduced gradients of this rank's flat partitions."""
    for gradients in zero.optimizer.averaged_gradients.values():
        flat = getattr(gradients, "flat_partition", None)
        yield from gradients if flat is None else [flat]


def named_zero_gradients(zero: Any, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, Tensor]]:
    """The same for every named parameter of which this rank updates a part."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for index, members in enumerate(zero.optimizer.params_in_partition):
        for parameter, gradient in zip(members, zero.optimizer.averaged_gradients[index], strict=False):  # padding follows
            yield names[id(parameter)], gradient


def drop_gradients(zero: Any) -> None:
    """Forget every gradient, also those of a step that was not taken."""
    zero.optimizer.zero_grad()
    for held in (zero.optimizer.averaged_gradients, zero.optimizer.all_grad_tensors):
        for index in held:
            held[index] = None
