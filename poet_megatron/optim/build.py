"""AdamW and Megatron's learning-rate schedule, with the skews of POET in a parameter group of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride
from torch import nn

from poet_megatron.optim.config import OptimConfig
from poet_megatron.optim.fused import adamw, chosen_adam, fused_kernels

SKEW_SUFFIX = ".skew"


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
    overrides = {
        ParamKey(name=f"*{SKEW_SUFFIX}"): _skew_settings(config),
        ParamKey(predicate=ParamPredicate(name="one_dimensional", fn=lambda parameter: parameter.ndim == 1)): {"wd_mult": 0.0},
    }
    device = next(chunks[0].parameters()).device
    with chosen_adam(fused_kernels(device.type)):
        return get_megatron_optimizer(optimizer_config, list(chunks), config_overrides=overrides)


def build_plain_optimizer(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over named trainable parameters in the groups that build_optimizer makes, for an engine that shards it itself."""
    base = {"max_lr": config.lr, "min_lr": config.lr * config.min_lr_ratio, "wd_mult": 1.0}
    groups: list[dict[str, Any]] = [base, {**base, **_skew_settings(config)}, {**base, "wd_mult": 0.0}]
    present = [{**group, "params": params} for group, params in zip(groups, plain_groups(named), strict=True) if params]
    device = present[0]["params"][0].device
    betas = (config.beta1, config.beta2)
    return adamw(present, fused_kernels(device.type), lr=config.lr, betas=betas, eps=config.eps, weight_decay=config.weight_decay)


def plain_groups(named: Iterable[tuple[str, nn.Parameter]]) -> list[list[nn.Parameter]]:
    """Named trainable parameters by group: matrices and embeddings, skews, one-dimensional ones."""
    members: list[list[nn.Parameter]] = [[], [], []]
    for name, parameter in named:
        members[1 if name.endswith(SKEW_SUFFIX) else 2 if parameter.ndim == 1 else 0].append(parameter)
    return members


def _skew_settings(config: OptimConfig) -> ParamGroupOverride:
    """What OptimizerParamScheduler reads from the group of the skews."""
    return {
        "max_lr": config.poet_lr,
        "min_lr": config.poet_lr * config.min_lr_ratio,
        "start_wd": config.poet_weight_decay,
        "end_wd": config.poet_weight_decay,
    }


def build_scheduler(optimizer: MegatronOptimizer | torch.optim.Optimizer, config: OptimConfig, steps: int) -> OptimizerParamScheduler:
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
    """Current learning rates of an optimizer's groups: {"base": ..., "poet": ...} (poet only if there are skews).

    Groups of which this rank's shard has no element count too: every rank has all groups, and the schedule sets the rate of each.
    """
    return {"poet" if "start_wd" in group else "base": float(group["lr"]) for group in param_groups}
