"""Megatron's AdamW and learning-rate schedule in two parameter groups: the skews of POET, and everything else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from poet_megatron.optim.config import OptimConfig

SKEW_PATTERN = "*.skew"


def build_optimizer(chunks: Sequence[DistributedDataParallel], config: OptimConfig, bf16: bool, distributed: bool) -> MegatronOptimizer:
    """AdamW over the trainable parameters of wrapped model chunks, with fp32 masters when `bf16`, sharded over data-parallel ranks when
    `distributed`.

    Skews are a parameter group of their own, so that their learning rate, weight decay and Adam step are their own; norms and biases
    (one-dimensional parameters) are not decayed.
    """
    optimizer_config = OptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        clip_grad=config.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=distributed,
    )
    skews: ParamGroupOverride = {
        "max_lr": config.poet_lr,
        "min_lr": config.poet_lr * config.min_lr_ratio,
        "start_wd": config.poet_weight_decay,
        "end_wd": config.poet_weight_decay,
    }
    overrides = {
        ParamKey(name=SKEW_PATTERN): skews,
        ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.ndim == 1)): {"wd_mult": 0.0},
    }
    return get_megatron_optimizer(optimizer_config, list(chunks), config_overrides=overrides)


def build_scheduler(optimizer: MegatronOptimizer, config: OptimConfig, steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine decay to min_lr_ratio at `steps` (or constant), for both parameter groups."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.lr * config.min_lr_ratio,
        lr_warmup_steps=config.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def learning_rates(param_groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Current learning rates of an optimizer's groups: {"base": ..., "poet": ...} (poet only if there are skews)."""
    return {"poet" if "start_wd" in group else "base": float(group["lr"]) for group in param_groups if group["params"]}
