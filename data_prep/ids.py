"""Token ids of several texts as two arrays: all ids end to end, and where those of each text begin."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Offsets = npt.NDArray[np.int64]
"""One more than texts: those of text i stand at offsets[i]:offsets[i + 1]."""


def flat(lists: Sequence[Sequence[int]]) -> tuple[Ids, Offsets]:
    """Arrays of lists of ids."""
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return np.fromiter(chain.from_iterable(lists), np.int32, int(offsets[-1])), offsets
