"""What test_distributed_merge.py checks about merges and replicas, on an engine of this rank; all ranks check together."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from poet_megatron.engine.base import Batch, Engine
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.rotation import Rotation
from poet_megatron.model.build import build_chunks, transformer_config
from poet_megatron.model.init import initialize
from poet_megatron.optim.merge import keep_masters, merge_model, owners, rotated_matrices, rotation_health
from poet_megatron.optim.state import MOMENTS, AdamState
from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.replicas import ReplicasDiverged, check_replicas
from poet_megatron.train.evaluate import evaluate
from poet_megatron.train.step import train_step

RANKS = 4
MERGES = 100  # of the spectrum cases
SKEW_STD = 0.02  # |Q|_2 = 0.3 for blocks of 64
NAMES = {"skew": "q.rotation_in.skew", "perm": "down.rotation_out.perm", "weight": "gate.weight", "norm": "input_layernorm.weight"}
FAILED: list[str] = []


def expect(condition: bool, what: str) -> None:
    """Note what does not hold and go on, so that this rank still takes part in what the others do."""
    if not condition:
        FAILED.append(f"rank {dist.get_rank()}: not so: {what}")


def data_group() -> dist.ProcessGroup:
    return parallel_state.get_data_parallel_group()


def gathered(tensor: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def rotations(engine: Engine) -> dict[str, Rotation]:
    modules = itertools.chain.from_iterable(chunk.named_modules() for chunk in engine.chunks)
    return {name: module for name, module in modules if isinstance(module, Rotation)}


def batches(engine: Engine, step: int) -> list[Batch]:
    """Random tokens, this data-parallel rank's."""
    train, model = engine.run.train, engine.run.model
    generator = torch.Generator().manual_seed(step * RANKS + engine.context.data_rank)
    result = []
    for _ in range(engine.micro_batches):
        text = torch.randint(model.vocab_size, (train.micro_batch_size, model.seq_length + 1), generator=generator)
        tokens, labels = text[:, :-1], text[:, 1:]
        positions = torch.arange(model.seq_length).expand_as(tokens)
        result.append({"tokens": tokens, "labels": labels, "position_ids": positions, "loss_mask": torch.ones(tokens.shape)})
    return result


# -- merges in training --


def check_merge(engine: Engine, alone: dist.ProcessGroup) -> dict[str, float]:
    """Two rounds of training and merging; the second shows that the first left everything as it should be."""
    reference = merged_on_one_rank(engine, alone)
    next(reference)
    moved = []
    for step in range(2):
        train_step(engine, batches(engine, step), clip_grad=1.0)
        states = engine.states()
        check_states_are_complete(engine, states)
        expect(all(rotation.skew.abs().max() > 5e-3 for rotation in rotations(engine).values()), "skews have moved")
        before = base_snapshot(engine, states)
        loss = evaluate(engine, batches(engine, 99)).loss
        expected = next(reference)
        with CollectiveCounter() as counter:
            merge_model(engine.chunks, states, engine.run.poet, data_group())
        moved.append(abs(evaluate(engine, batches(engine, 99)).loss - loss))
        check_reset(engine, states)
        after = base_snapshot(engine, states)
        expect(before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before), "base state unchanged")
        check_weights(engine, expected)
        check_bytes(engine, counter)
        check_replicas(engine.chunks, "after the merge")
    check_no_spring_back(engine)
    return {"loss_moved": max(moved)}


def merged_on_one_rank(engine: Engine, alone: dist.ProcessGroup) -> Iterator[list[tuple[Tensor, Tensor | None]]]:
    """The same model without data parallelism: [(weight, master)] of every matrix after a merge of the skews that the engine now has."""
    chunks = build_chunks(engine.run, transformer_config(engine.run))
    if engine.run.train.precision == "bf16":
        keep_masters(chunks, alone)
    for chunk in chunks:
        initialize(chunk, engine.run.model, engine.run.train.seed)
    yield []
    while True:
        for mine, theirs in zip(rotated_matrices(chunks), rotated_matrices(engine.chunks), strict=True):
            mine.rotation_in.skew.data.copy_(theirs.rotation_in.skew)
            mine.rotation_out.skew.data.copy_(theirs.rotation_out.skew)
        merge_model(chunks, {}, engine.run.poet, alone)
        yield [(matrix.weight, matrix.master) for matrix in rotated_matrices(chunks)]


