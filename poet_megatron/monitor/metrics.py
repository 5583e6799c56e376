"""Metrics of a run: metrics.jsonl and TensorBoard always, Weights & Biases on request, written by rank 0 only."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from poet_megatron.errors import UserError
from poet_megatron.monitor.config import MonitorConfig
from poet_megatron.monitor.run_dir import RunDirectory

NOT_PLOTTED = ("step", "time")


class Sink(Protocol):
    """One place that metrics go to."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step."""

    def rewind(self, step: int) -> None:
        """Forget what was written for steps after `step`."""

    def close(self) -> None:
        """Write out what is buffered."""


class MetricsLogger:
    """Hands the metrics of a step to every sink; does nothing on ranks other than 0."""

    def __init__(self, directory: RunDirectory, monitor: MonitorConfig, rank: int = 0, settings: Mapping[str, Any] | None = None) -> None:
        """Open the sinks in `directory`; `settings` (the flat configuration) is shown beside the run by Weights & Biases."""
        self.sinks: list[Sink] = []
        if rank == 0:
            self.sinks += [JsonLinesSink(directory.metrics_path), TensorBoardSink(directory.tensorboard_path)]
            if monitor.wandb_project:
                self.sinks.append(WandbSink(directory, monitor.wandb_project, settings or {}))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write the metrics of one step to every sink."""
        for sink in self.sinks:
            sink.log(metrics, step)

    def rewind(self, step: int) -> None:
        """Drop what a previous start logged after `step`; call it when a run resumes from a checkpoint of `step`."""
        for sink in self.sinks:
            sink.rewind(step)

    def close(self) -> None:
        """Write out what is buffered and close the sinks."""
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> MetricsLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class JsonLinesSink:
    """metrics.jsonl: one object per line with `step`, `time` (Unix seconds) and the metrics; numbers that are not finite are null."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            self._keep(None)  # a crash may have left half a line
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one line and flush it."""
        values = {key: float(value) if math.isfinite(value) else None for key, value in metrics.items() if key not in NOT_PLOTTED}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Remove the lines of steps after `step`."""
        self._file.close()
        self._keep(step)
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _keep(self, last_step: int | None) -> None:
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if _is_kept(line, last_step)]
        if len(kept) == len(lines):
            return
        partial = self.path.with_name(self.path.name + ".partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


class TensorBoardSink:
    """TensorBoard events; the file appears with the first metrics."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._purge_step: int | None = None
        self._writer: Any = None

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one scalar per metric."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.path), purge_step=self._purge_step)
        for key, value in metrics.items():
            if key not in NOT_PLOTTED:
                self._writer.add_scalar(key, value, step)

    def rewind(self, step: int) -> None:
        """Have TensorBoard hide the events of steps after `step`."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Write out the events."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbSink:
    """A Weights & Biases run that a restart continues; plots use our `step`, so that rewound steps are drawn again."""

    def __init__(self, directory: RunDirectory, project: str, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"monitor.wandb_project is {project!r} but wandb cannot be imported ({error}): pip install wandb, or set it to ''"
            ) from error
        id_file = directory.path / "wandb_id"
        known = id_file.read_text(encoding="utf-8").strip() if id_file.exists() else None
        self._run: Any = wandb.init(
            project=project, name=directory.path.name, dir=str(directory.path), id=known, resume="allow", config=dict(settings)
        )
        id_file.write_text(f"{self._run.id}\n", encoding="utf-8")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send the metrics of one step."""
        self._run.log({**{key: value for key, value in metrics.items() if key not in NOT_PLOTTED}, "step": step})

    def rewind(self, step: int) -> None:
        """Nothing to do: steps that are logged again replace the old ones on the plots."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl, null as nan; damaged lines are left out."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if _is_kept(line, None)]
    return [{key: math.nan if value is None else value for key, value in row.items()} for row in rows]


def _is_kept(line: str, last_step: int | None) -> bool:
    """Whether a line is whole and of a step up to `last_step`."""
    if not line.endswith("\n"):
        return False
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return False
    return isinstance(step, int) and (last_step is None or step <= last_step)
