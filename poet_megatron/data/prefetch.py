"""Loading ahead in a background thread, with a bound on how much is ready, and errors raised where they belong."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")
THREAD_NAME = "poet-data-prefetch"
JOIN_SECONDS = 10.0


class Prefetcher(Generic[Item]):
    """`get(n)` is `load(n)`, for n below `count`; while the caller works on one item, a thread loads up to `depth` that follow.

    The thread starts at the first `get`, and again where a `get` asks for another item than the next one. It ends with the last item, with
    `close`, or with this object, to which it holds no reference: neither an exception nor a signal leaves one behind.
    """

    def __init__(self, load: Callable[[int], Item], count: int, depth: int):
        if depth < 1:
            raise ValueError(f"depth is {depth}; it must be at least 1")
        self._load, self._count, self._depth = load, count, depth
        self._next = -1
        self._stop: weakref.finalize | None = None
        self._feed: _Feed[Item] | None = None

    def get(self, number: int) -> Item:
        """Item `number`; an exception that loading it raised is raised here, and the next `get` tries again."""
        if not 0 <= number < self._count:
            raise IndexError(f"item {number} is not in 0..{self._count - 1}")
        if self._feed is None or number != self._next:
            self.close()
            self._feed = _Feed(self._load, number, self._count, self._depth)
            self._stop = weakref.finalize(self, self._feed.stop)  # also at the end of the program
        try:
            item = self._feed.take()
        except BaseException:  # of loading, or an interrupt while waiting
            self.close()
            raise
        self._next = number + 1
        return item

    def close(self) -> None:
        """End the thread and drop what is ready; a later `get` starts anew."""
        if self._stop is not None:
            self._stop()
        self._feed = self._stop = None


class _Feed(Generic[Item]):
    """One run of the thread, from an item on, and what it has ready."""

    def __init__(self, load: Callable[[int], Item], start: int, stop: int, depth: int):
        self._load, self._numbers, self._depth = load, range(start, stop), depth
        self._ready: deque[tuple[Item | None, BaseException | None]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def take(self) -> Item:
        """The next item, as soon as it is there."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            item, error = self._ready.popleft()
            self._changed.notify_all()
        if error is not None:
            raise error
        return item  # type: ignore[return-value]  # None only beside an error

    def stop(self) -> None:
        """End the thread after the item it is at. It is a daemon: one that hangs in a read is not waited for longer than JOIN_SECONDS."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        for number in self._numbers:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or len(self._ready) < self._depth)
                if self._stopped:
                    return
            item, error = None, None
            try:
                item = self._load(number)
            except BaseException as raised:
                error = raised
            with self._changed:
                if self._stopped:
                    return
                self._ready.append((item, error))
                self._changed.notify_all()
            if error is not None:
                return
