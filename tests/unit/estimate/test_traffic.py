"""What a layout communicates, against hand counts of Megatron's and POET's layers."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from poet_megatron.config.load import load_config
from poet_megatron.estimate.estimate import communication
from poet_megatron.estimate.schedule import messages, peak_in_flight
from poet_megatron.estimate.traffic import PURPOSES

LAYERS, HIDDEN, FFN, SEQUENCE, MICRO, BATCHES = 3, 64, 96, 32, 2, 4
BF16, FP32 = 2, 4
ACTIVATIONS = SEQUENCE * MICRO * HIDDEN * BF16
BASE = {
    "model.num_layers": LAYERS,
    "model.hidden_size": HIDDEN,
    "model.ffn_hidden_size": FFN,
    "model.num_attention_heads": 4,
    "model.seq_length": SEQUENCE,
    "model.vocab_size": 320,
    "poet.block_size": 16,
    "poet.compute": "input",
    "train.micro_batch_size": MICRO,
    "train.global_batch_size": MICRO * BATCHES,
    "parallel.tensor_parallel": 2,
}


@functools.cache
def traffic(ranks: int = 2, **changes: object):
    settings = {**BASE, **{key.replace("__", "."): value for key, value in changes.items()}}
    return communication(load_config(None, [f"--{key}={value}" for key, value in settings.items()]), ranks)


def of_purpose(entries, purpose: str) -> dict[tuple[str, str], tuple[int, int]]:
    """{(collective, group): (calls, bytes)}."""
    return {(entry.collective, entry.group): (entry.calls, entry.bytes) for entry in entries if entry.purpose == purpose}


COPIES = [  # how often q, k, v and gate, up are handed their input
    ({"poet__tp_placement": "outside"}, 3 + 2),
    ({"poet__tp_placement": "inside"}, 1 + 1),
    pytest.param({"poet__share_input_rotation": "true"}, 1 + 1, marks=pytest.mark.slow),
    pytest.param({"poet__compute": "weight"}, 1 + 1, marks=pytest.mark.slow),
    ({"method": "adamw"}, 1 + 1),
]


@pytest.mark.parametrize(("changes", "copies"), COPIES, ids=str)
def test_layers_without_sequence_parallelism(changes: dict, copies: int):
    """All-reduces: o and down forward, inputs backward, embedding, input of lm_head backward; maximum, logit and sum of the loss."""
    found = of_purpose(traffic(**changes), "layers")
    activations, losses = LAYERS * (2 + copies) + 2, 3
    size = BATCHES * (activations * ACTIVATIONS + losses * SEQUENCE * MICRO * FP32)
    assert found == {("all_reduce", "tensor"): (BATCHES * (activations + losses), size)}


@pytest.mark.parametrize(("changes", "copies"), COPIES, ids=str)
def test_layers_with_sequence_parallelism(changes: dict, copies: int):
    """Gathers: inputs forward, o and down backward, embedding backward, lm_head; reduce-scatters in the other direction.

    A weight that is trained needs its input again in the backward pass: dense q-k-v and gate-up, and lm_head. A frozen one does not.
    """
    found = of_purpose(traffic(parallel__sequence_parallel="true", **changes), "layers")
    again = 2 * LAYERS if changes.get("method") == "adamw" else 0
    calls = BATCHES * (LAYERS * (2 + copies) + 2)
    regathers = BATCHES * (again + 1)
    assert found["all_gather", "tensor"] == (calls + regathers, (calls + regathers) * ACTIVATIONS)
    assert found["reduce_scatter", "tensor"] == (calls, calls * ACTIVATIONS)
    assert found["all_reduce", "tensor"] == (3 * BATCHES, 3 * BATCHES * SEQUENCE * MICRO * FP32)


def skews(*widths: int) -> int:
    return sum(width * 15 // 2 for width in widths)


@pytest.mark.parametrize("sequence_parallel", ["false", "true"])
def test_partial_sums_of_factors_are_reduced_once_per_step(sequence_parallel: str):
    """Inside: R of q, k, v, gate, up, in fp32. Outside: nothing, or by Megatron under sequence parallelism."""
    inside = traffic(poet__tp_placement="inside", parallel__sequence_parallel=sequence_parallel)
    size = LAYERS * skews(*[HIDDEN] * 5) * FP32
    assert of_purpose(inside, "factor gradients") == {("all_reduce", "tensor"): (5 * LAYERS, size)}
    outside = traffic(poet__tp_placement="outside", parallel__sequence_parallel=sequence_parallel)
    assert of_purpose(outside, "factor gradients") == {}
    norms = (2 * LAYERS + 1) * HIDDEN
    flagged = {"inside": skews(*[HIDDEN] * 2), "outside": skews(*[HIDDEN] * 7)}
    for name, entries in (("inside", inside), ("outside", outside)):
        expected = {("all_reduce", "tensor"): (1, (norms + LAYERS * flagged[name]) * FP32)} if sequence_parallel == "true" else {}
        assert of_purpose(entries, "gradients") == expected, name


REPLICAS = {"train__global_batch_size": 16, "poet__tp_placement": "outside", "model__vocab_divisible_by": 64}


def test_gradients_and_parameters_over_replicas():
    """All-reduce of everything trainable in fp32; under the distributed optimizer a reduce-scatter and a gather, padded."""
    trainable = 320 * HIDDEN + (2 * LAYERS + 1) * HIDDEN + LAYERS * (7 * skews(HIDDEN) + 3 * skews(FFN // 2) + 4 * skews(HIDDEN // 2))
    plain = traffic(ranks=4, **REPLICAS)
    assert of_purpose(plain, "gradients") == {("all_reduce", "data"): (1, trainable * FP32)}
    assert of_purpose(plain, "parameters") == {}
    sharded = traffic(ranks=4, parallel__distributed_optimizer="true", **REPLICAS)
    (calls, size) = of_purpose(sharded, "gradients")["reduce_scatter", "data"]
    assert calls == 1 and trainable * FP32 <= size <= 1.05 * trainable * FP32
    assert of_purpose(sharded, "parameters") == {("all_gather", "data"): (1, size * BF16 // FP32)}


def test_a_merge_sends_every_working_weight():
    found = of_purpose(traffic(ranks=4, **REPLICAS), "merge")
    weights = LAYERS * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN) // 2
    assert found == {("broadcast", "data"): (7 * LAYERS, weights * BF16)}
    assert of_purpose(traffic(ranks=4, train__global_batch_size=16, method="adamw"), "merge") == {}


def test_a_single_rank_does_not_communicate():
    assert traffic(ranks=1, parallel__tensor_parallel=1, method="adamw") == []


def test_pipeline_messages():
    entries = traffic(ranks=6, parallel__pipeline_parallel=3, parallel__sequence_parallel="true", method="adamw")
    for kind in ("send", "recv"):
        found = {entry.stage: (entry.calls, entry.bytes) for entry in entries if entry.collective == kind}
        assert found == {stage: (BATCHES * n, BATCHES * n * ACTIVATIONS // 2) for stage, n in ((0, 1), (1, 2), (2, 1))}
    assert set(Counter(entry.purpose for entry in entries)) <= set(PURPOSES)


def test_interleaved_messages_go_round():
    """Of 2 x 3 chunks every one but the last sends on, every one but the first sends back."""
    sent = [messages(stage, 3, 4, 2) for stage in range(3)]
    assert sent == [4 * 3, 4 * 4, 4 * 3] and sum(sent) == 4 * 2 * 5
    assert messages(0, 1, 4, 1) == 0


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
def test_in_flight_of_1f1b(micro_batches: int):
    for stage in range(4):
        assert peak_in_flight(stage, 4, micro_batches, [10]) == 10 * min(4 - stage, micro_batches)


def test_in_flight_when_interleaved():
    """Megatron: 2 (stages - stage - 1) + (chunks - 1) stages warm-up passes, then one more; in chunks of a micro-batch."""
    for stage in range(4):
        assert peak_in_flight(stage, 4, 16, [1, 1]) == 2 * (4 - stage - 1) + 4 + 1
    assert peak_in_flight(0, 2, 2, [1, 1]) == 4  # all of them
    # 2 stages, 2 chunks, stage 0: forward 0 0 1 1 0, backward 1, forward 0 leaves four of the first chunk and one of the second
    assert peak_in_flight(0, 2, 4, [100, 1]) == 401
