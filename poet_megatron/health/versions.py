"""What is installed and set, the same on all ranks or not."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from poet_megatron import __version__
from poet_megatron.health.outcomes import nodes_of
from poet_megatron.health.report import FAIL, OK, WARN, Finding
from poet_megatron.health.roster import Roster
from poet_megatron.monitor.run_dir import git_revision
from poet_megatron.ops import native

CHECK = "versions"
PACKAGES = ("torch", "megatron-core", "deepspeed", "transformer-engine", "apex", "numpy")
PACKAGE_FOLDER = Path(__file__).resolve().parent.parent
DRIVER_FILE = Path("/proc/driver/nvidia/version")
VARIABLE = "$"
"""First character of the rows that are environment variables."""
MAY_DIFFER = ("driver", "kernel", "cpu instruction set", "numpy")
"""Rows whose differences slow a run down or make it hard to compare, but do not break it."""
SHOWN = ("python", "torch", "megatron-core", "poet-megatron", "git revision", "CUDA", "NCCL", "driver", "deepspeed")


def read(environment: Mapping[str, str]) -> dict[str, str]:
    """Rows of this rank: name and value, "none" for what is not there.

    Args:
        environment: the variables that matter to a run, as cli/ chose them.
    """
    revision, dirty = git_revision(PACKAGE_FOLDER)
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "poet-megatron": __version__,
        "git revision": f"{revision[:12]}{' with changes' if dirty else ''}" if revision else "none",
        "source code": _digest(PACKAGE_FOLDER),
        "CUDA": torch.version.cuda or "none",
        "NCCL": _nccl(),
        "driver": driver_version(DRIVER_FILE),
        "kernel": platform.release(),
        "compiled ops": _compiled_ops(),
        "cpu instruction set": native.cpu_isa() or "none",
        **{f"{VARIABLE}{name}": value for name, value in sorted(environment.items())},
    }


def driver_version(path: Path) -> str:
    """Version in /proc/driver/nvidia/version, "none" without one."""
    try:
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", path.read_text())
    except OSError:
        return "none"
    return found[1] if found else "unknown"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _nccl() -> str:
    if not torch.cuda.is_available():
        return "none"
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def _compiled_ops() -> str:
    """Such as "cpu native, cuda reference"; ops that differ from the rest are named."""
    explained = native.explain()
    usual = Counter((found.cpu, found.cuda) for found in explained).most_common(1)[0][0]
    others = [f"{found.op}: {found.cpu}/{found.cuda}" for found in explained if (found.cpu, found.cuda) != usual]
    return ", ".join([f"cpu {usual[0]}", f"cuda {usual[1]}", *others])


def _digest(folder: Path) -> str:
    """Of all Python files of the package: equal code, however it came there."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def judge(rows: Sequence[Mapping[str, str]], roster: Roster) -> list[Finding]:
    """One line per row that differs, naming those that differ from most; one line of versions if none does."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = [finding for name in names for finding in _differing(name, [row.get(name, "not set") for row in rows], roster)]
    if any(finding.status == FAIL for finding in found):
        return found
    shown = ", ".join(f"{name} {rows[0][name]}" for name in SHOWN if rows[0].get(name, "none") != "none")
    same = "the same on all ranks" if len(rows) > 1 else "one rank, nothing to compare"
    return [Finding(CHECK, OK, f"{shown}: {same}"), *found]


def _differing(name: str, values: Sequence[str], roster: Roster) -> list[Finding]:
    holders: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        holders.setdefault(value, []).append(rank)
    if len(holders) == 1:
        return []
    usual = max(holders, key=lambda value: (len(holders[value]), -holders[value][0]))  # in a tie, rank 0's
    odd = [rank for value, ranks in holders.items() if value != usual for rank in ranks]
    texts = "; ".join(f"{value} on {roster.name(ranks)}" for value, ranks in holders.items() if value != usual)
    variable = name.startswith(VARIABLE)
    status = WARN if variable or name in MAY_DIFFER else FAIL
    what = f"{name.removeprefix(VARIABLE)}: {texts}; {usual} elsewhere"
    return [Finding(CHECK, status, what, _fix(variable, status), tuple(sorted(odd)), nodes_of(sorted(odd), roster))]


def _fix(variable: bool, status: str) -> str:
    if variable:
        return "set it where all ranks get it: in the site file of launch/slurm, or with srun --export=ALL"
    if status == WARN:
        return "a run works, but its speed or its last digits may differ between these nodes"
    return "all ranks must run the same: use one environment on a file system that all nodes share, or the same container"
