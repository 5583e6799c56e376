"""Fixtures of the Slurm tests: one cluster for all of them, and what a test does with it.

A plugin of each test module, not a conftest: other tests import from the one conftest that there is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, missing_programs, running_cluster
from conftest import train_losses
from desk import DEADLINE_SECONDS, SETTINGS, Desk, torchrun

INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge shellcheck"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster."""
    if missing := missing_programs():
        pytest.fail(f"Slurm is not installed ({', '.join(missing)} missing): {INSTALL}")
    if os.getuid():
        pytest.fail("the virtual cluster needs root (devices, names in /etc/hosts)")
    with running_cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path, tiny_data: Path) -> Iterator[Desk]:
    """A user of the cluster; what is left of the jobs is killed at the end."""
    yield Desk(cluster, tmp_path, tiny_data)
    cluster.kill_jobs()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while cluster.run("squeue", "--noheader", check=False).strip() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.fixture(scope="session")
def two_ranks(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the uninterrupted run on two ranks, by torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    values = {**SETTINGS, "data.path": str(tiny_data), "train.run_dir": str(folder / "run")}
    torchrun(2, [f"--{key}={value}" for key, value in values.items()])
    return train_losses(folder / "run")
