"""What can be set: dotted keys of RunConfig with their types, defaults and documentation."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, get_type_hints

from poet_megatron.config.run import RunConfig
from poet_megatron.config.unsupported import why_unsupported

NEAREST_CUTOFF = 0.5


class FieldDoc(NamedTuple):
    """One key of the configuration, as `--help` shows it."""

    key: str
    type: str
    default: Any
    doc: str


def sections() -> dict[str, type]:
    """Settings class of every section (`train`, `optim`, ...), in the order of RunConfig."""
    return {name: hint for name, hint in _hints(RunConfig).items() if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def field_hints() -> dict[str, Any]:
    """Type of every dotted key."""
    hints = {name: hint for name, hint in _hints(RunConfig).items() if not dataclasses.is_dataclass(hint)}
    for section, cls in sections().items():
        hints.update({f"{section}.{name}": hint for name, hint in _hints(cls).items()})
    return hints


def describe_fields() -> list[FieldDoc]:
    """Key, type, default and documentation of every setting, top-level keys first, then section by section."""
    found = list(_describe(RunConfig, ""))
    for section, cls in sections().items():
        found += _describe(cls, f"{section}.")
    return found


def check_key(key: str, source: str) -> None:
    """Raise ValueError naming `source` and the nearest valid key, or why there is none, unless `key` can be set."""
    valid = field_hints()
    if key in valid:
        return
    if key in sections():
        example = next(name for name in valid if name.startswith(f"{key}."))
        raise ValueError(f"{source}: {key} is a section, not a setting; set the keys under it, such as {example}")
    if reason := why_unsupported(key):
        raise ValueError(f"{source}: {key} is not supported: {reason}")
    near = nearest(key, [*valid, *sections()])
    hint = f"did you mean {near}?" if near else "`poet-megatron pretrain --help` lists the keys"
    raise ValueError(f"{source}: unknown key {key}; {hint}")


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The valid dotted name most like `key`, or None: the same last part first (`lr` means `optim.lr`), then the spelling of the whole."""
    names = list(valid)
    leaf = key.rpartition(".")[2].replace("-", "_")
    same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
    near = difflib.get_close_matches(key.replace("-", "_"), same_leaf or names, n=1, cutoff=0.0 if same_leaf else NEAREST_CUTOFF)
    if near or "." in key:
        return near[0] if near else None
    leaves = {name.rpartition(".")[2]: name for name in names}
    near = difflib.get_close_matches(leaf, leaves, n=1, cutoff=NEAREST_CUTOFF)
    return leaves[near[0]] if near else None


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _describe(cls: type, prefix: str) -> Iterator[FieldDoc]:
    docs = _field_docs(cls)
    hints = _hints(cls)
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(hints[field.name]):
            yield FieldDoc(prefix + field.name, str(field.type), field.default, docs.get(field.name, ""))


def _field_docs(cls: type) -> dict[str, str]:
    """String literals that follow the annotated fields in the source of `cls`; empty where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except OSError:
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    docs = {}
    for statement, following in zip(body, body[1:], strict=False):
        if not (isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)):
            continue
        literal = following.value if isinstance(following, ast.Expr) else None
        if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
            docs[statement.target.id] = inspect.cleandoc(literal.value)
    return docs
