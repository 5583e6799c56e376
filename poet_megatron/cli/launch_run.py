"""What `poet-megatron launch` does: check, print, submit."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from poet_megatron.cli.launch_checks import all_checks, sbatch_checks
from poet_megatron.cli.launch_request import absolute, make_request, variants
from poet_megatron.cli.recipe import load_recipe
from poet_megatron.config.dump import to_yaml
from poet_megatron.errors import UserError
from poet_megatron.launch.check import find_root, run_checks
from poet_megatron.launch.jobs import SCRIPTS, Job, Request, log_path, plan_jobs, shell_line
from poet_megatron.launch.record import RECIPE, write_jobs, write_snapshot
from poet_megatron.launch.site import site_environment
from poet_megatron.launch.slurm import Slurm
from poet_megatron.launch.sweep import points_text

PACKAGE = Path(__file__).resolve().parents[1]


def launch(args: argparse.Namespace) -> int:
    """Check, print, and submit unless it is a dry run; returns the exit status."""
    root = find_root(args.scripts, PACKAGE)
    site = Path(os.environ.get("POET_SITE") or root / SCRIPTS / "site.sh").resolve()
    environment = site_environment(site, os.environ)
    slurm = Slurm({**environment, "POET_SITE": str(site)}, root)
    if not slurm.available and not args.dry_run:
        raise UserError("sbatch is not installed here: run this on a login node of the cluster, or add --dry-run to see what it would do")
    run = absolute(load_recipe(args))
    request = make_request(args, run, root, environment)
    jobs = plan_jobs(request)
    findings = run_checks(all_checks(request, variants(args, run, request), slurm, args.partition or environment.get("SBATCH_PARTITION")))
    if slurm.available and not any(finding.refused for finding in findings):
        findings += run_checks(sbatch_checks(jobs, slurm))
    print("\n".join(finding.line() for finding in findings), flush=True)
    refused = [finding.text for finding in findings if finding.refused]
    if refused:
        others = f" (and {len(refused) - 1} more, above)" if len(refused) > 1 else ""
        raise UserError(f"nothing was submitted: {refused[0]}{others}")
    if args.dry_run:
        print(_commands(request, jobs, site, slurm.available))
        return 0
    write_snapshot(request.folder, to_yaml(run), points_text(request.points), sys.argv, root)
    print(_submitted(request, jobs, _submit(request, jobs, slurm)))
    return 0


def _submit(request: Request, jobs: list[Job], slurm: Slurm) -> dict[str, int]:
    """Submit all jobs or none."""
    numbers: dict[str, int] = {}
    try:
        for job in jobs:
            numbers[job.name] = slurm.submit(job.words(numbers))
    except UserError:
        if numbers:
            slurm.cancel(numbers.values())
        raise
    write_jobs(request.folder, numbers)
    return numbers


def _commands(request: Request, jobs: list[Job], site: Path, tested: bool) -> str:
    """What would be done, as lines for the shell."""
    return "\n".join(
        [
            "",
            f"# dry run: nothing was submitted{'' if tested else '; sbatch is not here, so the cluster was not asked'}. It would be",
            f"# 1. the resolved recipe, to {request.folder / RECIPE} (poet-megatron pretrain --print-config shows it)",
            "# 2. the jobs:",
            f"export POET_SITE={site} && . $POET_SITE && cd {request.root}",
            *(shell_line(job) for job in jobs),
        ]
    )


def _submitted(request: Request, jobs: list[Job], numbers: dict[str, int]) -> str:
    """What there is now, and how to go on."""
    everything = " ".join(map(str, numbers.values()))
    lines = ["", f"submitted; recipe and job numbers are in {request.folder}"]
    for job in jobs:
        waits = f", after {' and '.join(job.after)}" if job.after else ""
        lines.append(f"  {job.name:<14} job {numbers[job.name]}{waits}; log {log_path(job, request, numbers[job.name])}")
    lines += [
        f"watch     squeue --jobs {everything.replace(' ', ',')}",
        f"stop      scancel {everything}   (training saves first and is not requeued)",
        "continue  the same command, once these jobs have ended: training goes on from its newest checkpoint",
    ]
    return "\n".join(lines)
