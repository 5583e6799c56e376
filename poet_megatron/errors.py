"""Errors that end a command with one line and a status of its own; the statuses, which batch scripts act on (docs/faults.md)."""

from __future__ import annotations

EXIT_USER_ERROR = 2
"""The user must mend something: starting the same command again would end the same way."""
EXIT_NOT_FINITE = 3
"""The loss or a gradient was not finite, or the loss jumped, and the run was to stop there."""
EXIT_DIVERGED = 4
"""Ranks that must hold the same bits do not: a fault of the machine."""
EXIT_HANG = 5
"""A rank stopped making progress; the watchdog wrote down where, and ended the run."""
EXIT_SAVED = 75
"""Stopped on request after saving everything: the same command continues (EX_TEMPFAIL)."""


class UserError(ValueError):
    """A mistake in settings, files or environment; the message names the value, the bound and the fix."""

    exit_status = EXIT_USER_ERROR


class FaultError(RuntimeError):
    """Something outside this program went wrong, and the message says what: no traceback is needed to mend it."""

    exit_status = 1
