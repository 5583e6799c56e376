"""Launch folders, `<run>/launch/N`: what each submission froze (recipe, points, code revision), its job numbers and its logs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from poet_megatron.errors import UserError
from poet_megatron.monitor.run_dir import git_revision

FOLDER = "launch"
RECORD = "launch.json"
RECIPE = "recipe.yaml"
POINTS = "points.txt"


def next_folder(run_dir: Path) -> Path:
    """The launch folder of the next submission; it does not exist yet."""
    return run_dir / FOLDER / str(max(_numbers(run_dir), default=0) + 1)


def write_snapshot(folder: Path, recipe: str, points: str, command: Sequence[str], root: Path) -> None:
    """Create the folder with the resolved recipe, the points of a sweep ("" without one) and where the code stands."""
    revision, dirty = git_revision(root)
    try:
        folder.mkdir(parents=True)
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
        if points:
            (folder / POINTS).write_text(points, encoding="utf-8")
        time = datetime.now(UTC).isoformat(timespec="seconds")
        _write(
            folder, {"time": time, "command": list(command), "code": str(root), "git_revision": revision, "git_dirty": dirty, "jobs": {}}
        )
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}; choose another train.run_dir") from error


def write_jobs(folder: Path, jobs: Mapping[str, int]) -> None:
    """Add the numbers of the jobs to the record."""
    _write(folder, {**_read(folder), "jobs": dict(jobs)})


def earlier_jobs(run_dir: Path) -> list[int]:
    """Numbers of all jobs submitted for a run directory so far."""
    return [int(job) for number in _numbers(run_dir) for job in _read(run_dir / FOLDER / str(number)).get("jobs", {}).values()]


def _numbers(run_dir: Path) -> list[int]:
    folder = run_dir / FOLDER
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdecimal()) if folder.is_dir() else []


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(folder: Path, content: Mapping[str, Any]) -> None:
    (folder / RECORD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
