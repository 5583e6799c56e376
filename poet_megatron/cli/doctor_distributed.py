"""`poet-megatron doctor --distributed`: what the launcher said, as read from the environment, and the report."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from poet_megatron.errors import UserError

if TYPE_CHECKING:
    from poet_megatron.health.report import Report
    from poet_megatron.health.roster import Launch

PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "FI_")
NAMES = (
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_LAUNCH_BLOCKING",
    "CUBLAS_WORKSPACE_CONFIG",
    "NVIDIA_TF32_OVERRIDE",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "OMP_NUM_THREADS",
    "POET_NATIVE",
    "POET_CPU_ISA",
)
"""Variables that change what a run computes or how it communicates, besides those with one of PREFIXES."""
GRANTS = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE")
NO_GPUS = ("", "-1", "0x0", "NoDevFiles", "none", "void")
DEFAULT_TIMEOUT = 60.0


def run(args: argparse.Namespace) -> int:
    """Check the allocation; rank 0 prints. Returns 0 without a FAIL, else 1."""
    launch = launch_of(os.environ)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded: its warnings of slow sockets repeat ours
    from poet_megatron.health.examine import Options, end_now, examine

    options = Options(Path(args.folder or ".").absolute(), args.timeout, relevant(os.environ), granted(os.environ))

    def show(report: Report) -> None:
        from poet_megatron.health.report import to_json, to_text

        stream = sys.stderr if launch.rank else sys.stdout
        print(to_json(report) if args.json and not launch.rank else to_text(report), file=stream, flush=True)

    verdict = examine(launch, options, show)
    if verdict.stuck:
        end_now(verdict.exit_status)
    return verdict.exit_status


def launch_of(environ: Mapping[str, str]) -> Launch:
    """Where this process stands, by the variables that pretrain uses as well; a world of one without a launcher.

    Raises:
        UserError: variables are missing or make no sense.
    """
    from poet_megatron.health.roster import Launch, expand_hostlist

    node = environ.get("SLURMD_NODENAME") or socket.gethostname()
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        tasks = _number(environ, "SLURM_STEP_NUM_TASKS", 1, 1)
        if tasks > 1:
            raise UserError(
                f"srun started {tasks} tasks, but RANK and WORLD_SIZE are not set: start them through launch/slurm/rank.sh, as in "
                "`srun bash launch/slurm/rank.sh python -m poet_megatron doctor --distributed`, or with launch/slurm/doctor.sbatch"
            )
        return Launch(0, 1, 0, node)
    size = _number(environ, "WORLD_SIZE", None, 1)
    rank = _number(environ, "RANK", None, 0)
    if rank >= size:
        raise UserError(f"RANK is {rank} in a world of WORLD_SIZE={size}; ranks count from 0 to {size - 1}")
    return Launch(
        rank,
        size,
        _number(environ, "LOCAL_RANK", 0, 0),
        node,
        _needed(environ, "MASTER_ADDR"),
        _number(environ, "MASTER_PORT", None, 1),
        environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        _number(environ, "LOCAL_WORLD_SIZE", _number(environ, "SLURM_NTASKS_PER_NODE", 0, 0), 0),
        expand_hostlist(environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or ""),
    )


def relevant(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter to a run."""
    return {name: value for name, value in sorted(environ.items()) if name in NAMES or name.startswith(PREFIXES)}


def granted(environ: Mapping[str, str]) -> str:
    """The variable that says that there are GPUs, such as "CUDA_VISIBLE_DEVICES=0,1"; "" if none does."""
    return next((f"{name}={environ[name]}" for name in GRANTS if environ.get(name, "") not in NO_GPUS), "")


def _needed(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name, "")
    if not value:
        raise UserError(f"{name} is not set, but RANK and WORLD_SIZE are: torchrun and launch/slurm/rank.sh set all of them")
    return value


def _number(environ: Mapping[str, str], name: str, default: int | None, least: int) -> int:
    text = environ.get(name, "")
    if not text and default is not None:
        return default
    value = _needed(environ, name)
    if not value.isdigit() or int(value) < least:
        raise UserError(f"{name} is {value!r}; it must be a number, at least {least}")
    return int(value)
