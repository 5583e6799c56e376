"""Checkpoint directories: written aside and renamed when complete, checksummed, the last k kept, damaged ones passed over."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
Checksums = dict[str, dict[str, int | str]]
_NAME = re.compile(r"step-(\d{8})$")
_OF_RANK = re.compile(r"(?:__|rng-)(\d+)[_.]")
_READ_BYTES = 1 << 22


class CheckpointStore:
    """The checkpoints of one run, `<root>/step-NNNNNNNN`."""

    def __init__(self, root: Path, keep_last: int = 2) -> None:
        self.root, self.keep_last = root, keep_last

    def path(self, step: int) -> Path:
        """Directory of the complete checkpoint of `step`."""
        return self.root / f"step-{step:08d}"

    def staging(self, step: int) -> Path:
        """Directory that the checkpoint of `step` is written to before it is complete."""
        return self.root / f"step-{step:08d}.partial"

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.root.iterdir() if (match := _NAME.match(entry.name)))

    def abandon(self) -> None:
        """Delete what an interrupted save left behind."""
        for leftover in self.root.glob("step-*.partial"):
            shutil.rmtree(leftover)

    def begin(self, step: int) -> Path:
        """Make an empty staging directory for `step`, clearing what an interrupted save left behind."""
        self.abandon()
        staging = self.staging(step)
        staging.mkdir(parents=True)
        return staging

    def checksums(self, step: int, rank: int | None = None) -> Checksums:
        """Flush staged files of `step` to disk; their sizes and SHA-256 by name.

        Only the machine that wrote a file has it in its page cache, so every rank does this for its own.

        Args:
            step: names the checkpoint.
            rank: only those that this rank wrote, by their names (rank 0: also those of no rank); all by default.
        """
        staging = self.staging(step)
        files = {str(path.relative_to(staging)): path for path in sorted(staging.rglob("*")) if path.is_file()}
        mine = {name: path for name, path in files.items() if rank is None or _writer(name) == rank}
        for path in mine.values():
            _fsync(path)
        return {name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for name, path in mine.items()}

    def commit(self, step: int, checksums: Checksums | None = None) -> Path:
        """Write the manifest, flush the directories, rename them into place, delete old checkpoints; returns the final directory.

        Args:
            step: names the checkpoint.
            checksums: of all of its files, which their writers have flushed and which need not be visible here yet; by default the
                files are flushed and read here.
        """
        staging, final = self.staging(step), self.path(step)
        files = dict(sorted((self.checksums(step) if checksums is None else checksums).items()))
        (staging / MANIFEST).write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n")
        for path in (staging / MANIFEST, *(entry for entry in staging.rglob("*") if entry.is_dir()), staging):
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        _fsync(self.root)
        for old in self._superseded(step):
            self._delete(old)
        return final

    def _delete(self, step: int) -> None:
        """Delete a checkpoint that is no longer needed; one that cannot be deleted (somebody reads it) is no reason to fail."""
        try:
            shutil.rmtree(self.path(step))
        except OSError as error:
            logger.warning("the old checkpoint %s could not be deleted: %s", self.path(step), error)

    def _superseded(self, step: int) -> list[int]:
        """Checkpoints to delete once that of `step` is there: all but the last k, and later ones that the run fell back from."""
        steps = self.steps()
        return [s for s in steps if s > step] + [s for s in steps if s <= step][: -self.keep_last]

    def newest_intact(self) -> int | None:
        """Step of the newest checkpoint whose files match their checksums, or None; damaged newer ones are named in a warning."""
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                return step
            logger.warning("checkpoint %s is damaged (%s): falling back to the one before", self.path(step), damage)
        return None

    def damage(self, step: int) -> str | None:
        """What is wrong with the files of `step`, or None if all of them are as they were written."""
        root = self.path(step)
        try:
            files = json.loads((root / MANIFEST).read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            return f"unreadable {MANIFEST}: {error}"
        for name, expected in files.items():
            path = root / name
            if not path.is_file():
                return f"{name} is missing"
            try:
                if path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
                    return f"{name} does not match its checksum"
            except OSError as error:
                return f"{name} cannot be read: {error.strerror}"
        return None


def _writer(name: str) -> int:
    match = _OF_RANK.match(name)
    return int(match[1]) if match else 0


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
