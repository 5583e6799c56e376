"""Geometry of one side of a rotated matrix: which blocks there are, where they lie, and how many numbers they take.

The width of a side is divided into shard groups of equal width; permutations and blocks never leave a group. The columns of a side are
stored in this order: the full blocks of every group, the ragged last block of every group, then the columns that no block touches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from poet_megatron.ops.block_product import BlockRun
from poet_megatron.ops.philox import StreamKey
from poet_megatron.ops.skew import packed_length

FRACTION_SLACK = 1e-9  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class SideLayout:
    """Blocks of one side, for the `groups` shard groups that live on this rank.

    Attributes:
        group_width: features per shard group.
        groups: shard groups on this rank.
        full: full blocks per group.
        block_size: side of a full block.
        ragged: side of the last, smaller block of a group (0: none, block-stochastic only).
    """

    group_width: int
    groups: int
    full: int
    block_size: int
    ragged: int

    @classmethod
    def build(cls, width: int, groups: int, block: float, variant: str, capped: bool = False) -> SideLayout:
        """Lay out a side of `width` features in `groups` groups.

        Args:
            width: features on this rank.
            groups: shard groups on this rank; must divide width.
            block: an integer size, a fraction of the group width (fully-stochastic only), or 0 for a frozen side.
            variant: "bs" or "fs".
            capped: there are several shard groups, here or on other ranks: block-stochastic blocks are at most as wide as a group.

        Raises:
            ValueError: if groups does not divide the width, or the block is larger than the group (and not capped).
        """
        if width % groups:
            raise ValueError(f"shard_groups is {groups}, which does not divide a width of {width}")
        group_width = width // groups
        size = math.floor(block * group_width + FRACTION_SLACK) if 0 < block <= 1 else int(block)
        if size > group_width and (variant == "fs" or not capped):
            raise ValueError(f"block size {size} is larger than the width {group_width} of a shard group: choose at most {group_width}")
        size = min(size, group_width)
        if block and size < 2:
            raise ValueError(f"block size {block} is {size} of {group_width} features; a block has at least 2 (0 freezes the side)")
        if size < 2:
            return cls(group_width, groups, 0, 0, 0)
        if variant == "fs":
            return cls(group_width, groups, 1, size, 0)
        ragged = group_width % size
        return cls(group_width, groups, group_width // size, size, ragged)

    @property
    def width(self) -> int:
        """Features on this rank."""
        return self.group_width * self.groups

    @property
    def frozen(self) -> bool:
        """Whether the side has no block (b = 0)."""
        return self.full == 0

    @property
    def covered(self) -> int:
        """Features of one group that belong to a block."""
        return self.full * self.block_size + self.ragged

    @property
    def packed_full(self) -> int:
        """Skew numbers of the full blocks of one group."""
        return self.full * packed_length(self.block_size)

    @property
    def packed_per_group(self) -> int:
        """Skew numbers of one group."""
        return self.packed_full + packed_length(self.ragged)

    @property
    def sum_squares(self) -> int:
        """Sum of b^2 over all blocks, the flop count of a block product per token is 2 sum b^2."""
        return self.groups * (self.full * self.block_size**2 + self.ragged**2)

    @property
    def runs(self) -> tuple[BlockRun, ...]:
        """Runs of equal blocks in stored column order."""
        if self.frozen:
            return ()
        full = BlockRun(self.groups * self.full, self.block_size, 0)
        return (full, BlockRun(self.groups, self.ragged, full.stop)) if self.ragged else (full,)

    def permutation(self, key: StreamKey, first_group: int = 0) -> np.ndarray:
        """Stored order of the features: stored column i holds feature permutation[i]; int64 [width], local feature numbers.

        Each group draws its own permutation from `key` with its global number (first_group + g); the leading entries go to the blocks.
        """
        draws = []
        for group in range(self.groups):
            draw = StreamKey(key.seed, key.purpose, key.layer, key.matrix, key.side, first_group + group, key.index).permutation(
                self.group_width
            )
            draws.append(np.concatenate([draw[: self.covered], np.sort(draw[self.covered :])]) + group * self.group_width)
        stop = self.full * self.block_size
        parts = [d[:stop] for d in draws] + [d[stop : self.covered] for d in draws] + [d[self.covered :] for d in draws]
        return np.concatenate(parts)
