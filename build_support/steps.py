"""Running the commands of a build, several at a time, and only those whose inputs have changed."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


class StepError(RuntimeError):
    """A command failed; the message has the first error that it printed."""


@dataclass(frozen=True)
class Step:
    """One command that writes `output` from `inputs` (sources, and every header they might include)."""

    command: tuple[str, ...]
    output: Path
    inputs: tuple[Path, ...]

    def run(self) -> None:
        """Run the command unless its output is newer than its inputs and came from the same command.

        Raises:
            StepError: the command failed or could not be started; there is no output then.
        """
        stamp = self.output.with_name(self.output.name + ".json")
        if self._is_current(stamp):
            return
        self.output.parent.mkdir(parents=True, exist_ok=True)
        for stale in (stamp, self.output):
            stale.unlink(missing_ok=True)
        print(" ".join(self.command), flush=True)
        try:
            done = subprocess.run(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        except OSError as error:
            raise StepError(f"{self.command[0]}: {error.strerror}") from error
        if done.stdout:
            print(done.stdout, flush=True)
        if done.returncode or not self.output.is_file():
            self.output.unlink(missing_ok=True)
            raise StepError(f"{self.command[0]} failed on {self.inputs[0].name} (status {done.returncode}): {_first_error(done.stdout)}")
        stamp.write_text(json.dumps(self.command))

    def _is_current(self, stamp: Path) -> bool:
        if not (stamp.is_file() and self.output.is_file() and stamp.read_text() == json.dumps(self.command)):
            return False
        written = self.output.stat().st_mtime
        return all(path.stat().st_mtime < written for path in self.inputs)


def _first_error(output: str) -> str:
    """The line of a compiler's or linker's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line or "undefined reference" in line), lines[-1] if lines else "no output")[:400]


def run_steps(steps: Sequence[Step], jobs: int) -> dict[Path, StepError | None]:
    """Run independent steps, `jobs` at a time; per output None, or what went wrong."""

    def attempt(step: Step) -> StepError | None:
        try:
            step.run()
        except StepError as error:
            return error
        return None

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return {step.output: error for step, error in zip(steps, pool.map(attempt, steps), strict=True)}