def check_states_are_complete(engine: Engine, states: dict[str, AdamState]) -> None:
    """The states of the data-parallel ranks together cover every trainable element once (or on every rank), all of them with moments."""
    shares: list[dict[str, int]] = [{} for _ in range(data_group().size())]
    dist.all_gather_object(shares, {name: state.stop - state.start for name, state in states.items()}, group=data_group())
    copies = 1 if engine.run.parallel.distributed_optimizer else len(shares)
    for name, parameter in engine.trainable().items():
        expect(sum(share.get(name, 0) for share in shares) == copies * parameter.numel(), f"state of {name} on all ranks")
    for name, state in states.items():
        expect(state.step > 0 and all(state.slots[moment].any() for moment in MOMENTS), f"moments of {name} before the merge")


def base_snapshot(engine: Engine, states: dict[str, AdamState]) -> dict[str, Tensor]:
    """Copies of everything that a merge leaves alone: base parameters, their masters, moments and steps."""
    snapshot = {name: parameter.detach().clone() for name, parameter in engine.trainable().items() if not name.endswith(".skew")}
    for name, state in states.items():
        if not name.endswith(".skew"):
            entries = {"param": state.param.detach().clone(), "step": torch.tensor(state.step)}
            snapshot |= {f"{name} {key}": value for key, value in entries.items()}
            snapshot |= {f"{name} {moment}": state.slots[moment].clone() for moment in MOMENTS}
    return snapshot


def check_reset(engine: Engine, states: dict[str, AdamState]) -> None:
    """Skews, their masters, moments and steps are zero on every rank."""
    skews = {name: state for name, state in states.items() if name.endswith(".skew")}
    expect(bool(skews) or engine.run.parallel.distributed_optimizer, "state of skews on this rank")
    for name, state in skews.items():
        expect(state.step == 0, f"step of {name} is zero")
        expect(not any(tensor.any() for tensor in (state.param, *(state.slots[moment] for moment in MOMENTS))), f"state of {name} is zero")
    expect(not any(rotation.skew.any() for rotation in rotations(engine).values()), "skews are zero")


def check_weights(engine: Engine, expected: list[tuple[Tensor, Tensor | None]]) -> None:
    """Working weights and masters are, bit for bit, those of a merge on one rank; each master is on one rank and rounds to the weight."""
    dealt = owners(engine.chunks, data_group().size())
    expect(set(dealt.values()) == set(range(data_group().size())), "every rank merges something")
    for number, ((matrix, owner), (weight, master)) in enumerate(zip(dealt.items(), expected, strict=True)):
        expect(torch.equal(matrix.weight, weight), f"weight {number} as merged on one rank")
        copies = gathered(matrix.weight.data, data_group())
        expect(all(torch.equal(matrix.weight, copy) for copy in copies), f"weight {number} the same on all ranks")
        expect((matrix.master is not None) == (master is not None and owner == data_group().rank()), f"master {number} on its owner only")
        if matrix.master is not None:
            expect(torch.equal(matrix.master, master), f"master {number} as merged on one rank")
            rounded = matrix.master.to(matrix.weight.dtype)
            expect(torch.equal(matrix.canonical(matrix.weight), rounded), f"weight {number} is its master, rounded")


def check_bytes(engine: Engine, counter: CollectiveCounter) -> None:
    """A merge broadcasts every working weight once to the data-parallel ranks (2mn bytes in bf16), and that is all."""
    width = 2 if engine.run.train.precision == "bf16" else 4
    weights = sum(matrix.weight.shape[0] * matrix.weight.shape[1] * width for matrix in rotated_matrices(engine.chunks))
    expect(counter.bytes() == {"broadcast": weights}, f"bytes {counter.bytes()}, not {weights}")
    expect(counter.calls() == counter.calls(*dist.get_process_group_ranks(data_group())), "only among data-parallel ranks")


def check_no_spring_back(engine: Engine) -> None:
    """The step after a merge starts from zero: Adam's first update is at most its learning rate, whatever the masters were before."""
    train_step(engine, batches(engine, 2), clip_grad=1.0)
    largest = max(float(rotation.skew.abs().max()) for rotation in rotations(engine).values())
    expect(0.5 < largest / engine.run.optim.poet_lr < 1.01, f"skews after a first update: {largest}")


