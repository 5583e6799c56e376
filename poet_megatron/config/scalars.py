"""Scalars of configuration files and of the command line: text to value, value to the type a setting has."""

from __future__ import annotations

import math
import re
import types
from typing import Any, get_args

_INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NULL = ("", "~", "null", "Null", "NULL")
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NONFINITE = {".inf": math.inf, "-.inf": -math.inf, ".nan": math.nan, "inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_EXPECTED = {int: "an integer", float: "a number", bool: "true or false", str: "text (in quotes if it looks like a number or true/false)"}


def parse_scalar(text: str) -> Any:
    """Value of an unquoted scalar: null, true/false, an integer (1_000 too), a number (1e-3 too), else the text itself.

    These are YAML 1.2's rules; YAML 1.1 would read `off` as false, `1:30` as 90 and `1e-3` as text.
    """
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if text.lower() in _NONFINITE:
        return _NONFINITE[text.lower()]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) else text


def coerce(key: str, value: Any, hint: Any, source: str) -> Any:
    """`value` as the type of the setting `key`, or a ValueError naming key, value, expected type and source.

    Integers stay integers where a number is expected, so that a block size of 256 is 256.
    """
    kind, optional = _split_optional(hint)
    if kind is not str and isinstance(value, str):
        value = _number_in_text(value, kind, optional)
    if value is None and optional:
        return None
    if _fits(value, kind):
        return value
    expected = _EXPECTED[kind] + (" or null" if optional else "")
    raise ValueError(f"{source}: {key} is {_shown(value)}; expected {expected}")


def coerce_text(key: str, text: str, hint: Any, source: str) -> Any:
    """Like `coerce`, for a word of the command line: text settings take it literally."""
    kind, optional = _split_optional(hint)
    literal = kind is str and not (optional and text in _NULL)
    return coerce(key, text if literal else parse_scalar(text), hint, source)


def _split_optional(hint: Any) -> tuple[type, bool]:
    if isinstance(hint, types.UnionType):
        kinds = [kind for kind in get_args(hint) if kind is not type(None)]
        return kinds[0], True
    return hint, False


def _number_in_text(text: str, kind: type, optional: bool) -> Any:
    if optional and text.lower() == "none":
        return None
    number = parse_scalar(text)
    return number if kind is float and type(number) in (int, float) else text


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else repr(value)
