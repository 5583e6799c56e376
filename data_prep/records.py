"""Records to texts: parses and checks the records of a block, with a reason for every one that is left out."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from data_prep.blocks import Block, too_long
from data_prep.corpus import BYTE_ORDER_MARK

INVALID_UTF8 = "invalid UTF-8"
INVALID_JSON = "invalid JSON"
NOT_AN_OBJECT = "not a JSON object"
BLANK_LINE = "blank line"
EMPTY_TEXT = "empty text"
NUL = "NUL character"
LONE_SURROGATE = "lone surrogate"


class BadRecord(Exception):
    """A record that cannot be used; `args[0]` is the reason that the manifest gives."""


@dataclass
class Texts:
    """Usable texts of a block, and what was left out of it."""

    texts: list[str] = field(default_factory=list)
    content: list[bytes] = field(default_factory=list)
    """The texts in UTF-8."""
    numbers: list[int] = field(default_factory=list)
    """Record number of each text."""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """Record number and reason."""


def parse(block: Block, key: str, max_bytes: int) -> Texts:
    """Texts of the records of `block`; `key` names the field of a JSON line that holds the text."""
    found = Texts()
    if block.lost:
        found.skipped.append((block.first, block.lost))
        return found
    lines = block.lines.split(b"\n")[: block.count] if block.lines is not None else block.texts
    for number, record in enumerate(lines, start=block.first):
        try:
            if record is not None and len(record) > max_bytes:
                raise BadRecord(too_long(max_bytes))
            text = _json_text(record, key, number) if block.lines is not None else _plain_text(record, key)
            content = _checked(text)
        except BadRecord as error:
            found.skipped.append((number, str(error)))
            continue
        found.texts.append(text)
        found.content.append(content)
        found.numbers.append(number)
    return found


def _json_text(line: bytes | None, key: str, number: int) -> str:
    line = line or b""
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    if not line.strip():
        raise BadRecord(BLANK_LINE)
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRecord(INVALID_UTF8) from error
    except (ValueError, RecursionError) as error:
        raise BadRecord(INVALID_JSON) from error
    if not isinstance(record, dict):
        raise BadRecord(NOT_AN_OBJECT)
    if key not in record:
        raise BadRecord(missing(key))
    text = record[key]
    if not isinstance(text, str):
        raise BadRecord(f'"{key}" is not a string')
    return text


def missing(key: str) -> str:
    """The reason for leaving out a record without text."""
    return f'no "{key}"'


def _plain_text(text: bytes | None, key: str) -> str:
    if text is None:
        raise BadRecord(missing(key))
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(INVALID_UTF8) from error


def _checked(text: str) -> bytes:
    """UTF-8 of a text that can be tokenized."""
    if not text or text.isspace():
        raise BadRecord(EMPTY_TEXT)
    if "\0" in text:
        raise BadRecord(NUL)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRecord(LONE_SURROGATE) from error
