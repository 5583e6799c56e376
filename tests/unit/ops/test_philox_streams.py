"""Counter-based random numbers: the algorithm (against an own Philox4x64-10 and golden values), uniformity and independence of keys."""

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from poet_megatron.ops.philox import ALGORITHM_VERSION, INITIALIZATION, PERMUTATION, ROWS_PER_CHUNK, StreamKey

MASK = 2**64 - 1


def philox4x64(counter: int, key: tuple[int, int]) -> list[int]:
    """Ten rounds as published by Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), on Python integers."""
    c = [(counter >> (64 * i)) & MASK for i in range(4)]
    k = list(key)
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(high >> 64) ^ c[1] ^ k[0], high & MASK, (low >> 64) ^ c[3] ^ k[1], low & MASK]
        k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
    return c


def expected_words(key: StreamKey, count: int, start: int = 0) -> list[int]:
    """The layout of a key: (seed, purpose:8 | layer:40 | matrix:8 | side:8), counter words (block, 0, group, index) counted from 1."""
    tag = key.purpose * 2**56 + key.layer * 2**16 + key.matrix * 2**8 + key.side
    high = key.group * 2**128 + key.index * 2**192
    blocks = [philox4x64(high + start + 1 + i, (key.seed, tag)) for i in range(-(-count // 4))]
    return list(itertools.chain(*blocks))[:count]


def test_our_oracle_reproduces_the_published_known_answers():
    # kat_vectors of Random123 1.14 (philox 4x64, 10 rounds), counter and key all zero and all one.
    assert philox4x64(0, (0, 0)) == [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox4x64(2**256 - 1, (MASK, MASK)) == [0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0]


@pytest.mark.parametrize(
    "key",
    [
        StreamKey(0, PERMUTATION, 0, 0),
        StreamKey(1234, PERMUTATION, 23, 6, side=1, group=3, index=1249),
        StreamKey(MASK, INITIALIZATION, 2**32 - 2, 255, side=1, group=2**40, index=2**63),
    ],
)
def test_words_are_philox4x64_of_the_key(key):
    assert key.words(11).tolist() == expected_words(key, 11)
    assert key.words(9, start_counter=5).tolist() == expected_words(key, 9, start=5) == key.words(29)[20:].tolist()


def test_golden_values_so_that_the_algorithm_cannot_change_silently():
    """A change here changes every run and every checkpoint: raise ALGORITHM_VERSION with it."""
    assert (ALGORITHM_VERSION, PERMUTATION, INITIALIZATION) == (1, 1, 2)
    key = StreamKey(42, PERMUTATION, 7, 3, side=1, group=2, index=5)
    assert key.words(3).tolist() == [0xEC6ADD3B4E0B3079, 0x5A277B0F02F82C2B, 0x42AA97FC6A0848A7]
    assert key.permutation(16).tolist() == [5, 2, 14, 4, 1, 10, 8, 15, 6, 11, 12, 13, 9, 3, 0, 7]
    assert StreamKey(0, PERMUTATION, 0, 0).permutation(8).tolist() == [2, 5, 0, 4, 3, 6, 7, 1]
    normals = StreamKey(42, INITIALIZATION, 7, 3).normal_rows(300, 302, 3)
    golden = [[1.16293203830719, 0.7462280988693237, -1.25827956199646], [-0.5777019262313843, 0.42618894577026367, -0.979485273361206]]
    # float32 cos, sin, log and sqrt of other libms may differ in the last place: 4 ulp of numbers up to 4 is 2e-6.
    np.testing.assert_allclose(normals, golden, atol=2e-6, rtol=0)


@pytest.mark.parametrize("size", [0, 1, 2, 63, 1376])
def test_a_permutation_permutes_and_orders_the_words(size):
    key = StreamKey(3, PERMUTATION, 1, 2)
    permutation = key.permutation(size)
    assert permutation.dtype == np.int64
    assert sorted(permutation.tolist()) == list(range(size))
    words = expected_words(key, size)
    assert permutation.tolist() == sorted(range(size), key=words.__getitem__)


@pytest.mark.parametrize("component", ["seed", "layer", "matrix", "group", "index"])
def test_permutations_are_uniform_along_every_key_component(component):
    """All 24 orders of 4 elements over 2,400 consecutive values (240 for `matrix`, of 8 bits): chi-square with 23 degrees of freedom.

    A correct generator exceeds the threshold with probability 1e-6, and the seeds are fixed; an order that is 1.5 times as likely as the
    others adds 0.5^2 x 100 = 25 per cell (an argsort of 2-bit words, say, puts a statistic above 1,000).
    """
    draws = 240 if component == "matrix" else 2400
    base = StreamKey(11, PERMUTATION, 3, 0)
    counts = dict.fromkeys(itertools.permutations(range(4)), 0)
    for value in range(draws):
        counts[tuple(dataclasses.replace(base, **{component: value}).permutation(4).tolist())] += 1
    observed = np.array(list(counts.values()))
    statistic = ((observed - draws / 24) ** 2 / (draws / 24)).sum()
    assert statistic < stats.chi2.isf(1e-6, 23)


def test_every_feature_is_equally_likely_to_lead():
    """Which of 32 features opens a permutation, over 3,200 merges: what fully-stochastic blocks rest on (threshold as above)."""
    first = [StreamKey(0, PERMUTATION, 1, 4, index=index).permutation(32)[0] for index in range(3200)]
    statistic = ((np.bincount(first, minlength=32) - 100) ** 2 / 100).sum()
    assert statistic < stats.chi2.isf(1e-6, 31)


def test_every_key_component_changes_the_stream():
    base = StreamKey(5, PERMUTATION, 2, 3, side=0, group=1, index=4)
    changed = [dataclasses.replace(base, **{field.name: getattr(base, field.name) + 1}) for field in dataclasses.fields(StreamKey)]
    assert len(changed) == 7
    neighbours = [base, *changed, dataclasses.replace(base, matrix=4, side=1), dataclasses.replace(base, group=2, index=3)]
    # 32! orders: two equal ones among distinct streams do not happen by chance.
    assert len({tuple(key.permutation(32).tolist()) for key in neighbours}) == len(neighbours)
    words = np.concatenate([key.words(256) for key in neighbours])
    assert len(np.unique(words)) == len(words)  # no stream is a shifted copy of another


@pytest.mark.parametrize("columns", [1, 8, 13, 100])
def test_rows_of_normals_do_not_depend_on_the_range(columns):
    key = StreamKey(9, INITIALIZATION, 4, 1)
    stop = 2 * ROWS_PER_CHUNK + 20
    whole = key.normal_rows(0, stop, columns)
    assert whole.shape == (stop, columns) and whole.dtype == np.float32
    for first, last in [(0, 1), (7, 9), (ROWS_PER_CHUNK - 1, ROWS_PER_CHUNK + 1), (100, stop), (stop - 1, stop), (5, 5)]:
        np.testing.assert_array_equal(key.normal_rows(first, last, columns), whole[first:last])


def test_normals_are_box_muller_of_the_words():
    key = StreamKey(9, INITIALIZATION, 4, 1)
    words = expected_words(key, 8, start=6)  # 13 columns take two counters a row (8 normals each), so row 3 starts at counter 6
    expected = []
    for word in words:
        radius = np.sqrt(-2 * np.log(((word >> 32) + 1) / 2**32))
        expected += [radius * np.cos(2 * np.pi * (word % 2**32) / 2**32), radius * np.sin(2 * np.pi * (word % 2**32) / 2**32)]
    np.testing.assert_allclose(key.normal_rows(3, 4, 13)[0], expected[:13], atol=2e-6, rtol=0)  # fp32 rounding of numbers up to 7


def test_normals_are_standard_normal_and_independent():
    """262,144 normals: sample moments within 5 standard errors (1, 2, 6 and 24 over n for the first four), Kolmogorov-Smirnov at 1e-6."""
    x = StreamKey(2, INITIALIZATION, 0, 0).normal_rows(0, 512, 512).astype(np.float64)
    n = x.size
    for power, (expected, variance) in enumerate([(0, 1), (1, 2), (0, 15), (3, 96)], start=1):
        assert abs((x**power).mean() - expected) < 5 * (variance / n) ** 0.5
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-6
    # Row, column and pair neighbours: a correlation of n products has standard error 1 / sqrt(n).
    for other in (np.roll(x, 1, 0), np.roll(x, 1, 1), np.roll(x, 8, 1), np.roll(x, 256, 0)):
        assert abs((x * other).mean()) < 5 / n**0.5
        assert abs((x**2 * other**2).mean() - 1) < 5 * (8 / n) ** 0.5  # var(x^2 y^2) = 9 - 1
    other_matrix = StreamKey(2, INITIALIZATION, 0, 1).normal_rows(0, 512, 512)
    assert abs((x * other_matrix).mean()) < 5 / n**0.5
