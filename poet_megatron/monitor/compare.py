"""Reading several run directories: what each run reached, and in which settings they differ."""

from __future__ import annotations

import json
import math
import os
import socket
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from poet_megatron.config.dump import flat_values
from poet_megatron.config.load import load_config
from poet_megatron.errors import UserError
from poet_megatron.monitor.metrics import read_metrics
from poet_megatron.monitor.run_dir import RunDirectory

LAST_PART = 0.05
"""Share of the logged steps, at the end of a run, whose mean is the last training loss."""
NOT_COMPARED = ("train.run_dir", "train.stop_at_step", "checkpoint.", "monitor.", "profile.")
"""Beginnings of settings that say nothing about what a run computes: its name, how far one start of it goes, what it writes."""
MUST_AGREE = ("data.path", "data.blend", "model.vocab_size", "model.seq_length", "train.eval_tokens")
"""Settings without which validation losses measure different things."""


@dataclass(frozen=True)
class Point:
    """A loss and the step it was logged at; the loss may be nan."""

    step: int
    loss: float


@dataclass(frozen=True)
class Run:
    """What a run directory says.

    Attributes:
        path: the run directory.
        name: the directory, relative to the folder that holds all runs of the comparison.
        settings: value of every dotted key that has a meaning for this run; empty if config.yaml cannot be read.
        train: logged training losses, by step.
        valid: validation losses, by step.
        tokens_per_s: median over the logged steps; nan if there is none.
        peak_gib: peak memory of rank 0; nan if there is none.
        holder: "running" or "perhaps running" if a process holds the directory or may, else "".
        problems: what could not be read, a sentence each.
    """

    path: Path
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    train: Sequence[Point] = ()
    valid: Sequence[Point] = ()
    tokens_per_s: float = math.nan
    peak_gib: float = math.nan
    holder: str = ""
    problems: Sequence[str] = ()

    @property
    def steps_done(self) -> int:
        """Last step that left a metric; 0 without any."""
        return max((point.step for point in (*self.train, *self.valid)), default=0)

    @property
    def steps_total(self) -> int | None:
        """train.steps; None if the settings are not known."""
        return self.settings.get("train.steps")

    @property
    def final(self) -> Point | None:
        """The last validation."""
        return self.valid[-1] if self.valid else None

    @property
    def best(self) -> Point | None:
        """The validation with the lowest loss; None if there is no finite one."""
        return min((point for point in self.valid if math.isfinite(point.loss)), key=lambda point: point.loss, default=None)

    @property
    def last_train_loss(self) -> float:
        """Mean training loss of the last 5 % of the logged steps, at least one; nan if one of them is not finite or there is none."""
        count = max(1, math.ceil(LAST_PART * len(self.train)))
        return statistics.fmean(point.loss for point in self.train[-count:]) if self.train else math.nan

    @property
    def state(self) -> str:
        """`complete`, `stopped at N` (or `running at N`), `not finite since N` or `no metrics`."""
        if not self.train and not self.valid:
            return "no metrics" + (f", {self.holder}" if self.holder else "")
        since = _not_finite_since(self.train) or _not_finite_since(self.valid)
        if since is not None:
            return f"not finite since {since}"
        if self.steps_total is not None and self.steps_done >= self.steps_total:
            return "complete"
        return f"{self.holder or 'stopped'} at {self.steps_done}"


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Run directories among `paths` and below them, each once; checkpoints inside a run are no runs.

    Raises:
        UserError: a path that does not exist, or one with no run in it.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist; give run directories, or a folder that holds some")
        runs = list(_runs_below(path))
        if not runs:
            raise UserError(
                f"no run in {path}: a run directory holds config.yaml and metrics.jsonl, as `poet-megatron pretrain` writes them"
            )
        for run in runs:
            found.setdefault(run.resolve(), run)
    return list(found.values())


def common_folder(paths: Sequence[Path], runs: Sequence[Path]) -> Path:
    """The folder that the comparison is about: the only one that was asked for, or the nearest that holds all runs."""
    if len(paths) == 1 and paths[0].resolve() not in {run.resolve() for run in runs}:
        return paths[0]
    return Path(os.path.commonpath([run.resolve().parent for run in runs]))


