"""Counter-based random numbers: every draw is a pure function of a key, the same on every rank, restart and parallel layout.

Raw Philox4x64-10 words (whose stream NumPy guarantees, unlike its distributions) are turned into permutations by a stable argsort and into
normals by Box-Muller in float64, rounded to float32. ALGORITHM_VERSION is stored in checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

ALGORITHM_VERSION = 1
PERMUTATION, INITIALIZATION = 1, 2
WORDS_PER_COUNTER = 4
ROWS_PER_CHUNK = 256


@dataclass(frozen=True)
class StreamKey:
    """Names one stream of random words.

    Attributes:
        seed: the run's seed, 0 <= seed < 2^64.
        purpose: PERMUTATION or INITIALIZATION.
        layer: global layer id, 0 <= layer < 2^32 - 1.
        matrix: which matrix of the layer, < 2^8.
        side: 0 for the input side (R), 1 for the output side (P).
        group: shard group.
        index: merge index.
    """

    seed: int
    purpose: int
    layer: int
    matrix: int
    side: int = 0
    group: int = 0
    index: int = 0

    def words(self, count: int, start_counter: int = 0) -> np.ndarray:
        """`count` raw uint64 words from counter `start_counter` on (four words per counter)."""
        tag = (self.purpose << 56) | (self.layer << 16) | (self.matrix << 8) | self.side
        generator = np.random.Philox(
            key=np.array([self.seed, tag], dtype=np.uint64),
            counter=np.array([start_counter, 0, self.group, self.index], dtype=np.uint64),
        )
        return generator.random_raw(count)

    def permutation(self, size: int) -> np.ndarray:
        """A random permutation of range(size), int64."""
        return np.argsort(self.words(size), kind="stable").astype(np.int64)

    def normal_rows(self, start: int, stop: int, columns: int) -> np.ndarray:
        """Rows [start, stop) of a standard normal matrix with `columns` columns, float32; any row range gives the same rows."""
        counters_per_row = -(-columns // (2 * WORDS_PER_COUNTER))
        rows = [
            self._normal_chunk(first, min(first + ROWS_PER_CHUNK, stop), counters_per_row)[:, :columns]
            for first in range(start, stop, ROWS_PER_CHUNK)
        ]
        return np.concatenate(rows) if rows else np.zeros((0, columns), dtype=np.float32)

    def _normal_chunk(self, start: int, stop: int, counters_per_row: int) -> np.ndarray:
        words = self.words((stop - start) * counters_per_row * WORDS_PER_COUNTER, start * counters_per_row)
        radius = np.sqrt(-2.0 * np.log(((words >> np.uint64(32)).astype(np.float64) + 1.0) / 2.0**32))
        angle = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * (2.0 * np.pi / 2.0**32)
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        return pairs.reshape(stop - start, -1).astype(np.float32)
