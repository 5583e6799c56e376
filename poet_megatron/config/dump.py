"""Writing configurations: YAML, a hash, and the differences between two."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import yaml

from poet_megatron.config.fields import field_hints
from poet_megatron.config.run import RunConfig
from poet_megatron.config.scalars import parse_scalar

HASH_LENGTH = 16


def to_yaml(config: RunConfig) -> str:
    """Every setting as YAML, sections in the order of RunConfig; `load_config` reads it back to an equal RunConfig."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def flat_values(config: RunConfig) -> dict[str, Any]:
    """Value of every dotted key."""
    values = {}
    for key in field_hints():
        section, _, name = key.rpartition(".")
        values[key] = getattr(getattr(config, section) if section else config, name)
    return values


def config_hash(config: RunConfig) -> str:
    """Sixteen hex digits that equal configurations share (256 and 256.0 are equal) and different ones do not."""
    values = {key: float(value) if _is_number(value) else value for key, value in flat_values(config).items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]


def diff_configs(old: RunConfig, new: RunConfig) -> list[str]:
    """Lines such as `model.num_layers: 8 -> 12`, one for every setting that differs; empty for equal configurations."""
    before, after = flat_values(old), flat_values(new)
    return [f"{key}: {_shown(before[key])} -> {_shown(after[key])}" for key in before if before[key] != after[key]]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes the text which our reader would take for a number, true/false or null."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if isinstance(parse_scalar(text), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)
