"""The order of the documents in each epoch: a permutation that is computed place by place, without memory or preparation.

A Feistel network whose round keys are Philox words of (seed, epoch) permutes the numbers below a power of four; walking along its cycle
until a number below `size` comes up makes it a permutation of range(size). C4 has 365 M documents: a shuffled index would be 1.5 GB per
epoch and rank.
"""

from __future__ import annotations

from functools import lru_cache

from poet_megatron.ops.philox import StreamKey

DATA_ORDER = 3
"""Purpose of the streams, beside those of ops.philox."""
ORDER_VERSION = 1
"""Part of the order's fingerprint: another algorithm is another order."""
ROUNDS = 10
_WORD = (1 << 64) - 1


class EpochOrder:
    """A random permutation of range(size), a pure function of (seed, epoch, size)."""

    def __init__(self, seed: int, epoch: int, size: int):
        self.size = size
        self._half = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [int(word) for word in StreamKey(seed, DATA_ORDER, 0, 0, index=epoch).words(ROUNDS)]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: int) -> int:
        """What stands at `place`."""
        if not 0 <= place < self.size:
            raise IndexError(f"place {place} is not in 0..{self.size - 1}")
        value = self._permuted(place)
        while value >= self.size:  # fewer than three times on average: the power of four is below 4 * size
            value = self._permuted(value)
        return value

    def _permuted(self, value: int) -> int:
        half = self._half
        mask = (1 << half) - 1
        left, right = value >> half, value & mask
        for key in self._keys:
            left, right = right, left ^ (_mixed((right + key) & _WORD) >> (64 - half))
        return left << half | right


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, size: int) -> EpochOrder:
    """An `EpochOrder`, kept while it is in use."""
    return EpochOrder(seed, epoch, size)


def _mixed(word: int) -> int:
    """SplitMix64's finalizer: every input bit changes each output bit half of the time."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31
