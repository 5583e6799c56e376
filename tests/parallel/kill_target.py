"""The command that test_kill.py kills: `poet-megatron`, with a mark on disk while a merge is under way, which takes a little longer.

usage: kill_target.py FOLDER-OF-MARKS pretrain ...
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from poet_megatron.cli.main import main
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.optim.merge import merge_model

SECONDS_PER_MATRIX = 0.05  # a rank merges 7 of these small matrices, in no time: too short to be hit


def mark_of(marks: Path, rank: int) -> Path:
    """Exists while a rank merges."""
    return marks / f"merge-{rank}"


def marked_merge(marks: Path) -> Any:
    """merge_model, with the mark of this rank while it runs."""
    mark = mark_of(marks, int(os.environ.get("RANK", "0")))

    def merge(*args: Any) -> None:
        mark.touch()
        merge_model(*args)
        mark.unlink()

    return merge


def slow_merged(merged: Any) -> Any:
    """RotatedMatrix.merged, slower."""

    def slow(*args: Any) -> Tensor:
        time.sleep(SECONDS_PER_MATRIX)
        return merged(*args)

    return slow


if __name__ == "__main__":
    with (
        mock.patch("poet_megatron.train.loop.merge_model", marked_merge(Path(sys.argv[1]))),
        mock.patch.object(RotatedMatrix, "merged", slow_merged(RotatedMatrix.merged)),
    ):
        sys.exit(main(sys.argv[2:]))
