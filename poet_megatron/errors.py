"""Errors that are the user's to fix: the command line prints them as one line, without a traceback."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in settings, files or environment; the message names the value, the bound and the fix."""

    exit_status = 2
