"""A run's directory: where its files are, that only one process uses it, and what it was started with."""

from __future__ import annotations

import fcntl
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from poet_megatron.errors import UserError

PACKAGES = ("poet-megatron", "torch", "megatron-core", "transformers", "numpy", "sentencepiece", "deepspeed")
GIT_TIMEOUT_SECONDS = 10
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchJob:
    """The job of a batch system that a start belongs to.

    Attributes:
        name: the same for all starts of a job, such as `slurm 1234`.
        restarts: how often the batch system has started it again.
    """

    name: str
    restarts: int = 0


class RunDirectory:
    """Paths of one run and an advisory lock on them, held between `acquire` and `release` (or in a `with` block).

    The lock belongs to the open file, so the kernel drops it when the process ends in any way. Rank 0 alone takes it.
    """

    def __init__(self, path: str | Path) -> None:
        if not str(path):
            raise UserError("train.run_dir is empty; name the directory that the run writes to, such as --train.run_dir runs/first")
        self.path = Path(path)
        self.config_path = self.path / "config.yaml"
        self.metrics_path = self.path / "metrics.jsonl"
        self.tensorboard_path = self.path / "tensorboard"
        self.checkpoints_path = self.path / "checkpoints"
        self.export_path = self.path / "export"
        self.info_path = self.path / "run.json"
        self.lock_path = self.path / "lock"
        self._lock: int | None = None

    def acquire(self) -> None:
        """Create the directory and lock it; UserError naming the holder if another process has it."""
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise UserError(f"train.run_dir {self.path} cannot be written: {error.strerror}; choose another directory") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(f"{self._holder()}; wait for it, stop it, or set another train.run_dir") from None
        except OSError as error:  # some network file systems have no locks
            _log.warning("%s cannot be locked (%s): nothing stops a second run from using it", self.path, error.strerror)
        self._lock = descriptor
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}).encode(), 0)

    def release(self) -> None:
        """Give the lock back; nothing happens if it is not held."""
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> RunDirectory:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def write_config(self, text: str) -> None:
        """Write config.yaml, whole or not at all."""
        _write_whole(self.config_path, text)

    def write_run_info(self, command: Sequence[str] | None = None, resumed_from: int = 0, job: BatchJob | None = None) -> None:
        """Append what this start runs with to run.json, a list with one entry per start."""
        entries = self.read_run_info()
        entry = run_info(sys.argv if command is None else command)
        of_job = {"job": job.name, "restarts": job.restarts} if job is not None else {"job": None}
        entries.append({**entry, "resumed_from": resumed_from, **of_job})
        _write_whole(self.info_path, json.dumps(entries, indent=2) + "\n")

    def check_progress(self, job: BatchJob, step: int, most: int) -> None:
        """Refuse a restart that is one too many.

        Args:
            job: what is started again.
            step: step of the checkpoint that it would continue from.
            most: restarts of one job that may find the checkpoint of the start before; 0 for any number.

        Raises:
            UserError: `most` restarts of this job have found this checkpoint already.
        """
        starts = [entry for entry in self.read_run_info() if entry.get("job") == job.name and entry["restarts"] <= job.restarts]
        idle = list(itertools.takewhile(lambda entry: entry["resumed_from"] == step, reversed(starts)))
        if most and idle and job.restarts - idle[-1]["restarts"] > most:  # those that ended before they were written down count too
            raise UserError(
                f"job {job.name} made no progress in {most} restarts (guard.max_idle_restarts): each began at step {step} and ended before "
                "the next checkpoint. Look for the error in its log, or lower checkpoint.interval, then submit it anew"
            )

    def read_run_info(self) -> list[dict[str, Any]]:
        """Entries of run.json; none if there is no file, and a damaged one is set aside."""
        if not self.info_path.exists():
            return []
        try:
            entries = json.loads(self.info_path.read_text(encoding="utf-8"))
        except ValueError:
            entries = None
        if isinstance(entries, list):
            return entries
        self.info_path.replace(self.info_path.with_suffix(".json.damaged"))
        return []

    def _holder(self) -> str:
        try:
            holder = json.loads(self.lock_path.read_text(encoding="utf-8"))
            who = f"pid {holder['pid']} on host {holder['host']} since {holder['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return f"run directory {self.path} is in use by {who}"


def run_info(command: Sequence[str]) -> dict[str, Any]:
    """What a start runs with: time, command line, host, git revision of the code (None outside a repository) and versions."""
    revision, dirty = git_revision(Path(__file__).parent)
    return {
        "started": _now(),
        "command": list(command),
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
        "git_revision": revision,
        "git_dirty": dirty,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def git_revision(folder: Path) -> tuple[str | None, bool | None]:
    """Commit that `folder` is checked out at and whether tracked or new files differ from it; (None, None) if git does not track it."""
    if not _git(folder, "ls-files", "--", "."):
        return None, None
    revision = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    return (revision, status != "") if revision and status is not None else (None, None)


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *words],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_SECONDS,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
