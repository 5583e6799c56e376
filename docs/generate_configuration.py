"""Writes docs/configuration.md from the settings dataclasses: `python docs/generate_configuration.py`."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

from poet_megatron.config.fields import sections
from poet_megatron.config.load import FieldDoc, describe_fields

OUTPUT = Path(__file__).with_name("configuration.md")

INTRODUCTION = """\
# Configuration

<!-- Written by docs/generate_configuration.py; edit that script or the docstrings of the settings, then run it again. -->

A run is described by one `RunConfig`. Its settings come from three places, the later winning:

1. the defaults in the tables below;
2. the recipe given with `--config FILE.yaml`;
3. `--section.key value` (or `--section.key=value`) on the command line; the last of a repeated key wins.

```bash
poet-megatron pretrain --config configs/demo.yaml --train.steps 100 --optim.poet_lr=2e-3
poet-megatron pretrain --config configs/demo.yaml --print-config   # the result, as a YAML file that can be used as a recipe
```

A recipe is a YAML file with one mapping per section. `base: other.yaml`, relative to the file that says it, builds on another recipe: the
base is read first, and a base may have a base. A circle is an error.

```yaml
base: base/llama_60m.yaml
method: poet
model:
  ffn_hidden_size: 1280
poet:
  variant: bs
  block_size: 256
```

Scalars follow YAML 1.2: `1e-3` is a number, `1_000` an integer, `off` is text, `true` and `false` are the booleans, `null` is null.
An unknown key, a wrong type or an impossible value is an error that names the key, the value, where it was set and, for an unknown key,
the nearest valid one. A file with a newer `version` than this release knows is refused.

Paths (`data.path`, `train.run_dir`, `data.cache`) are relative to the folder that a command is started in. A checkpoint holds `data.path`
as an absolute path, so `evaluate` and `export` may be started anywhere.

The settings of a component are a dataclass in `config.py` of its package (`poet_megatron/train/config.py`, ...); the texts below are the
string literals under its fields, as in `poet-megatron pretrain --help`.
"""


def render() -> str:
    """Content of docs/configuration.md."""
    docs = {name: (cls.__doc__ or "").strip() for name, cls in sections().items()}
    parts = [INTRODUCTION]
    for section, fields in groupby(describe_fields(), key=lambda field: field.key.rpartition(".")[0]):
        parts.append(f"\n## {section or 'Top level'}\n\n")
        if section:
            parts.append(f"{docs[section]}\n\n")
        parts.append("| Key | Type | Default | Meaning |\n|---|---|---|---|\n")
        parts += [_row(field) for field in fields]
    return "".join(parts)


def _row(field: FieldDoc) -> str:
    kind = field.type.replace(" | None", " or null")
    return f"| `{field.key}` | {kind} | {_default(field.default)} | {_cell(field.doc)} |\n"


def _default(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    return "empty" if value == "" else f"`{value}`"


def _cell(text: str) -> str:
    escaped = " ".join(text.split())
    for character in "|*_<":
        escaped = escaped.replace(character, "\\" + character)
    return escaped


def main() -> None:
    """Write the file."""
    OUTPUT.write_text(render(), encoding="utf-8")
    print(f"wrote {OUTPUT}")


if __name__ == "__main__":
    main()
