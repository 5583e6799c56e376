"""Fingerprints of tensors, and what is said about ranks whose fingerprints differ."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from poet_megatron.parallel import replicas
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import parallel_context
from poet_megatron.parallel.replicas import check_replicas, describe_difference, fingerprint

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


def values(dtype: torch.dtype, count: int = 97) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    if dtype.is_floating_point:
        return torch.randn(count, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 200, (count,), generator=generator).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8])
def test_the_sum_of_splitmix64(dtype: torch.dtype):
    """By hand, in Python's integers: splitmix64's finalizer (a bijection) of word + position x odd number, modulo 2^64."""
    words = torch.tensor([0, 1, -1, -(1 << 63), 1 << 62, 12345]).to(dtype)
    expected = sum(splitmix64(int(word) + position * 0x9E3779B97F4A7C15) for position, word in enumerate(words, start=1))
    assert (int(fingerprint(words)) - expected) % (1 << 64) == 0


def splitmix64(number: int) -> int:
    number %= 1 << 64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % (1 << 64)
    return number ^ (number >> 31)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_single_bit_counts(dtype: torch.dtype):
    tensor = values(dtype)
    seen = {int(fingerprint(tensor))}
    flips = [0] if dtype == torch.bool else range(8 * tensor.element_size())
    for position in range(len(tensor)):
        for bit in flips:
            mask = -(1 << bit) if bit == 8 * tensor.element_size() - 1 and dtype != torch.uint8 else 1 << bit  # the sign bit, as int
            changed = tensor.clone()
            bits(changed)[position] ^= mask
            seen.add(int(fingerprint(changed)))
    assert len(seen) == 1 + len(tensor) * len(flips)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_order_counts(dtype: torch.dtype):
    """Any two different elements in each other's place, also where one is the negative of the other."""
    tensor = values(dtype, 40)
    if dtype.is_floating_point:
        tensor[20:] = -tensor[:20]
    original = int(fingerprint(tensor))
    for first in range(len(tensor)):
        for second in range(first):
            swapped = tensor.clone()
            swapped[[first, second]] = tensor[[second, first]]
            assert (int(fingerprint(swapped)) == original) == bool(tensor[first] == tensor[second])


def test_patterns_do_not_cancel():
    """Equal and opposite changes, which a sum with weights linear in the position cannot see, and moved blocks."""
    permutation = torch.arange(1000)
    for step in (1, 7, 64):
        changed = permutation.clone()
        changed[[0, step, 2 * step]] += torch.tensor([1, -2, 1])
        assert fingerprint(changed) != fingerprint(permutation)
        assert fingerprint(permutation.roll(step)) != fingerprint(permutation)
    assert fingerprint(permutation.flip(0)) != fingerprint(permutation)


def test_no_chance_collisions():
    tensors = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert len({int(fingerprint(tensor)) for tensor in tensors}) == len(tensors)


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, chunk: int):
    tensor = values(torch.bfloat16, 131)
    expected = int(fingerprint(tensor))
    monkeypatch.setattr(replicas, "CHUNK", chunk)
    assert int(fingerprint(tensor)) == expected


def test_an_element_in_the_last_chunk_of_a_large_tensor():
    tensor = torch.zeros(replicas.CHUNK * 2 + 5, dtype=torch.bfloat16)
    before = fingerprint(tensor)
    tensor[-1] = 1e-30
    assert fingerprint(tensor) != before


def test_shapes():
    """Only the elements in their order count; views are read as they are, and an empty tensor has a fingerprint."""
    tensor = values(torch.float32, 96)
    assert fingerprint(tensor.view(8, 12)) == fingerprint(tensor)
    assert fingerprint(tensor.view(8, 12).T) == fingerprint(tensor.view(8, 12).T.contiguous()) != fingerprint(tensor)
    assert fingerprint(tensor[3:]) == fingerprint(tensor[3:].clone())  # a view that starts anywhere
    assert fingerprint(torch.empty(0, 5)) == 0
    assert fingerprint(torch.zeros(3)) != fingerprint(torch.zeros(4))
    assert fingerprint(nn.Parameter(tensor)).requires_grad is False


def test_bits_are_compared_not_values():
    """Ranks do the same operations on the same bits, so that even the sign of a zero says that one did something else."""
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    quiet = torch.tensor([math.nan])
    other = (quiet.view(torch.int32) + 1).view(torch.float32)
    assert other.isnan()
    assert fingerprint(other) != fingerprint(quiet)
    assert fingerprint(quiet) == fingerprint(quiet.clone())


def test_no_value_leaves_the_device(monkeypatch: pytest.MonkeyPatch):
    """A fingerprint waits for nothing: on the meta device, where there is no value to wait for, it works as well."""
    monkeypatch.setattr(replicas, "CHUNK", 10)
    result = fingerprint(torch.empty(25, dtype=torch.bfloat16, device="meta"))
    assert result.is_meta
    assert (result.dtype, result.shape) == (torch.int64, ())


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({0: 5, 1: 6}, "w differs between rank 0 and rank 1"),
        ({2: 5, 6: 6}, "w differs between rank 2 and rank 6"),
        ({0: 5, 1: 5, 2: 6, 3: 5}, "w on rank 2 differs from ranks 0, 1, 3"),
        ({0: 7, 4: 5, 8: 5}, "w on rank 0 differs from ranks 4, 8"),
        ({0: 7, 1: 8, 2: 5, 3: 5, 4: 5}, "w on ranks 0, 1 differs from ranks 2, 3, 4"),
        ({0: 5, 1: 6, 2: 5, 3: 6}, "w differs between ranks 0, 2 and ranks 1, 3"),
        ({0: 5, 1: 6, 2: 7, 3: 5}, "w differs between ranks 0, 3 and rank 1 and rank 2"),
    ],
)
def test_who_differs(held: dict[int, int], text: str):
    """With two ranks nobody can say which one is wrong."""
    assert describe_difference("w", held) == text


def test_one_rank_has_nothing_to_compare():
    with parallel_context(ParallelConfig(), seed=1):
        check_replicas([nn.Linear(4, 3)], "now")
