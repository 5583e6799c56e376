"""The site's settings (launch/slurm/site.sh): the variables that it exports, as the login node's shell sees them."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

from poet_megatron.errors import UserError

TIMEOUT_SECONDS = 60


def site_environment(site: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` as `site` leaves it when bash sources it."""
    if not site.is_file():
        raise UserError(f"POET_SITE is {site}, which does not exist: name a copy of launch/slurm/site.sh, or unset it")
    try:
        done = subprocess.run(
            ["bash", "-c", '. "$1" >&2 && env -0', "bash", str(site)],
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{site} did not end in {TIMEOUT_SECONDS} s: let it set variables only, and put the rest into site_setup"
        ) from error
    if done.returncode:
        raise UserError(f"{site} cannot be sourced: {done.stderr.strip() or f'status {done.returncode}'}; check it with bash -n {site}")
    return dict(word.split("=", 1) for word in done.stdout.split("\0") if "=" in word)
