"""A run's tensors as megatron-core sharded tensors: canonical weights, skews, base parameters, fp32 masters and moments.

Weights are in feature order and, where there is an fp32 master, in fp32; optimizer state is named after the parameter it belongs to, so the
format says nothing about the engine that wrote it. Adam's steps, one per parameter group, are plain numbers beside the tensors.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from torch import Tensor, nn

from poet_megatron.engine.build import Engine
from poet_megatron.optim.state import MOMENTS, AdamState, state_of

METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def sharded_state(engine: Engine) -> dict[str, Any]:
    """Every tensor of the run, for dist_checkpointing.save or as the request of dist_checkpointing.load."""
    model = _model_state(engine)
    by_tensor = {id(entry.data): entry for entry in model.values()}
    optimizer: dict[str, dict[str, Any]] = {}
    for name, (parameter, state) in trainable_states(engine).items():
        state.materialize()
        entry = by_tensor[id(parameter)]
        tensors = {moment: state.slots[moment] for moment in MOMENTS}
        if state.param is not parameter:
            tensors["master"] = state.param
        optimizer[name] = {key: make_sharded_optimizer_tensor(entry, tensor, f"optimizer.{key}") for key, tensor in tensors.items()}
    return {"model": model, "optimizer": optimizer}


def load_tensors(engine: Engine, loaded: dict[str, Any]) -> None:
    """Copy what dist_checkpointing.load returned into the model and the optimizer; permutations must already be those of the checkpoint."""
    missing, unexpected = engine.model.load_state_dict(loaded["model"], strict=False)
    missing = [name for name in missing if not name.endswith("_extra_state")]
    if missing or unexpected:
        raise RuntimeError(f"the checkpoint and the model differ: missing {missing}, unexpected {unexpected}")
    for name, (parameter, state) in trainable_states(engine).items():
        tensors: dict[str, Tensor] = loaded["optimizer"][name]
        for moment in MOMENTS:
            state.slots[moment].copy_(tensors[moment])
        if state.param is not parameter:
            state.param.data.copy_(tensors["master"])


def adam_steps(engine: Engine) -> dict[str, int]:
    """Adam's step of each parameter group, {"base": ..., "poet": ...}."""
    return {_group(name): state.step for name, (_, state) in trainable_states(engine).items()}


def set_adam_steps(engine: Engine, steps: dict[str, int]) -> None:
    """Restore what `adam_steps` returned."""
    for name, (_, state) in trainable_states(engine).items():
        state.materialize()
        state.set_step(steps[_group(name)])


def trainable_states(engine: Engine) -> dict[str, tuple[nn.Parameter, AdamState]]:
    """Trainable parameters of this rank's model with their optimizer state, by parameter name."""
    parameters = {name: parameter for name, parameter in engine.model.named_parameters() if parameter.requires_grad}
    states = state_of(engine.optimizer, parameters)
    return {name: (parameters[name], states[name]) for name in parameters}


def _group(name: str) -> str:
    return "poet" if name.endswith(".skew") else "base"


def _model_state(engine: Engine) -> dict[str, Any]:
    metadata = {**METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state = engine.model.sharded_state_dict(metadata=metadata)
    return {name: entry for name, entry in state.items() if not name.endswith("_extra_state")}
