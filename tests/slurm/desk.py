"""What a test does on the virtual cluster: launch, look at jobs and logs, wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from cluster import Cluster
from conftest import TINY

from poet_megatron.checkpoint.store import CheckpointStore

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 240.0
"""For anything to happen: a loaded machine imports torch several times."""
POLL_SECONDS = 0.25
CREDENTIAL_SECONDS = 2.0
"""A node refuses a job whose credential was made in the second in which it killed the start before."""
SETTINGS = {
    **TINY,
    "train.steps": "24",
    "train.eval_tokens": "64",
    "poet.merge_interval": "10",
    "checkpoint.interval": "5",
    "optim.eps": "1e-5",  # updates that do not depend on the sign of a rounding error (tests/parallel/cases_checkpoints.py)
}
TOLERANCE = 2e-6
"""Of losses on another number of ranks: fp32 sums in another order (tests/parallel/test_kill.py)."""


class Desk:
    """A user of the cluster, with a site file, a release file for held steps and a folder for runs."""

    def __init__(self, cluster: Cluster, folder: Path, data: Path) -> None:
        self.cluster, self.folder, self.data = cluster, folder, data
        self.release_file = folder / "release"
        self.site = folder / "site.sh"
        self.write_site()

    def write_site(self, hold_at: int | None = None) -> None:
        """Write the site file; with `hold_at`, training waits in that step until `release` is called."""
        words = (
            [sys.executable]
            if hold_at is None
            else [sys.executable, str(ROOT / "tests/slurm/hold.py"), str(hold_at), str(self.release_file)]
        )
        self.site.write_text(f"POET_PYTHON=({' '.join(words)})\nexport OMP_NUM_THREADS=1 PYTHONPATH={ROOT} PYTHONWARNINGS=ignore\n")

    def release(self) -> None:
        """Let held steps go on."""
        self.release_file.touch()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the user's commands."""
        return {**self.cluster.environment, "POET_SITE": str(self.site), "OMP_NUM_THREADS": "1"}

    def settings(self, name: str, **changes: str) -> list[str]:
        """Words for the settings of a run below the folder."""
        values = {**SETTINGS, "data.path": str(self.data), "train.run_dir": str(self.folder / name), **changes}
        return [f"--{key}={value}" for key, value in values.items()]

    def poet(self, *words: str, status: int = 0) -> str:
        """Output of a `poet-megatron` command on the login node."""
        command = [sys.executable, "-m", "poet_megatron", *words]
        done = subprocess.run(command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == status, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def launch(self, *words: str, nodes: str = "1", gpus: int = 1, time: str = "1:00:00") -> dict[str, int]:
        """Numbers of the jobs that `poet-megatron launch` submits, by name."""
        said = self.poet("launch", "--nodes", nodes, "--gpus-per-node", str(gpus), "--time", time, *words)
        return {name: int(number) for name, number in re.findall(r"^  (\S+) +job (\d+)", said, re.MULTILINE)}

    def log(self, name: str, job: int, number: int = 1, kind: str = "pretrain") -> str:
        """What a job of run `name` has written."""
        found = sorted((self.folder / name / "launch" / str(number)).glob(f"{kind}-{job}*.log"))
        return "".join(path.read_text() for path in found)

    def show(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job."""
        text = self.cluster.run("scontrol", "--oneliner", "show", "job", str(job)).splitlines()[0]
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, happened: Callable[[], object], what: str, log: Callable[[], str] = str) -> None:
        """Poll until something has happened."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not happened():
            if time.monotonic() > deadline:
                pytest.fail(f"{what}: not in {DEADLINE_SECONDS} s\n{self.cluster.run('squeue', '-l', check=False)}\n{log()[-4000:]}")
            time.sleep(POLL_SECONDS)

    def wait_for_log(self, name: str, job: int, text: str) -> None:
        """Poll until the log of a job has a text, which fails when the job ends without it."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

        def there() -> bool:
            over = self.show(job)["JobState"] in ended
            found = text in self.log(name, job)
            assert found or not over, f"job {job} ended without {text!r}:\n{self.log(name, job)}"
            return found

        self.wait(there, f"{text!r} in the log of job {job}", lambda: self.log(name, job))

    def wait_for_end(self, name: str, job: int, state: str, kind: str = "pretrain") -> None:
        """Poll until a job is in a final state, which must be this one."""
        running = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "PREEMPTED", "REQUEUED")
        self.wait(lambda: self.show(job)["JobState"] not in running, f"end of job {job}", lambda: self.log(name, job, kind=kind))
        logs = sorted((self.folder / name / "launch").glob("*/*.log"))
        assert self.show(job)["JobState"] == state, "\n".join(path.read_text() for path in logs)

    def start_requeued(self, job: int, **changes: str) -> None:
        """Wait until a job is requeued, and let it start now instead of in two minutes."""
        self.wait(lambda: self.show(job)["Restarts"] == "1" and self.show(job)["JobState"] == "PENDING", f"job {job} is requeued")
        time.sleep(CREDENTIAL_SECONDS)
        words = [f"{key}={value}" for key, value in {**changes, "StartTime": "now"}.items()]
        self.cluster.run("scontrol", "update", f"JobId={job}", *words)

    def checkpoints(self, name: str) -> list[int]:
        """Steps of a run's checkpoints, all of which must be intact."""
        store = CheckpointStore(self.folder / name / "checkpoints")
        assert [step for step in store.steps() if store.damage(step)] == []
        return store.steps()


def torchrun(ranks: int, settings: list[str]) -> None:
    """Train the ordinary way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "poet_megatron"]
    done = subprocess.run([*command, "pretrain", *settings], env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
