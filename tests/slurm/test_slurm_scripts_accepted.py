"""Every job script is clean and accepted by Slurm; what Slurm could not do is refused before it is asked."""

from __future__ import annotations

import subprocess

import pytest
from desk import ROOT, Desk

pytest_plugins = ("slurm_fixtures",)
pytestmark = pytest.mark.slurm

SCRIPTS = sorted((ROOT / "launch").rglob("*.s*"))


def test_shellcheck_has_nothing_to_say():
    done = subprocess.run(["shellcheck", "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert len(SCRIPTS) >= 13


@pytest.mark.parametrize("name", sorted(path.name for path in SCRIPTS if path.suffix == ".sbatch"))
def test_a_script_is_accepted_on_two_nodes_with_eight_gpus(name: str, desk: Desk):
    words = ["sbatch", "--test-only", "--nodes=2", "--ntasks=2", "--gpus-per-node=8", "--time=1-00:00:00", f"launch/slurm/{name}"]
    done = subprocess.run(words, env=desk.environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " to start at " in done.stderr, done.stderr
    assert "gpu[0-1]" in done.stderr


def test_nine_nodes_of_eight_are_refused_by_us(desk: Desk):
    words = ("--nodes=9", "--time=1:00:00", *desk.settings("run", **{"train.global_batch_size": "144"}))
    said = desk.poet("launch", *words, status=2)
    assert said.splitlines()[-1] == (
        "error: nothing was submitted: --nodes is 9; partition batch has 8 nodes with 8 GPUs: ask for at most 8, or name another "
        "partition with --partition"
    )
    assert "ok      sbatch" not in said and not (desk.folder / "run").exists()


def test_eight_nodes_of_eight_are_accepted_by_both(desk: Desk):
    words = ("--nodes=8", "--time=1:00:00", "--dry-run", *desk.settings("run", **{"train.global_batch_size": "128"}))
    said = desk.poet("launch", *words)
    assert "ok      cluster   partition batch: 8 nodes with 8 GPUs, 8 of them usable now; time limit 2-00:00:00" in said
    assert "on nodes gpu[0-7] in partition batch" in said


def test_time_beyond_the_limit_of_the_partition(desk: Desk):
    said = desk.poet("launch", "--nodes=1", "--gpus-per-node=1", "--time=3-0", *desk.settings("run"), status=2)
    assert "--time is 3-0; partition batch allows 2-00:00:00: ask for less" in said
