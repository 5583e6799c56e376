"""Several corpora as one: which corpus each sequence is taken from, by megatron-core's rule.

The rule, its C++ helper, is that of megatron-core's BlendedDataset: each sequence comes from the corpus that is furthest behind its weight.
Every prefix of the order has the weights' shares to within a few sequences, and a longer run begins with the order of a shorter one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers

from poet_megatron.data.batch import Batch

CORPUS, POSITION, COUNTS = "corpus.npy", "position.npy", "counts.npy"


@dataclass(frozen=True)
class BlendIndex:
    """Which sequence of which corpus comes when.

    Attributes:
        corpus: number of the corpus, int16 [samples].
        position: place in that corpus's own order, int64 [samples].
        counts: sequences taken from each corpus, int64 [corpora].
    """

    corpus: npt.NDArray[np.int16]
    position: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    @classmethod
    def build(cls, weights: Sequence[float], samples: int) -> BlendIndex:
        """Deal out `samples` sequences by weights of any sum."""
        corpus, position = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        helpers.build_blending_indices(corpus, position, normalized(weights), len(weights), samples, False)
        return cls(corpus, position, np.array([np.count_nonzero(corpus == number) for number in range(len(weights))], np.int64))

    def save(self, folder: Path) -> None:
        """Write it as plain arrays."""
        for name, array in ((CORPUS, self.corpus), (POSITION, self.position), (COUNTS, self.counts)):
            np.save(folder / name, array, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> BlendIndex:
        """Map what `save` wrote."""
        return cls(*(np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (CORPUS, POSITION, COUNTS)))


def normalized(weights: Sequence[float]) -> list[float]:
    """Weights with the sum 1."""
    array = np.array(weights, np.float64)
    return (array / array.sum()).tolist()


class BlendedSequences:
    """The sequences of several corpora in the order of a `BlendIndex`."""

    def __init__(self, parts: Sequence[Any], weights: Sequence[float], index: BlendIndex, fingerprints: Sequence[str]):
        self.parts, self.weights, self.index = parts, normalized(weights), index
        self.num_samples = len(index.corpus)
        self._fingerprints = list(fingerprints)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> Batch:
        """Sequence `number` of the blend."""
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sequence {number} is not in 0..{self.num_samples - 1}")
        return self.parts[self.index.corpus[number]][int(self.index.position[number])]

    @property
    def fingerprint(self) -> str:
        """A short hash of the weights and of the corpora's own orders."""
        facts = json.dumps(["blend", self.weights, self._fingerprints])
        return hashlib.sha256(facts.encode()).hexdigest()[:16]
