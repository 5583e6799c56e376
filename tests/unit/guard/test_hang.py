"""Whom a hang is blamed on, and the watchdog of a process that cannot help itself."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest

from poet_megatron.errors import EXIT_HANG
from poet_megatron.guard import watchdog
from poet_megatron.guard.hang import WAITING, RankReport, blame, place_of
from poet_megatron.guard.watchdog import Watchdog


def report(rank: int, waiting: bool = True, **collectives: int) -> RankReport:
    groups = {name.replace("_", ","): count for name, count in collectives.items()}
    return RankReport(rank, f"n{rank}", 100 + rank, "step 7", 31.4, waiting, f"f.py:{rank} in g", groups)


def test_a_rank_without_a_report_is_to_blame():
    assert blame([report(0), report(2)], 4) == "ranks 1, 3 did not answer: gone, or stuck outside of Python"


def test_the_rank_that_others_wait_for_in_a_collective():
    """Ranks 0 and 1 share layers, and so do 2 and 3; 0 and 2 share weights, and so do 1 and 3. Rank 3 hangs: 2 waits for it within a layer,
    and is missed by 0 at the end of the step."""
    reports = [
        report(0, g0_1=50, g0_2=8),
        report(1, g0_1=50, g1_3=8),
        report(2, g2_3=44, g0_2=7),
        report(3, waiting=False, g2_3=43, g1_3=7),
    ]
    expected = "rank 3 (n3, pid 103) has been in step 7 for 31 s, at f.py:3 in g, and others wait for it in a collective"
    assert blame(reports, 4) == expected
    assert blame([report(3, g2_3=43, g1_3=7), *reports[:3]], 4) == expected  # even if it seems to wait, for a GPU for example


def test_the_stage_that_holds_up_its_replica():
    """Two stages of two replicas: rank 2 hangs, rank 0 before it waits for its message, and the other replica for both at the end."""
    reports = [report(0, g0_1=7), report(1, g0_1=8), report(2, waiting=False, g2_3=7), report(3, g2_3=8)]
    assert blame(reports, 4).startswith("rank 2 (n2, pid 102) has been in step 7") and "rank 0" not in blame(reports, 4)


def test_the_rank_that_does_not_wait():
    """Of pipeline stages, which send each other messages and share no collective."""
    assert blame([report(0, g=5), report(1, waiting=False, g=5)], 2) == (
        "rank 1 (n1, pid 101) has been in step 7 for 31 s, at f.py:1 in g while the others wait"
    )


@pytest.mark.parametrize("waiting", [True, False])
def test_nobody_stands_out(waiting: bool):
    assert blame([report(0, waiting, g=5), report(1, waiting, g=5)], 2).startswith(
        "no rank is behind the others or does something else than wait"
    )


def test_a_world_of_one():
    assert blame([report(0, waiting=False)], 1) == "rank 0 (n0, pid 100) has been in step 7 for 31 s, at f.py:0 in g"


def test_places():
    entered, leave = threading.Event(), threading.Event()

    def waits() -> None:
        entered.set()
        leave.wait(30)

    def works() -> None:
        entered.set()
        while not leave.is_set():
            time.sleep(0.001)

    for function, expected in ((waits, True), (works, False)):
        entered.clear()
        leave.clear()
        thread = threading.Thread(target=function)
        thread.start()
        entered.wait()
        time.sleep(0.05)
        frame = sys._current_frames()[thread.ident or 0]
        while frame.f_code.co_filename != __file__ and frame.f_back is not None:
            frame = frame.f_back
        place, waiting = place_of(frame)
        leave.set()
        thread.join()
        assert waiting == expected and place.endswith(f" in {function.__name__}") and place.startswith(__file__)
    assert place_of(None) == ("unknown", False)


def test_a_watchdog_that_is_heard_regularly_says_nothing(tmp_path: Path):
    with mock.patch.object(Watchdog, "_end") as end, Watchdog(2.0, tmp_path / "hangs") as watchdog:
        for number in range(30):
            watchdog.beat(f"step {number}")
            time.sleep(0.1)
    assert not end.called
    with Watchdog(math.inf, tmp_path / "hangs"):  # switched off
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def hang(tmp_path: Path, statement: str, seconds: float) -> subprocess.CompletedProcess[str]:
    """A process whose main thread executes a statement that does not end."""
    program = f"""
        import ctypes, time
        from pathlib import Path
        from poet_megatron.guard import watchdog
        watchdog.GRACE_SECONDS = 1.0
        with watchdog.Watchdog({seconds}, Path({str(tmp_path / "hangs")!r}), rank=0, world_size=1, node="here") as dog:
            dog.beat("step 5")
            {statement}
        print("not reached")
    """
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)


def test_a_hang_of_one_process(tmp_path: Path):
    done = hang(tmp_path, "time.sleep(1000)", 1.0)
    assert done.returncode == EXIT_HANG and done.stdout == ""
    assert (
        "error: hang: rank 0 (here, pid " in done.stderr
        and "has been in step 5 for " in done.stderr
        and ", at <string>:8 in <module>" in done.stderr
    )
    assert json.loads((tmp_path / "hangs" / "rank-0.json").read_text())["phase"] == "step 5"
    assert 'File "<string>", line 8' in (tmp_path / "hangs" / "rank-0.stacks.txt").read_text()


def test_a_process_that_holds_pythons_lock_is_ended_all_the_same(tmp_path: Path):
    """No thread of Python can run any more, this one's watchdog included."""
    done = hang(tmp_path, "time.sleep(2.5) or ctypes.PyDLL(None).sleep(1000)", 4.0)
    assert done.returncode == 1 and done.stdout == ""
    assert "Timeout" in done.stderr and 'File "<string>", line 8' in done.stderr


