"""A node dies under a job: it goes on with the nodes that are left where it may, and ends with a clear word where it may not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from conftest import train_losses
from desk import TOLERANCE, Desk

pytest_plugins = ("slurm_fixtures",)
pytestmark = pytest.mark.slurm

HELD = 12
DEAD, ALIVE = "gpu5", "gpu4"


@pytest.fixture(autouse=True)
def repaired(desk: Desk) -> Iterator[None]:
    """The node is back for the next test."""
    yield
    repair(desk)


def repair(desk: Desk) -> None:
    if "down" in desk.cluster.run("sinfo", "-h", "-n", DEAD, "-o", "%T"):
        desk.cluster.start_node(DEAD)
        desk.wait(lambda: "idle" in desk.cluster.run("sinfo", "-h", "-n", DEAD, "-p", "pair", "-o", "%T"), f"{DEAD} is back")


def run_until_a_node_dies(desk: Desk, nodes: str) -> int:
    """A job on both nodes of the partition, with checkpoints of steps 5 and 10, loses one in step 12."""
    desk.write_site(hold_at=HELD)
    job = desk.launch(*desk.settings("job"), "--partition", "pair", nodes=nodes)["pretrain"]
    desk.wait_for_log("job", job, f"step {HELD - 1}/24")
    assert desk.show(job)["NodeList"] == "gpu[4-5]"
    assert desk.cluster.kill_node(DEAD) == 1
    desk.wait(
        lambda: f"no longer usable: {DEAD}" in desk.log("job", job),
        "the other rank, which waits for ever, is ended",
        lambda: desk.log("job", job),
    )
    desk.release()
    return job


def test_a_job_for_one_or_two_nodes_goes_on_with_the_one_that_is_left(desk: Desk, two_ranks):
    job = run_until_a_node_dies(desk, "1-2")
    desk.start_requeued(job)
    desk.wait_for_end("job", job, "COMPLETED")
    log = desk.log("job", job)
    assert f"no longer usable: {DEAD} (down" in log
    assert f"start 2, on 1 node(s): {ALIVE}" in log and "continuing from step 10 of 24" in log
    assert train_losses(desk.folder / "job") == pytest.approx(two_ranks, rel=TOLERANCE)


def test_a_job_that_needs_two_nodes_ends_and_says_how_to_go_on(desk: Desk, two_ranks):
    job = run_until_a_node_dies(desk, "2")
    desk.wait_for_end("job", job, "FAILED")
    log = desk.log("job", job)
    assert f"no longer usable: {DEAD} (down" in log
    assert "partition pair has 1 usable node(s) and this job needs 2: not requeued" in log
    assert f"the same command continues from {desk.folder}/job/checkpoints/step-00000010" in log
    repair(desk)
    job = desk.launch(*desk.settings("job"), "--partition", "pair", nodes="2")["pretrain"]
    desk.wait_for_end("job", job, "COMPLETED")
    assert "continuing from step 10 of 24" in desk.log("job", job, number=2)
    assert train_losses(desk.folder / "job") == two_ranks
