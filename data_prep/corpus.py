"""Where documents come from: files given by the user, or text that every CPython ships.

Files: `.jsonl`, `.json` (one JSON object a line with a "text" field, the form of C4) and `.txt` (one document per file), each also
gzipped (`.gz`). A document is one string; blank ones and ones that are not valid Unicode are left to the caller to skip (`skip_reason`).
"""

from __future__ import annotations

import ast
import glob
import gzip
import json
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from poet_megatron.errors import UserError

JSON_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
EMBEDDED_NAME = "the standard library's documentation"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Windows' editors put it before a text in UTF-8; it is no part of the text."""
MIN_DOCUMENT = 200
"""Docstrings shorter than this many characters are merged into their module's document."""
MIN_COMMENT = 60
"""Comment blocks shorter than this many characters are left out."""
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "encodings"})


class Document(NamedTuple):
    """A document and where it came from."""

    text: str
    origin: str
    """File and line."""
    position: int
    """Bytes of its source read so far (of the compressed file), for progress."""


def skip_reason(text: str) -> str | None:
    """Why a document cannot be tokenized, or None if it can."""
    if not text.strip():
        return "blank text"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "lone surrogate"
    return None


def expand(patterns: Iterable[str], suffixes: tuple[str, ...] = JSON_SUFFIXES + TEXT_SUFFIXES) -> list[Path]:
    """Files named by paths and globs, each once, globs in sorted order; a pattern without a readable, non-empty file is an error.

    A link keeps its own name, since the ending says what is in the file: those of Hugging Face's cache lead to files without one.
    """
    files: dict[Path, Path] = {}
    for pattern in patterns:
        matches = [pattern] if Path(pattern).exists() else []
        matches = matches or sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not matches:
            raise UserError(f"input {pattern} matches no file: check the path (quote globs so that the shell does not expand them)")
        for match in matches:
            path = _checked(Path(match), suffixes)
            files.setdefault(path.resolve(), path)
    if not files:
        raise UserError("no input files were given: name at least one .jsonl, .json.gz or .txt file")
    return list(files.values())


def _checked(path: Path, suffixes: tuple[str, ...]) -> Path:
    if path.is_dir():
        raise UserError(f"input {path} is a folder: name its files, for example '{path}/*.json.gz'")
    if not path.name.endswith(suffixes):
        raise UserError(f"input {path} has an unknown ending: use one of {', '.join(suffixes)}")
    if path.stat().st_size == 0:
        raise UserError(f"input {path} is empty (0 bytes): remove it from --input or download it again")
    return path.absolute()


def read_documents(paths: Iterable[Path]) -> Iterator[Document]:
    """Documents of the files in order; malformed input is a UserError naming file and line."""
    for path in paths:
        if path.name.endswith(TEXT_SUFFIXES):
            yield _text_document(path)
        else:
            yield from _json_documents(path)


def _lines(path: Path) -> Iterator[tuple[int, bytes, int]]:
    """Numbered lines of a possibly gzipped file, with the position in the file as stored."""
    number = 0
    with path.open("rb") as raw:
        stream: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        try:
            for number, line in enumerate(stream, start=1):
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line, raw.tell()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged gzip data after line {number} ({error}): download the file again") from error


def _json_documents(path: Path) -> Iterator[Document]:
    number = 0
    for number, line, position in _lines(path):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise UserError(f'{origin}: not a JSON object in UTF-8 ({error}): each line must be like {{"text": "..."}}') from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f'{origin}: no "text" string (found: {keys}): each line must be like {{"text": "..."}}')
        yield Document(text, origin, position)
    if number == 0:
        raise UserError(f'{path}: no lines: each line must be like {{"text": "..."}}')


def _text_document(path: Path) -> Document:
    lines = []
    for number, line, _ in _lines(path):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 ({error}): convert the file, for example with iconv -t utf-8") from error
    return Document("".join(lines), f"{path}:1", path.stat().st_size)


def embedded_documents(root: Path | None = None) -> Iterator[str]:
    """English text of the standard library under `root`: the language reference's topics, docstrings and comments.

    Sources are parsed, never imported; files come in sorted order, exact duplicates are dropped, and tests are left out.
    """
    seen: set[str] = set()
    for source in _sources(root or Path(sysconfig.get_paths()["stdlib"])):
        for text in _module_documents(source):
            if text not in seen:
                seen.add(text)
                yield text


def _sources(root: Path) -> list[Path]:
    """Python files under `root` but for tests and installed packages, in an order that does not depend on where `root` is."""
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    return [files[name] for name in sorted(files) if not SKIPPED_FOLDERS.intersection(name.split("/"))]


def _module_documents(path: Path) -> Iterator[str]:
    """Documents of one source file: each long docstring, then the short ones and the comments together."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError):  # grammar fixtures are not meant to be parsed
        return
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        yield from _strings_of_dict(tree)
        return
    rest = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= MIN_DOCUMENT:
                yield text
            elif text:
                rest.append(text)
    merged = "\n\n".join(dict.fromkeys(rest + list(_comments(source))))
    if len(merged) >= MIN_DOCUMENT:
        yield merged


def _strings_of_dict(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for value in node.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value.strip():
                    yield value.value.strip()


def _comments(source: str) -> Iterator[str]:
    """Blocks of whole-line comments without their `#`."""
    block: list[str] = []
    for line in [*source.splitlines(), ""]:
        stripped = line.strip()
        if stripped.startswith("#"):
            block.append(stripped.lstrip("#").removeprefix(" ").rstrip())
        elif block:
            text = "\n".join(block).strip()
            if len(text) >= MIN_COMMENT:
                yield text
            block = []