def test_a_rank_reports_when_another_one_does(tmp_path: Path):
    """It was heard a moment ago, and so may go on for long."""
    program = f"""
        import threading, time
        from pathlib import Path
        from poet_megatron.guard import watchdog
        watchdog.GRACE_SECONDS, watchdog.LOOK_SECONDS = 1.0, 0.5
        folder = Path({str(tmp_path / "hangs")!r})
        with watchdog.Watchdog(300.0, folder, rank=1, world_size=2, node="there") as dog:
            dog.beat("step 5")
            folder.mkdir()
            (folder / "rank-0.json").write_text({json.dumps(json.dumps(asdict(report(0, waiting=False))))})
            threading.Event().wait(100)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_HANG and done.stderr == ""  # rank 0 is to give the verdict
    found = json.loads((tmp_path / "hangs" / "rank-1.json").read_text())
    assert found["phase"] == "step 5" and not found["waiting"]  # for a thread of its own, which loads data, for example


def test_a_hang_that_cannot_be_reported_is_said(tmp_path: Path):
    (tmp_path / "hangs").write_text("a file in the way")
    done = hang(tmp_path, "time.sleep(1000)", 1.0)
    assert done.returncode == EXIT_HANG
    assert "error: hang in step 5, and it cannot be reported in " in done.stderr and 'File "<string>", line 8' in done.stderr


def test_waiting_for_a_gpu_is_waiting():
    assert WAITING.search("        return torch._C._cuda_synchronize()") and WAITING.search("torch.cuda.synchronize()")


@pytest.mark.parametrize(
    ("error", "waiting"), [("RuntimeError('Connection closed by peer')", True), ("OSError('Input/output error')", False)]
)
def test_an_error_while_others_report_is_in_the_report(tmp_path: Path, error: str, waiting: bool):
    """The main thread ends, and waits for the report to be made: status 5. Who lost its connections waited; who has an error of its own did
    not, and is to blame."""
    program = f"""
        from pathlib import Path
        from poet_megatron.guard import watchdog
        watchdog.GRACE_SECONDS = 1.0
        folder = Path({str(tmp_path / "hangs")!r})

        def load():
            raise {error}

        with watchdog.Watchdog(300.0, folder, rank=1, world_size=2, node="there") as dog:
            dog.beat("step 5")
            folder.mkdir()
            (folder / "rank-0.json").write_text({json.dumps(json.dumps(asdict(report(0))))})
            load()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_HANG
    found = RankReport(**json.loads((tmp_path / "hangs" / "rank-1.json").read_text()))
    kind, words = error.rstrip(")'").split("('")
    assert found.waiting == waiting and found.phase == "step 5" and 0 <= found.seconds < 300
    assert found.place.endswith(f"in load, where it ended with {kind}: {words}") and f"{kind}: {words}" in done.stderr
    verdict = blame([report(0), found], 2)
    assert verdict.startswith("no rank" if waiting else "rank 1 (there"), verdict


@pytest.mark.parametrize(("jump", "ends"), [(100.0, False), (2.0, True)])
def test_time_for_which_the_process_was_suspended_does_not_count(tmp_path: Path, monkeypatch, jump: float, ends: bool):
    """A clock that jumps: by more than ticks can be late, the process stood still; by less, and often, the run did."""
    offset, clock = 0.0, time.monotonic
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock() + offset)
    with mock.patch.object(Watchdog, "_end") as end, Watchdog(10.0, tmp_path / "hangs"):
        for _ in range(20 if ends else 3):
            offset += jump
            threading.Event().wait(1.1)
            if end.called:
                break
    assert end.called == ends
