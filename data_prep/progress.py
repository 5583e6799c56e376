"""A progress line on stderr: documents, MB/s and the time left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints at most one line per `interval` seconds, and one at the end."""

    def __init__(self, label: str, total_bytes: int, stream: TextIO | None = None, interval: float = 2.0):
        self.label, self.total_bytes, self.interval = label, total_bytes, interval
        self._stream = stream or sys.stderr
        self._start = self._printed = time.monotonic()
        self._documents = self._text_bytes = 0

    def update(self, documents: int, text_bytes: int, position: int) -> None:
        """Count documents and bytes of text done since the last call; `position` is how far the sources are read."""
        self._documents += documents
        self._text_bytes += text_bytes
        now = time.monotonic()
        if now - self._printed >= self.interval:
            self._printed = now
            self._stream.write(self._line(now, position) + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Print the totals."""
        self._stream.write(self._line(time.monotonic(), self.total_bytes) + "\n")
        self._stream.flush()

    def _line(self, now: float, position: int) -> str:
        seconds = max(now - self._start, 1e-9)
        share = min(position / self.total_bytes, 1.0) if self.total_bytes else 1.0
        left = seconds * (1 - share) / share if share else 0.0
        line = f"{self.label}: {self._documents:,} documents, {self._text_bytes / 1e6:.1f} MB, {self._text_bytes / 1e6 / seconds:.1f} MB/s"
        return f"{line}, {share:.0%}, ETA {left:.0f} s" if share < 1 else f"{line}, {seconds:.1f} s"
