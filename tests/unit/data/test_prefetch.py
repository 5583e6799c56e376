"""Loading ahead: the same items, no more than asked for, errors at their place, and no thread that stays."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from poet_megatron.data.prefetch import THREAD_NAME, Prefetcher


def threads():
    return [thread for thread in threading.enumerate() if thread.name == THREAD_NAME]


@pytest.fixture(autouse=True)
def nothing_stays():
    assert not threads()
    yield
    assert not threads()


class Recorder:
    """Loads n as n * n, and knows what was asked for."""

    def __init__(self, broken=()):
        self.asked, self.broken = [], set(broken)

    def __call__(self, number):
        self.asked.append(number)
        if number in self.broken:
            raise OSError(f"item {number} is gone")
        return number * number

    def settled(self, count):
        """What was asked for, once that is `count` items (on a busy machine, after a while) and no more of them come."""
        deadline = time.monotonic() + 20
        while len(self.asked) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        return list(self.asked)


@pytest.mark.parametrize("depth", [1, 2, 5, 100])
def test_the_items_in_order_each_loaded_once(depth):
    load = Recorder()
    ahead = Prefetcher(load, 20, depth)
    assert [ahead.get(number) for number in range(20)] == [number * number for number in range(20)]
    assert load.asked == list(range(20))


def test_nothing_is_loaded_before_the_first_get_and_never_more_than_depth_ahead():
    load = Recorder()
    ahead = Prefetcher(load, 50, 3)
    assert load.settled(0) == [] == threads()
    for number in (10, 11, 12):
        ahead.get(number)
        assert load.settled(number - 6) == list(range(10, number + 4))
    ahead.close()


def test_another_item_than_the_next_starts_again_there():
    ahead = Prefetcher(Recorder(), 50, 4)
    assert [ahead.get(number) for number in (0, 1, 30, 31, 2, 2, 49)] == [number * number for number in (0, 1, 30, 31, 2, 2, 49)]
    assert len(threads()) <= 1
    for number in (-1, 50):
        with pytest.raises(IndexError, match=f"item {number} is not in 0..49"):
            ahead.get(number)
    ahead.close()


def test_an_error_is_raised_at_its_item_not_before_and_not_after():
    load = Recorder(broken=[5])
    ahead = Prefetcher(load, 50, 10)
    assert ahead.get(2) == 4
    assert load.settled(4) == [2, 3, 4, 5]  # it has happened, and nothing is loaded behind it
    assert [ahead.get(3), ahead.get(4)] == [9, 16]
    for _ in range(2):  # each time it is asked for
        with pytest.raises(OSError, match="item 5 is gone") as caught:
            ahead.get(5)
        assert any(entry.name == "__call__" for entry in caught.traceback)  # where it went wrong
        assert not threads()
    load.broken.clear()
    assert [ahead.get(5), ahead.get(6)] == [25, 36]
    ahead.close()


def test_close_ends_a_thread_that_waits_and_can_be_followed_by_a_get():
    ahead = Prefetcher(Recorder(), 50, 2)
    ahead.close()
    for start in (0, 7):
        assert ahead.get(start) == start * start
        assert len(threads()) == 1
        ahead.close()
        assert not threads()
        ahead.close()


def test_an_object_that_is_dropped_takes_its_thread_along():
    ahead = Prefetcher(Recorder(), 50, 2)
    ahead.get(0)
    assert len(threads()) == 1
    del ahead
    assert not threads()


def test_the_thread_ends_with_the_last_item():
    ahead = Prefetcher(Recorder(), 3, 5)
    ahead.get(0)
    deadline = time.monotonic() + 5
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads()
    assert [ahead.get(1), ahead.get(2)] == [1, 4]


def test_an_interrupt_while_waiting_leaves_nothing_behind():
    release = threading.Event()

    def load(number):
        release.wait(10)
        return number

    def interrupt(*_):
        release.set()
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGUSR2, interrupt)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    timer.start()
    try:
        ahead = Prefetcher(load, 10, 2)
        with pytest.raises(KeyboardInterrupt):
            ahead.get(0)
        assert not threads()
        assert ahead.get(0) == 0
        ahead.close()
    finally:
        timer.join()
        signal.signal(signal.SIGUSR2, previous)


@pytest.mark.parametrize("end", ["pass", "raise SystemExit(0)", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"])
def test_a_program_can_end_while_its_thread_waits(end):
    start = "from poet_megatron.data.prefetch import Prefetcher; ahead = Prefetcher(abs, 99, 2); ahead.get(0); print('here', flush=True)"
    code = f"{start}\n{end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[3])
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGTERM if "SIGTERM" in end else 0, "here\n", "")


def test_a_depth_of_none():
    with pytest.raises(ValueError, match="depth is 0; it must be at least 1"):
        Prefetcher(abs, 1, 0)
