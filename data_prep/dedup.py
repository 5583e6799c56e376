"""Which documents were seen before: a set of 64-bit hashes in sorted arrays, 8 bytes a document (16 while two arrays are merged).

The hash is 64 bits of BLAKE2b. Among n documents n^2 / 2^65 are expected to be taken for duplicates wrongly: 0.004 for the 365 M of C4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]


class SeenHashes:
    """A growing set; arrays of similar length are merged, so there are only a few."""

    def __init__(self) -> None:
        self._levels: list[Hashes] = []

    def __len__(self) -> int:
        return sum(len(level) for level in self._levels)

    def add(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Add hashes; True for those that are new, which of equal ones is the first only."""
        unique, first = np.unique(hashes, return_index=True)
        unseen = np.ones(len(unique), bool)
        for level in self._levels:
            place = np.minimum(np.searchsorted(level, unique), len(level) - 1)
            unseen &= level[place] != unique
        new = np.zeros(len(hashes), bool)
        new[first[unseen]] = True
        self._push(unique[unseen])
        return new

    def _push(self, level: Hashes) -> None:
        if not len(level):
            return
        while self._levels and len(self._levels[-1]) <= 2 * len(level):
            level = np.concatenate([self._levels.pop(), level])
            level.sort()
        self._levels.append(level)
