"""Slurm's commands: what the cluster has, and submitting, testing, finding and cancelling jobs."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from poet_megatron.errors import UserError

TIMEOUT_SECONDS = 120
UNUSABLE = re.compile(r"down|drain|fail|unknown|maint|inval|\*", re.IGNORECASE)
_DURATION = re.compile(r"(?:(?P<days>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+)(?::(?P<ds>\d+))?)?|(?P<a>\d+)(?::(?P<b>\d+)(?::(?P<c>\d+))?)?)")
_GPUS = re.compile(r"(?:^|,)gpu(?::[A-Za-z][^:,(]*)?:(\d+)")


@dataclass(frozen=True)
class Node:
    """A node of a partition."""

    name: str
    gpus: int
    usable: bool
    """Whether it runs jobs now: neither down, drained nor reserved for maintenance."""


@dataclass(frozen=True)
class Partition:
    """A partition and its limits; None is no limit."""

    name: str
    nodes: tuple[Node, ...]
    max_seconds: int | None
    max_nodes: int | None

    def with_gpus(self, gpus: int) -> list[Node]:
        """Its nodes that have so many GPUs each."""
        return [node for node in self.nodes if node.gpus >= gpus]


class Slurm:
    """Slurm's commands in an environment and a folder."""

    def __init__(self, environment: Mapping[str, str], folder: Path) -> None:
        """`environment` and working folder of the commands; what a job that we may be in has set is left out."""
        self._folder = folder
        self._environment = {name: value for name, value in environment.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}

    @property
    def available(self) -> bool:
        """Whether sbatch is on the PATH."""
        return shutil.which("sbatch", path=self._environment.get("PATH")) is not None

    def partition(self, name: str | None) -> Partition:
        """The partition of that name, or the default one; UserError if there is none."""
        partitions = [_fields(line) for line in self._output("scontrol", "--oneliner", "show", "partition").splitlines() if line]
        chosen = next((found for found in partitions if found["PartitionName"] == name or (not name and found["Default"] == "YES")), None)
        if chosen is None:
            names = ", ".join(found["PartitionName"] for found in partitions)
            raise UserError(f"there is no partition {name}; the cluster has {names}" if name else f"name one of {names} with --partition")
        found = chosen["PartitionName"]
        limit, nodes = chosen["MaxTime"], chosen["MaxNodes"]
        return Partition(found, self._nodes(found), parse_duration(limit), None if nodes == "UNLIMITED" else int(nodes))

    def max_array_size(self) -> int:
        """Tasks that an array may have."""
        match = re.search(r"^MaxArraySize\s*=\s*(\d+)", self._output("scontrol", "show", "config"), re.MULTILINE)
        return int(match[1]) if match else 1001

    def test(self, words: Sequence[str]) -> str:
        """What `sbatch --test-only` says of a job; UserError if it would be refused."""
        return self._run(["sbatch", "--test-only", *words], "sbatch would refuse this job").stderr.strip()

    def submit(self, words: Sequence[str]) -> int:
        """Submit a job; its number."""
        return int(self._run(["sbatch", "--parsable", *words], "sbatch refused the job").stdout.strip().split(";")[0])

    def cancel(self, jobs: Iterable[int]) -> None:
        """Cancel jobs."""
        self._run(["scancel", *map(str, jobs)], "scancel failed")

    def alive(self, jobs: Iterable[int]) -> dict[int, str]:
        """State of those jobs that wait or run."""
        states = {}
        for job in jobs:  # one by one: squeue refuses a list with a job that it has forgotten
            done = self._call(["squeue", "--noheader", "--format=%T", f"--jobs={job}"])
            if done.returncode == 0 and done.stdout.strip():
                states[job] = done.stdout.split()[0]
        return states

    def _nodes(self, partition: str) -> tuple[Node, ...]:
        lines = self._output("sinfo", "--noheader", "--Node", f"--partition={partition}", "--format=%N %T %G").splitlines()
        nodes = {}
        for name, state, gres in (line.split(maxsplit=2) for line in lines if line.strip()):
            nodes[name] = Node(name, sum(map(int, _GPUS.findall(gres))), not UNUSABLE.search(state))
        return tuple(nodes.values())

    def _output(self, *words: str) -> str:
        return self._run(words, f"{words[0]} failed").stdout

    def _run(self, words: Sequence[str], failure: str) -> subprocess.CompletedProcess[str]:
        done = self._call(words)
        if done.returncode:
            reason = " ".join((done.stderr or done.stdout).split()) or f"status {done.returncode}"
            raise UserError(f"{failure}: {reason}")
        return done

    def _call(self, words: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                list(words),
                env=self._environment,
                cwd=self._folder,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except FileNotFoundError as error:
            raise UserError(f"{words[0]} is not installed here: run this on a login node of the cluster, or add --dry-run") from error
        except subprocess.TimeoutExpired as error:
            raise UserError(f"{words[0]} did not answer in {TIMEOUT_SECONDS} s: try again when the cluster's controller is back") from error


def parse_duration(text: str) -> int | None:
    """Seconds of one of Slurm's time formats (D-HH:MM:SS, D-HH, HH:MM:SS, MM:SS, MM), or None for no limit."""
    if text.lower() in ("infinite", "unlimited"):
        return None
    match = _DURATION.fullmatch(text)
    if not match:
        raise UserError(f"time {text!r} is not D-HH:MM:SS, as in 1-12:00:00, nor HH:MM:SS, D-HH or minutes")
    if match["days"] is not None:
        days, hours, minutes, seconds = (int(match[name] or 0) for name in ("days", "dh", "dm", "ds"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    first, second, third = (int(match[name] or 0) for name in ("a", "b", "c"))
    return (first * 60 + second) * 60 + third if match["c"] else first * 60 + second


def _fields(line: str) -> dict[str, str]:
    """`Name=value` words of a line of scontrol."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
