"""Checks shared by the settings dataclasses: each raises a ValueError naming the setting, its value and the bound."""

from __future__ import annotations

from collections.abc import Sequence

from poet_megatron.config.unsupported import why_unsupported


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        reason = why_unsupported(value)
        refusal = f", which is not supported: {reason}" if reason else ""
        raise ValueError(f"{name} is {value!r}{refusal}; choose one of {', '.join(allowed)}")


def at_least(name: str, value: float, bound: float) -> None:
    """Raise ValueError unless `value >= bound`."""
    if value < bound:
        raise ValueError(f"{name} is {value}; it must be at least {bound}")


def divides(name: str, value: int, of_name: str, of: int) -> None:
    """Raise ValueError unless `value` divides `of`."""
    if of % value:
        raise ValueError(f"{name} is {value}, which does not divide {of_name} = {of}")
