"""A pretraining job is interrupted in the middle of a step: it saves, and ends with the losses of a run that was not."""

from __future__ import annotations

import pytest
from conftest import train_losses
from desk import Desk

pytest_plugins = ("slurm_fixtures",)
pytestmark = pytest.mark.slurm

HELD = 12
"""The step in which interruptions come: after the merge of step 10, before that of step 20, and not where a checkpoint is due."""


def interrupted(desk: Desk, job: int, signal: str) -> None:
    """The job is asked to stop in the middle of a step."""
    desk.wait_for_log("job", job, f"SIG{signal}: ")
    desk.release()


def continued(desk: Desk, job: int, expected: dict[int, float], **changes: str) -> None:
    """The job saved the step that it was in, was requeued, and trains to the end as if nothing had happened."""
    desk.start_requeued(job, **changes)
    desk.wait_for_end("job", job, "COMPLETED")
    log = desk.log("job", job)
    assert f"step {HELD}: saved" in log and "status 75: saved" in log and f"continuing from step {HELD} of 24" in log
    assert "start 2," in log  # appended to the log of the first start
    assert desk.checkpoints("job")[-1] == 24
    assert train_losses(desk.folder / "job") == expected


def test_a_job_at_its_time_limit_saves_is_requeued_and_ends_with_the_same_losses(desk: Desk, request: pytest.FixtureRequest):
    desk.write_site(hold_at=HELD)
    job = desk.launch(*desk.settings("job"), "--sbatch-option=--signal=B:USR1@600", nodes="2")["pretrain"]
    desk.wait_for_log("job", job, f"step {HELD - 1}/24")
    hours, minutes, _ = map(int, desk.show(job)["RunTime"].split(":"))
    desk.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={60 * hours + minutes + 8}")  # less than 600 s are left
    expected = request.getfixturevalue("two_ranks")  # now, since Slurm looks at time limits twice a minute
    interrupted(desk, job, "USR1")
    continued(desk, job, expected, TimeLimit="60")


def test_a_preempted_job_saves_is_requeued_and_ends_with_the_same_losses(desk: Desk, two_ranks):
    desk.write_site(hold_at=HELD)
    job = desk.launch(*desk.settings("job"), "--partition", "low", gpus=2)["pretrain"]
    desk.wait_for_log("job", job, f"step {HELD - 1}/24")
    other = int(desk.cluster.run("sbatch", "--parsable", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=true"))
    interrupted(desk, job, "USR1")
    desk.wait(lambda: desk.show(other)["JobState"] == "COMPLETED", "the other job has the node")
    continued(desk, job, two_ranks)


def test_a_cancelled_job_saves_and_is_not_requeued(desk: Desk):
    desk.write_site(hold_at=3)
    job = desk.launch(*desk.settings("job"))["pretrain"]
    desk.wait_for_log("job", job, "step  2/24")
    assert f"has jobs already: {job} (RUNNING)" in desk.poet(
        "launch", "--nodes=1", "--time=5", "--gpus-per-node=1", *desk.settings("job"), status=2
    )
    desk.cluster.run("scancel", str(job))
    interrupted(desk, job, "TERM")
    desk.wait(lambda: "not requeued" in desk.log("job", job), "the end of the script", lambda: desk.log("job", job))
    desk.wait_for_end("job", job, "CANCELLED")
    assert desk.show(job)["Restarts"] == "0"
    assert "status 75: saved" in desk.log("job", job) and "requeued: Slurm starts" not in desk.log("job", job)
    assert desk.checkpoints("job") == [3]
