"""Settings of a build, all from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

LOWEST_TORCH = (2, 13)
"""The compiled ops use parts of torch's stable ABI that this version brought (the native handle of a stream)."""

DEFAULT_ARCHS = "80;90;100"
CHOICES = ("0", "1", "auto")


class SettingError(ValueError):
    """An environment variable with a value that means nothing, or that cannot be met; the message names it and the fix."""


@dataclass(frozen=True)
class BuildSettings:
    """What to build.

    Attributes:
        native: POET_NATIVE; "0" compiles nothing, "1" makes a failure to compile an error, "auto" goes on without.
        cuda: POET_CUDA; the same for the CUDA kernels, where "auto" also asks for a torch with CUDA.
        archs: POET_CUDA_ARCHS; compute capabilities such as "80" or "90a". The last one is kept as PTX too.
        jobs: MAX_JOBS, or the processors of this process.
    """

    native: str = "auto"
    cuda: str = "auto"
    archs: tuple[str, ...] = tuple(DEFAULT_ARCHS.split(";"))
    jobs: int = 1

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> BuildSettings:
        """Read POET_NATIVE, POET_CUDA, POET_CUDA_ARCHS and MAX_JOBS.

        Raises:
            SettingError: one of them means nothing.
        """
        return cls(
            native=_choice(environ, "POET_NATIVE"),
            cuda=_choice(environ, "POET_CUDA"),
            archs=parse_archs(environ.get("POET_CUDA_ARCHS") or DEFAULT_ARCHS),
            jobs=_jobs(environ),
        )

    @property
    def gencode(self) -> list[str]:
        """Options of nvcc: machine code for each of `archs`, PTX of the last for GPUs to come."""
        kinds = [(arch, f"sm_{arch}") for arch in self.archs] + [(self.archs[-1], f"compute_{self.archs[-1]}")]
        return [word for arch, code in kinds for word in ("-gencode", f"arch=compute_{arch},code={code}")]


def parse_archs(text: str) -> tuple[str, ...]:
    """("80", "90a") of "80;90a", "8.0, 9.0a" or "sm_80 sm_90a".

    Raises:
        SettingError: a word is not a compute capability, or there is none.
    """
    words = [word.removeprefix("sm_") for word in re.split(r"[;,\s]+", text) if word]
    archs = tuple(dict.fromkeys(re.sub(r"^(\d+)\.(\d)", r"\1\2", word) for word in words))
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80]
    if wrong or not archs:
        wrong_word = wrong[0] if wrong else "nothing"
        raise SettingError(f"POET_CUDA_ARCHS={text!r}: {wrong_word} is not a compute capability >= 80; give for example {DEFAULT_ARCHS!r}")
    return archs


def _choice(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name) or "auto"
    if value not in CHOICES:
        raise SettingError(f"{name}={value!r}: must be one of {', '.join(CHOICES)}")
    return value


def _jobs(environ: Mapping[str, str]) -> int:
    value = environ.get("MAX_JOBS")
    if not value:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdecimal() or int(value) < 1:
        raise SettingError(f"MAX_JOBS={value!r}: must be a whole number >= 1")
    return int(value)
