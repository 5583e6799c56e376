"""`poet-megatron doctor`: what is installed, and which implementation each POET op uses here and why.

With --distributed it looks at a whole allocation instead (cli/doctor_distributed.py).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from poet_megatron.cli import doctor_distributed
from poet_megatron.errors import UserError

DESCRIPTION = """\
Show versions, processor and compilers, and for every POET op whether CPU and CUDA tensors take the compiled implementation
("native") or the one written in torch operations ("reference"), with the reason.

Both give the same results up to rounding; the reference is slower. Nothing is changed, downloaded or compiled by this command.

With --distributed it checks an allocation before you train on it. Start it exactly as you will start pretrain, with as many ranks;
rank 0 prints one report. Every line is ok, warn, FAIL or skipped (with the reason), names the rank and the node that are to blame, and
says what to do:

  roll call      which ranks did not come, before anything else can hang
  gpus           each rank has one of its own, all alike
  versions       packages, code, driver and NCCL_* variables are the same on all ranks
  cpu cores, host memory
  clocks, gpu memory
                 clocks under load, throttling, temperature, uncorrectable memory errors
  time           clocks of the nodes
  folder, visibility, file speed, file lock, free space
                 the file system that runs write to, seen from all nodes
  connect, sums, all ranks, inside nodes, node pairs
                 all-reduces give the exact sum, and how fast they are; slow pairs of nodes by name

It exits with 0 if no line is FAIL, with 1 otherwise. A step that hangs is given up after --timeout seconds. docs/health.md explains
every line.
"""

EXAMPLES = """\
examples:
  poet-megatron doctor
      the report; the last lines say what to do about what is missing
  POET_NATIVE=0 poet-megatron doctor
      what a run with the reference alone would use
  POET_CPU_ISA=avx2 poet-megatron doctor
      the CPU kernels of a lesser processor: portable, avx2, avx512 or amx
  poet-megatron doctor --json > doctor.json
      for a script, or to attach to a bug report
  torchrun --nproc-per-node 8 -m poet_megatron doctor --distributed --folder runs
      this node, with a rank for each of its 8 GPUs; runs is where train.run_dir will be
  sbatch --nodes=2 --time=0:15:00 launch/slurm/doctor.sbatch --folder /scratch/me/runs
      two nodes of a Slurm cluster, from the clone; the report is in poet-doctor-JOB.log
  srun --nodes=2 --ntasks-per-node=8 bash launch/slurm/rank.sh python -m poet_megatron doctor --distributed
      the same by hand, inside sbatch or salloc: rank.sh makes RANK, WORLD_SIZE and LOCAL_RANK of Slurm's variables; export MASTER_ADDR
      (the first node) and MASTER_PORT (any free port) before

docs/install.md explains how the compiled parts are built.
"""

PACKAGES = ("torch", "megatron-core", "numpy", "transformers", "deepspeed", "pybind11")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the `doctor` command."""
    parser = subparsers.add_parser(
        "doctor",
        help="what is installed, and which implementation each op uses",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--distributed", action="store_true", help="check all ranks and nodes of this launch")
    parser.add_argument(
        "--folder",
        metavar="DIR",
        help="with --distributed: where runs are written, the parent of train.run_dir (default: the current folder)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=doctor_distributed.DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help="with --distributed: how long to wait for a rank, a collective or the file system (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the report and return the exit code."""
    if args.distributed:
        if not 0 < args.timeout < math.inf:
            raise UserError(f"--timeout is {args.timeout:g}; it must be a positive number of seconds")
        return doctor_distributed.run(args)
    if args.folder is not None:
        raise UserError("--folder goes with --distributed: the plain report looks at no folder")
    report = examine()
    print(json.dumps(report, indent=2) if args.json else to_text(report))
    return 0


def examine() -> dict[str, Any]:
    """Everything that the report shows, as plain data."""
    import torch

    from poet_megatron import __version__
    from poet_megatron.ops import native

    host = native.host_module()
    devices = {device: native.load(device) for device in native.LIBRARIES}
    return {
        "poet_megatron": __version__,
        "installed_in": str(native.FOLDER),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu": {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "isa": native.cpu_isa(),
            "features": host.cpu_features() if host is not None else None,
        },
        "environment": {name: os.environ[name] for name in ("POET_NATIVE", "POET_CPU_ISA", "OMP_NUM_THREADS") if name in os.environ},
        "compiler": _tool([os.environ.get("CXX", ""), "c++", "g++", "clang++"]),
        "nvcc": _tool([os.environ.get("NVCC", ""), "nvcc", str(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc")]),
        "build": host.build_info() if host is not None else None,
        "devices": {name: {"available": status.available, "why": status.why, "fix": status.fix} for name, status in devices.items()},
        "ops": [{"op": found.op, "cpu": found.cpu, "cuda": found.cuda} for found in native.explain()],
    }


def to_text(report: dict[str, Any]) -> str:
    """The report for a reader."""
    packages = ", ".join(f"{name} {version}" for name, version in report["packages"].items() if version)
    cpu, build = report["cpu"], report["build"]
    present = ", ".join(name for name, there in (cpu["features"] or {}).items() if there) or "unknown features"
    torch_for = f"CUDA {report['torch_cuda']}" if report["torch_cuda"] else "CPUs"
    facts = {
        "version": f"{report['poet_megatron']} in {report['installed_in']}",
        "python": report["python"],
        "packages": packages,
        "cpu": f"{cpu['machine']}, {cpu['threads']} threads, kernels for {cpu['isa'] or 'none'}; has {present}",
        "gpu": ", ".join(report["gpus"]) or f"none (torch is built for {torch_for})",
        "compiler": report["compiler"] or "none",
        "nvcc": report["nvcc"] or "none",
        "built with": _build_line(build) if build else "nothing was compiled",
        "environment": " ".join(f"{name}={value}" for name, value in report["environment"].items()) or "no settings",
    }
    width = max(len(row["op"]) for row in report["ops"])
    lines = [f"{name:<12} {fact}" for name, fact in facts.items()]
    lines += ["", f"{'op':<{width}}  {'cpu':<10} cuda"]
    lines += [f"{row['op']:<{width}}  {row['cpu']:<10} {row['cuda']}" for row in report["ops"]]
    lines += ["", *(f"{name:<5} {status['why']}" for name, status in report["devices"].items())]
    lines += [
        f"to have the compiled ops for {name} tensors: {status['fix']}" for name, status in report["devices"].items() if status["fix"]
    ]
    return "\n".join(lines)


def _build_line(build: dict[str, Any]) -> str:
    cuda = build["cuda_build"]
    gpu = f"; nvcc {cuda['nvcc']} for {', '.join(cuda['archs'])}" if cuda else ""
    return f"{build['compiler']}, torch {build['torch'] or 'headers missing'}, {build['flags']}{gpu}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tool(candidates: list[str]) -> str | None:
    """Path and version of the first command that runs; None without one."""
    for candidate in candidates:
        words = shlex.split(candidate)
        path = shutil.which(words[0]) if words else None
        if path is None:
            continue
        try:
            done = subprocess.run([path, *words[1:], "--version"], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        if done.returncode == 0 and lines:
            return f"{next((line for line in lines if 'release' in line), lines[0])} ({path})"
    return None
