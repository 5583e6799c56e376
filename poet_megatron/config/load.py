"""Loading a RunConfig: defaults, then a YAML recipe, then `--section.key value` from the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from poet_megatron.config.dump import config_hash, diff_configs, to_yaml
from poet_megatron.config.fields import FieldDoc, check_key, describe_fields, field_hints, sections
from poet_megatron.config.files import Setting, read_settings
from poet_megatron.config.run import RunConfig
from poet_megatron.config.scalars import coerce_text

__all__ = ["FieldDoc", "config_hash", "describe_fields", "diff_configs", "load_config", "parse_overrides", "to_yaml"]

COMMAND_LINE = "command line"


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """RunConfig from the defaults, the recipe at `path` (and its bases) and command-line words, the later winning.

    Raises ValueError naming the key, the value and where it came from.
    """
    settings = read_settings(Path(path)) if path is not None else {}
    settings.update(parse_overrides(overrides))
    try:
        return _build({key: setting.value for key, setting in settings.items()})
    except ValueError as error:
        raise ValueError(_located(str(error), settings, path)) from error


def parse_overrides(words: Sequence[str]) -> dict[str, Setting]:
    """Settings from words such as `--train.steps 100` or `--train.steps=100`; the last of a repeated key wins."""
    hints = field_hints()
    settings: dict[str, Setting] = {}
    remaining = list(words)
    while remaining:
        word = remaining.pop(0)
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{COMMAND_LINE}: unexpected {word!r}; settings are given as --section.key value, a recipe as --config {word}")
        key, has_value, text = word[2:].partition("=")
        check_key(key, COMMAND_LINE)
        if not has_value:
            if not remaining or remaining[0].startswith("--"):
                example = "true" if hints[key] is bool else "VALUE"
                raise ValueError(f"{COMMAND_LINE}: --{key} needs a value: --{key} {example}")
            text = remaining.pop(0)
        settings[key] = Setting(coerce_text(key, text, hints[key], COMMAND_LINE), COMMAND_LINE)
    return settings


def _build(values: Mapping[str, Any]) -> RunConfig:
    parts: dict[str, Any] = {key: value for key, value in values.items() if "." not in key}
    for section, cls in sections().items():
        prefix = f"{section}."
        parts[section] = cls(**{key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)})
    return RunConfig(**parts)


def _located(message: str, settings: Mapping[str, Setting], path: str | Path | None) -> str:
    """The message of a failed check, with the file being loaded and the source of every setting it names."""
    named = [key for key in settings if re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", message)]
    elsewhere = [f"{key} was set by {settings[key].source}" for key in named if settings[key].source != str(path)]
    where = COMMAND_LINE if path is None else str(path)
    return f"{where}: {message}" + (f" ({'; '.join(elsewhere)})" if elsewhere and path is not None else "")
