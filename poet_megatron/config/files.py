"""YAML recipes: reading one, and the recipes it builds on, into dotted settings that remember where they come from."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from poet_megatron.config.fields import check_key, field_hints, sections
from poet_megatron.config.run import RunConfig
from poet_megatron.config.scalars import coerce, parse_scalar

BASE_KEY = "base"


class Setting(NamedTuple):
    """A value and the file (or command line) it was read from."""

    value: Any
    source: str


def read_settings(path: Path) -> dict[str, Setting]:
    """Dotted settings of a recipe on top of those of its `base`, checked for unknown keys and wrong types."""
    chain = _chain(path)
    settings: dict[str, Setting] = {}
    for source, content in reversed(chain):
        settings.update(_checked(content, source))
    return settings


def _chain(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The recipe and its bases, most specific first."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    following: Path | None = path
    while following is not None:
        seen.append(following.resolve())
        content = _read_mapping(following, chain[-1][0] if chain else None)
        base = content.pop(BASE_KEY, None)
        chain.append((str(following), content))
        if base is not None and not (isinstance(base, str) and base):
            raise ValueError(f"{following}: base is {base!r}; expected the path of one YAML file, relative to this one")
        following = Path(os.path.normpath(following.parent / base)) if base else None
        if following is not None and following.resolve() in seen:
            names = " -> ".join([source for source, _ in chain] + [str(following)])
            raise ValueError(f"base: files build on each other in a circle: {names}; remove one of the base keys")
    return chain


def _read_mapping(path: Path, used_by: str | None) -> dict[str, Any]:
    needed = f" (the base of {used_by})" if used_by else ""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ValueError(f"configuration file {path}{needed} does not exist{_similar_file(path)}") from None
    except OSError as error:
        raise ValueError(f"configuration file {path}{needed} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason} at byte {error.start}); give a YAML recipe") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {_yaml_problem(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected settings such as 'train: {{steps: 100}}', found {type(content).__name__} {str(content)[:60]!r}")
    return content


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
    return (getattr(error, "problem", None) or str(error).splitlines()[0]) + place


def _similar_file(path: Path) -> str:
    names = [entry.name for entry in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _checked(content: Mapping[str, Any], source: str) -> dict[str, Setting]:
    hints = field_hints()
    if "version" in content:  # first: a newer format has keys that this one does not know
        version = coerce("version", content["version"], int, source)
        try:
            RunConfig(version=version)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    settings: dict[str, Setting] = {}
    for key, value in _flatten(content):
        check_key(key, source)
        if key in settings:
            raise ValueError(f"{source}: {key} is set twice; keep one of them")
        settings[key] = Setting(coerce(key, value, hints[key], source), source)
    return settings


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{key}.")
        elif not (key in sections() and value in (None, {})):  # a section whose keys are all commented out
            yield key, value


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (`off` is text, `1e-3` a number) that refuses a key given twice."""

    yaml_implicit_resolvers: dict[Any, Any] = {}


def _construct_plain(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    return parse_scalar(node.value)


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a name", key_node.start_mark)
        key = key_node.value
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"{key} is set twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_implicit_resolver("!plain", re.compile(r".*", re.DOTALL), None)
_Loader.add_constructor("!plain", _construct_plain)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
