"""Faults that cases_pretrain.py plants on one rank: FAULTS[name]() is a context manager in which the run goes wrong."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch

from poet_megatron.checkpoint import io as checkpoint_io
from poet_megatron.data.train_data import TrainBatches
from poet_megatron.engine.megatron import MegatronEngine
from poet_megatron.model.llama import LlamaModel

FAULTY_STEP = 3
SPIKE_STEP = 12
FOREVER = 1000.0
SLOW = 0.4


@contextmanager
def replaced(owner: Any, name: str, wrapper: Callable[[int, Callable, tuple, dict], Any]) -> Iterator[None]:
    """Replace a function by `wrapper(number of the call, the function, args, kwargs)`."""
    function, calls = getattr(owner, name), 0

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return wrapper(calls, function, args, kwargs)

    with mock.patch.object(owner, name, wrapped):
        yield


def before(owner: Any, name: str, action: Callable[[], object], calls: Callable[[int], bool]) -> AbstractContextManager[None]:
    """Do something before some calls of a function."""

    def wrapper(call: int, function: Callable, args: tuple, kwargs: dict) -> Any:
        if calls(call):
            action()
        return function(*args, **kwargs)

    return replaced(owner, name, wrapper)


def after(
    owner: Any, name: str, change: Callable[[MegatronEngine, Any], Any], calls: Callable[[int], bool]
) -> AbstractContextManager[None]:
    """Change something, and what is returned, after some calls of an engine's method."""

    def wrapper(call: int, function: Callable, args: tuple, kwargs: dict) -> Any:
        result = function(*args, **kwargs)
        return change(args[0], result) if calls(call) else result

    return replaced(owner, name, wrapper)


def only(step: int) -> Callable[[int], bool]:
    return lambda call: call == step


def disk_gone() -> None:
    raise OSError("the disk is gone")


def infinite_gradient(engine: MegatronEngine, result: Any) -> Any:
    next(iter(engine.trainable().values())).main_grad.view(-1)[0] = torch.inf
    return result


def flip(tensor: torch.Tensor) -> None:
    """Flip the lowest bit of the element in the middle."""
    bits = tensor.detach().view(-1).view(torch.int32)
    bits[bits.numel() // 2] ^= 1


def flipped_factor(engine: MegatronEngine, result: Any) -> Any:
    flip(next(parameter for name, parameter in engine.trainable().items() if name.endswith("q.rotation_in.skew")))
    return result


def flipped_moment(engine: MegatronEngine, result: Any) -> Any:
    flip(next(state for name, state in engine.states().items() if name.endswith("final_layernorm.weight")).slots["exp_avg_sq"])
    return result


def short_files(call: int, function: Callable, args: tuple, kwargs: dict) -> Any:
    """In the first two saves this process may not write files of more than 4 KiB: a quota, for the operating system."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if call <= 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        return function(*args, **kwargs)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def sleep_for_ever() -> None:
    time.sleep(FOREVER)


def dawdle() -> None:
    time.sleep(SLOW)


STEP = only(FAULTY_STEP)
FAULTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "gradient": lambda: after(MegatronEngine, "accumulate", infinite_gradient, STEP),
    "loss": lambda: after(MegatronEngine, "accumulate", lambda _, found: [entry * torch.tensor([torch.nan, 1.0]) for entry in found], STEP),
    "data": lambda: before(TrainBatches, "micro_batches", disk_gone, STEP),
    "hang in data": lambda: before(TrainBatches, "micro_batches", sleep_for_ever, STEP),
    "hang in forward": lambda: before(LlamaModel, "forward", sleep_for_ever, only(9)),
    "slow forward": lambda: before(LlamaModel, "forward", dawdle, lambda call: True),
    "slow data": lambda: before(TrainBatches, "_load", dawdle, lambda call: True),
    "spike": lambda: after(
        MegatronEngine, "accumulate", lambda _, found: [entry * torch.tensor([3.0, 1.0]) for entry in found], only(SPIKE_STEP)
    ),
    "flipped factor": lambda: after(MegatronEngine, "update", flipped_factor, STEP),
    "flipped moment": lambda: after(MegatronEngine, "update", flipped_moment, STEP),
    "short files": lambda: replaced(checkpoint_io, "write_tensors", short_files),
    "no common part": lambda: before(checkpoint_io, "write_common", disk_gone, lambda call: call <= 2),
}
