"""Appendix H of the paper: how often 100 steps at T_m = 1 update each element of a 64 x 64 weight.

Measured on what a merge does, not on the permutations: an element is updated by R (P) if merging with random R (P) skews changes it.
"""

import numpy as np
import pytest
import torch

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix

SIZE, STEPS = 64, 100


def update_counts(variant, block, width_out=SIZE):
    """[out, SIZE] numbers of updates by R, and by P."""
    matrix = RotatedMatrix(SIZE, width_out, PoetConfig(variant=variant, block_size=block), MatrixId(0, 0, 0))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(width_out, SIZE, generator=generator)
    counts = [torch.zeros(width_out, SIZE, dtype=torch.int64) for _ in range(2)]
    for step in range(STEPS):
        matrix.set_merge_index(step)
        matrix.load_canonical(weight)
        for side, rotation in enumerate((matrix.rotation_in, matrix.rotation_out)):
            rotation.skew.data.normal_(0, 0.1, generator=generator)
            counts[side] += matrix.merged() != weight
            rotation.skew.data.zero_()
    return [count.numpy() for count in counts]


@pytest.mark.parametrize("block", [8, 16, 32, 24])
def test_block_stochastic_updates_every_element_200_times(block):
    by_r, by_p = update_counts("bs", block)
    assert (by_r + by_p == 2 * STEPS).all()


@pytest.mark.parametrize("block", [8, 16, 32])
def test_fully_stochastic_updates_are_uneven(block):
    """R updates whole inputs (columns of [out, in]), P whole outputs, b of 64 per step: counts ~ Binomial(100, b/64)."""
    by_r, by_p = update_counts("fs", block)
    assert (by_r == by_r[0]).all() and (by_p == by_p[:, :1]).all()
    total = by_r + by_p
    p = block / SIZE
    assert total.mean() == 2 * STEPS * p  # exactly: every step updates b of 64 inputs and b of 64 outputs
    # The mean of 128 squared deviations from a known mean estimates the variance 100 p (1 - p) with relative standard error
    # sqrt(2 / 126) = 0.13; five of them.
    deviations = np.concatenate([by_r[0], by_p[:, 0]]) - STEPS * p
    variance = STEPS * p * (1 - p)
    assert 1 - 0.63 < (deviations**2).mean() / variance < 1 + 0.63
    # An element's count is the sum of two binomials. Its extremes over the matrix are those of 64 draws per side, 2.4 standard deviations
    # of one side on average, so 3.4 of the sum; a side's extreme lies within 1.2 and 4.5 with probability 1 - 4e-4 per side.
    deviation = (2 * variance) ** 0.5
    for extreme in (total.max() - total.mean(), total.mean() - total.min()):
        assert 1.2 * 2**0.5 * deviation < extreme < 4.5 * 2**0.5 * deviation
    assert total.max() < 2 * STEPS  # never even, never the full count of the block-stochastic variant
    assert len(np.unique(total)) > 10


def test_fully_stochastic_index_sets_of_the_two_sides_are_independent():
    by_r, by_p = update_counts("fs", 16)
    inputs, outputs = by_r[0] - by_r.mean(), by_p[:, 0] - by_p.mean()
    correlation = (inputs * outputs).mean() / (inputs.std() * outputs.std())
    assert abs(correlation) < 5 / SIZE**0.5  # standard error of 64 products