def check_overlap(engine: Engine, alone: dist.ProcessGroup) -> None:
    """No rank waits for a weight before it has merged all of its own, and it sends while it still has some to merge."""
    events: list[str] = []

    def recorded(event: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            events.append(event)
            return function(*args, **kwargs)

        return call

    class Work:
        def __init__(self, work: dist.Work) -> None:
            self.wait = recorded("wait", work.wait)

    broadcast = recorded("send", dist.broadcast)
    with (
        mock.patch.object(RotatedMatrix, "merged", recorded("merge", RotatedMatrix.merged)),
        mock.patch.object(dist, "broadcast", lambda *args, **kwargs: Work(broadcast(*args, **kwargs))),
    ):
        merge_model(engine.chunks, {}, engine.run.poet, data_group())
    matrices = rotated_matrices(engine.chunks)
    expect(events.count("send") == events.count("wait") == len(matrices), f"one message for each matrix: {events}")
    expect(0 < events.count("merge") < len(matrices), f"a share of the merges: {events}")
    last_merge = len(events) - 1 - events[::-1].index("merge")
    expect(events.index("send") < last_merge < events.index("wait"), f"messages while merging: {events}")


# -- the spectrum over many merges --


def check_spectrum(engine: Engine, alone: dist.ProcessGroup) -> dict[str, float]:
    """Largest change of a singular value, over the largest one, after MERGES merges of random skews; of gathered matrices, in float64."""
    before, norms = spectra(engine), []
    for number in range(MERGES):
        draw_skews(engine, number)
        if number % 25 == 0:
            norms.append(rotation_health(engine.chunks, parallel_state.get_model_parallel_group())[1])
        merge_model(engine.chunks, engine.states(), engine.run.poet, data_group())
        check_replicas(engine.chunks, f"after merge {number}")
    after = spectra(engine)
    drift = {name: float((after[name] - before[name]).abs().max() / before[name].max()) for name in before}
    return {"smallest_skew_norm": min(norms), "largest_skew_norm": max(norms), **drift}


def draw_skews(engine: Engine, number: int) -> None:
    """Random skews: the same on the ranks that hold the same factor."""
    for name, rotation in rotations(engine).items():
        rank = parallel_state.get_tensor_model_parallel_rank() if getattr(rotation.skew, "tensor_model_parallel", False) else 0
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {number} {rank}".encode()))
        rotation.skew.data.copy_(SKEW_STD * torch.randn(rotation.skew.shape, generator=generator))


def spectra(engine: Engine) -> dict[str, Tensor]:
    """Singular values of a column-parallel and a row-parallel matrix: of the working weights, and of the masters where they are."""
    layer = engine.chunks[0].decoder.layers[0]
    result = {}
    for name, axis, module in (("gate", 0, layer.mlp.linear_fc1), ("down", 1, layer.mlp.linear_fc2)):
        matrix = module.matrices[name]
        tensors = {"working": matrix.canonical(matrix.weight.detach())}
        if engine.run.poet.master_weights:
            tensors["master"] = torch.zeros(matrix.weight.shape) if matrix.master is None else matrix.master.clone()
            dist.all_reduce(tensors["master"], group=data_group())
        for kind, part in tensors.items():
            whole = torch.cat(gathered(part, parallel_state.get_tensor_model_parallel_group()), dim=axis)
            result[f"{name} {kind}"] = torch.linalg.svdvals(whole.double())
    return result


# -- ranks that come apart --


def check_plants(engine: Engine, alone: dist.ProcessGroup, *plants: tuple[str, int, list[str]]) -> None:
    """One flipped bit on one rank is found on every rank, by name and rank; before and after there is no alarm."""
    merge_model(engine.chunks, engine.states(), engine.run.poet, data_group())
    for kind, rank, expected in plants:
        check_replicas(engine.chunks, "without a plant")
        with flipped_bit(engine, NAMES[kind], rank):
            message = ""
            try:
                check_replicas(engine.chunks, "before the merge at step 7")
            except ReplicasDiverged as error:
                message = str(error)
        messages: list[str] = [""] * RANKS
        dist.all_gather_object(messages, message)
        expect(len(set(messages)) == 1 and message.startswith("before the merge at step 7"), f"the same message on every rank: {messages}")
        expect(NAMES[kind] in message and all(text in message for text in expected), f"{kind} and {expected} in: {message}")
        expect(message.count("differ") == len(expected), f"{len(expected)} differences in: {message}")
    check_replicas(engine.chunks, "with every plant undone")


@contextmanager
def flipped_bit(engine: Engine, name: str, rank: int) -> Iterator[None]:
    """Flip the lowest bit of an element in the middle of the last tensor called so, on one rank."""
    tensors = dict(itertools.chain(engine.chunks[0].named_parameters(), engine.chunks[0].named_buffers()))
    tensor = [tensor for key, tensor in tensors.items() if key.endswith(name)][-1].data.view(-1)
    bits = tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    flip = int(dist.get_rank() == rank)
    bits[bits.numel() // 2] ^= flip
    yield
    bits[bits.numel() // 2] ^= flip
