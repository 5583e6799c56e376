"""What a measurement was taken on: without it a number cannot be compared with another."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
FLAG_PREFIXES = ("avx2", "avx512", "avx_vnni", "amx")


@dataclass(frozen=True)
class Machine:
    """The machine and software of a run.

    Attributes:
        cpu: model name.
        cores: cores this process may use.
        flags: vector and matrix extensions, e.g. "avx512f", "amx_bf16"; empty where the system does not tell.
        capability: instruction set torch's own kernels use.
        torch: version.
        threads: torch's intra-operation threads.
        revision: git revision, with "+changes" if the working tree differs; None outside a repository.
        load: load average of the last minute at the start; well above 0 means that someone else was on the cores.
    """

    cpu: str
    cores: int
    flags: tuple[str, ...]
    capability: str
    torch: str
    threads: int
    revision: str | None
    load: float | None

    @classmethod
    def current(cls) -> Machine:
        """Describe this machine now."""
        info = _cpu_info()
        flags = sorted(flag for flag in info.get("flags", "").split() if flag.startswith(FLAG_PREFIXES))
        return cls(
            cpu=info.get("model name") or platform.processor() or platform.machine(),
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
            flags=tuple(flags),
            capability=torch.backends.cpu.get_cpu_capability(),
            torch=torch.__version__,
            threads=torch.get_num_threads(),
            revision=_revision(),
            load=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """Two lines for a reader."""
        amx, avx512 = (any(flag.startswith(kind) for flag in self.flags) for kind in ("amx", "avx512f"))
        has = f"AVX-512 {_yes(avx512)}, AMX {_yes(amx)} ({self.capability})"
        load = "" if self.load is None else f", load {self.load} at the start"
        software = f"torch {self.torch}, {self.threads} threads, revision {self.revision or 'unknown'}"
        return f"{self.cpu}, {self.cores} cores, {has}\n{software}{load}"


def command_line(module: str) -> str:
    """The command that started this process, as it would be typed."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _revision() -> str | None:
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        return f"{revision}+changes" if _git("status", "--porcelain", "--untracked-files=no") else revision
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
