"""Where a run stands."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Counters of a run; with the weights, the optimizer and the settings they determine everything that follows.

    Attributes:
        step: optimizer steps taken.
        tokens: training tokens seen over all ranks, without masked ones.
        merge_index: merges so far; selects the permutations.
        last_merge: step after which the last merge happened; 0 before the first.
    """

    step: int = 0
    tokens: int = 0
    merge_index: int = 0
    last_merge: int = 0