def read_run(path: Path, folder: Path) -> Run:
    """What the run directory `path` says, named relative to `folder`; damage is reported in `problems`, never raised."""
    directory, problems = RunDirectory(path), list[str]()
    settings = _settings(directory.config_path, problems)
    rows = _rows(directory.metrics_path, problems)
    train, valid = _points(rows, "train/loss"), _points(rows, "eval/loss")
    bad = sum(not math.isfinite(point.loss) for point in train)
    if bad:
        problems.append(f"{bad} of {len(train)} logged training losses are not finite")
    return Run(
        path,
        os.path.relpath(path.resolve(), folder.resolve()),
        settings,
        train,
        valid,
        _middle(_values(rows, "perf/tokens_per_s")),
        max(_values(rows, "mem/peak_gib"), default=math.nan),
        _holder(directory.lock_path),
        problems,
    )


def ranked(runs: Iterable[Run]) -> list[Run]:
    """Runs by their last validation loss, then by their last training loss; what is missing or not finite comes last."""

    def order(run: Run) -> tuple[float, float, str]:
        losses = (run.final.loss if run.final else math.nan, run.last_train_loss)
        valid, train = (loss if math.isfinite(loss) else math.inf for loss in losses)
        return valid, train, run.name

    return sorted(runs, key=order)


def best_run(runs: Sequence[Run]) -> Run | None:
    """The run with the lowest last validation loss; None if no run has a finite one."""
    first = ranked(runs)[0]
    return first if first.final is not None and math.isfinite(first.final.loss) else None


def differing_settings(runs: Sequence[Run]) -> list[str]:
    """Keys whose values are not the same in all runs that have settings, in the order of the configuration."""
    known = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for settings in known for key in settings if not key.startswith(NOT_COMPARED))
    return [key for key in keys if len({str(settings[key]) for settings in known if key in settings}) > 1]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key without its section (`optim.poet_lr` is `poet_lr`), unless two would then be the same."""
    leaves = [key.rpartition(".")[2] for key in keys]
    return {key: leaf if leaves.count(leaf) == 1 else key for key, leaf in zip(keys, leaves, strict=True)}


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader of the comparison has to know: damage, and runs whose validation losses do not compare."""
    lines = [f"{run.name}: {problem}" for run in runs for problem in run.problems]
    unlike = [key for key in MUST_AGREE if key in differing_settings(runs)]
    if unlike:
        lines.append(f"{', '.join(unlike)} differ: validation losses compare only on the same validation text and tokenizer")
    return lines


def _runs_below(path: Path) -> Iterable[Path]:
    directory = RunDirectory(path)
    if any(file.is_file() for file in (directory.config_path, directory.metrics_path, directory.info_path)):
        yield path
        return
    for folder, below, files in os.walk(path):
        below.sort()
        if directory.metrics_path.name in files or directory.info_path.name in files:
            below.clear()
            yield Path(folder)


def _settings(path: Path, problems: list[str]) -> dict[str, Any]:
    """Settings that have a meaning for the run: none of POET's for a dense one."""
    try:
        config = load_config(path)
    except ValueError as error:
        problems.append(f"its settings are not known: {error}")
        return {}
    unused: tuple[str, ...] = ("poet.", "optim.poet_") if config.method != "poet" else ()
    unused += ("deepspeed.",) if config.engine != "deepspeed" else ()
    return {key: value for key, value in flat_values(config).items() if not key.startswith(unused)}


def _rows(path: Path, problems: list[str]) -> list[dict[str, float]]:
    try:
        rows = read_metrics(path)
        lines = len(path.read_bytes().splitlines())
    except FileNotFoundError:
        problems.append(f"no {path.name}: it has logged nothing yet, or failed before its first step")
        return []
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    if lines > len(rows):
        problems.append(f"{lines - len(rows)} of {lines} lines of {path.name} are damaged and left out")
    elif not rows:
        problems.append(f"{path.name} is empty: it has logged nothing yet")
    return rows


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """Losses by step; of a step that was logged twice, the later one."""
    found = {int(row["step"]): float(row[key]) for row in rows if _is_number(row.get(key))}
    return [Point(step, found[step]) for step in sorted(found)]


def _values(rows: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    return [row[key] for row in rows if _is_number(row.get(key)) and math.isfinite(row[key])]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else math.nan


def _not_finite_since(points: Sequence[Point]) -> int | None:
    """First step of the losses at the end that are not finite; None if the last one is."""
    since = None
    for point in reversed(points):
        if math.isfinite(point.loss):
            break
        since = point.step
    return since


def _holder(path: Path) -> str:
    """Whether the lock file names a process that is running, or that may be, on another host. A process that is killed leaves its name."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        host, pid = holder["host"], int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if host != socket.gethostname():
        return "perhaps running"
    return "running" if Path(f"/proc/{pid}").exists() else ""
