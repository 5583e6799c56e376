"""Pretraining as a Slurm job: the same numbers as by torchrun, whatever interrupts it."""

from __future__ import annotations

import pytest
from conftest import train_losses
from desk import Desk, torchrun

pytest_plugins = ("slurm_fixtures",)
pytestmark = pytest.mark.slurm

HELD = 12
"""The step in which interruptions come: after the merge of step 10, before that of step 20, and not where a checkpoint is due."""


def test_two_nodes_with_two_ranks_train_as_torchrun_does(desk: Desk):
    layout = {"parallel.tensor_parallel": "2", "train.steps": "12"}
    job = desk.launch(*desk.settings("job", **layout), nodes="2", gpus=2)["pretrain"]
    desk.wait_for_end("job", job, "COMPLETED")
    assert "4 rank(s) on cpu" in desk.log("job", job)
    torchrun(4, desk.settings("torchrun", **layout))
    expected = train_losses(desk.folder / "torchrun")
    assert len(expected) == 12 and train_losses(desk.folder / "job") == expected


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


def test_a_job_at_its_time_limit_saves_is_requeued_and_ends_with_the_same_losses(desk: Desk, two_ranks):
    desk.write_site(hold_at=HELD)
    job = desk.launch(*desk.settings("job"), nodes="2")["pretrain"]
    desk.wait_for_log("job", job, f"step {HELD - 1}/24")
    hours, minutes, seconds = map(int, desk.show(job)["RunTime"].split(":"))
    left = 60 * hours + minutes + 2 + (seconds > 0)  # less than the 180 s before its end at which the script wants to be told
    desk.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={left}")
    interrupted(desk, job, "USR1")
    continued(desk, job, two_ranks, TimeLimit="60")


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
