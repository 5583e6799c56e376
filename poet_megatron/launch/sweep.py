"""Points of a sweep: every combination of the values of some settings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from poet_megatron.errors import UserError

_UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")


@dataclass(frozen=True)
class Point:
    """One run of a sweep: a name, which is its folder below train.run_dir, and its settings as words of the command line."""

    name: str
    words: tuple[str, ...]


def parse_sweep(words: Sequence[str]) -> list[Point]:
    """Points of `key=value,value ...`, the last key changing fastest; none without words.

    Raises:
        UserError: a word of another form, a key or value given twice, a value that cannot be a word.
    """
    if not words:
        return []
    axes: dict[str, list[str]] = {}
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise UserError(f"--sweep {word!r} is not key=value,value: for example optim.poet_lr=1e-3,2e-3")
        if key in axes:
            raise UserError(f"--sweep has {key} twice: give all of its values at once, as {key}={','.join(axes[key])},{values}")
        if re.search(r"\s", values):
            raise UserError(f"--sweep {word!r} has a value with a space; put it into the recipe")
        if twice := [value for value in values.split(",") if values.split(",").count(value) > 1]:
            raise UserError(f"--sweep {key} has the value {twice[0]} twice: leave one out")
        axes[key] = values.split(",")
    if "train.run_dir" in axes:
        raise UserError("--sweep train.run_dir: every point has a folder of its own already, below train.run_dir; leave it out")
    labels = _labels(list(axes))
    return [_point(dict(zip(axes, values, strict=True)), labels) for values in itertools.product(*axes.values())]


def points_text(points: Sequence[Point]) -> str:
    """The points as launch/slurm/sweep.sbatch reads them: a name and settings per line."""
    return "".join(f"{point.name} {' '.join(point.words)}\n" for point in points)


def _point(values: dict[str, str], labels: dict[str, str]) -> Point:
    name = "_".join(f"{labels[key]}-{_UNSAFE.sub('-', value)}" for key, value in values.items())
    return Point(name, tuple(f"--{key}={value}" for key, value in values.items()))


def _labels(keys: list[str]) -> dict[str, str]:
    """Short name of every key: its last part, or all of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: short if last.count(short) == 1 else key for key, short in zip(keys, last, strict=True)}
