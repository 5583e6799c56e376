"""Block sizes that a side cannot have."""

from __future__ import annotations

import pytest

from poet_megatron.layers.side import SideLayout


def test_a_fraction_below_two_features_is_refused_not_frozen():
    with pytest.raises(ValueError, match="0.01 is 0 of 70 features"):
        SideLayout.build(70, 1, 0.01, "fs")
    assert SideLayout.build(70, 1, 0, "fs").frozen


def test_fractions_are_exact():
    """0.29 * 100 is 28.999999999999996 in floating point."""
    assert SideLayout.build(100, 1, 0.29, "fs").block_size == 29


def test_a_block_wider_than_the_side_names_both():
    with pytest.raises(ValueError, match="block size 80 is larger than the width 64"):
        SideLayout.build(64, 1, 80, "bs")


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match="shard_groups is 3, which does not divide a width of 64"):
        SideLayout.build(64, 3, 16, "bs")
