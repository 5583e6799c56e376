"""The order of an epoch: a permutation, another one per epoch and seed, and none of its places is special."""

import numpy as np
import pytest

from poet_megatron.data.order import EpochOrder, epoch_order

CHI2 = {4: 18.5, 29: 58.3}  # scipy.stats.chi2.ppf(0.999, degrees of freedom)


def chi2(observed, expected):
    return float(((np.asarray(observed) - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("size", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097])
def test_every_number_comes_once(size):
    for epoch in (0, 1, 7):
        assert sorted(EpochOrder(1, epoch, size)) == list(range(size))


def test_the_order_is_the_same_everywhere():
    """Written down once: a change of these numbers is another order, and needs another ORDER_VERSION."""
    assert list(EpochOrder(1234, 0, 12)) == [8, 10, 7, 1, 0, 3, 2, 6, 9, 4, 11, 5]
    assert [EpochOrder(1234, 3, 365_000_000)[place] for place in range(4)] == [160760523, 142689030, 347282449, 175102594]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(EpochOrder(seed, epoch, 50)) for seed in (0, 1, 2**63) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9


def test_each_number_is_as_likely_first_and_each_pair_too():
    epochs = 3000
    firsts = np.bincount([EpochOrder(5, epoch, 5)[0] for epoch in range(epochs)], minlength=5)
    assert chi2(firsts, epochs / 5) < CHI2[4]
    pairs = np.zeros((6, 6))
    for epoch in range(epochs):
        order = EpochOrder(6, epoch, 6)
        pairs[order[0], order[1]] += 1
    assert pairs.trace() == 0
    assert chi2(pairs[~np.eye(6, dtype=bool)], epochs / 30) < CHI2[29]


def test_neighbours_do_not_stay_neighbours_and_the_second_epoch_does_not_repeat_the_first():
    size = 20_011
    first, second = (np.array(list(EpochOrder(9, epoch, size))) for epoch in (0, 1))
    # Of `size` random pairs, a share of about 2 * 100 / size is within 100 of each other: 200, give or take 5 standard deviations of 14.
    for differences in (np.diff(first), first - second, first - np.arange(size)):
        assert 130 < np.count_nonzero(np.abs(differences) <= 100) < 270
    assert abs(np.corrcoef(first, np.arange(size))[0, 1]) < 5 / np.sqrt(size)
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(size)


def test_a_large_corpus_needs_no_preparation():
    order = epoch_order(3, 2, 365_000_000)
    some = [order[place] for place in range(2000)]
    assert len(set(some)) == 2000 and max(some) < 365_000_000 and max(some) > 360_000_000
    assert epoch_order(3, 2, 365_000_000) is order
    for place in (-1, 365_000_000):
        with pytest.raises(IndexError, match=f"place {place} is not in 0..364999999"):
            order[place]
