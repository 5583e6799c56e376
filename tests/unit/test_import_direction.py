"""Imports go one way (docs/design.md), and importing the package does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "poet_megatron"
# A layer may import the ones before it and itself. Settings (<component>/config.py) are the lowest layer of all.
LAYERS = [
    {"errors", "config.checks", "config.unsupported"},
    {"ops"},
    {"layers"},
    {"config"},
    {"parallel", "data", "monitor", "profiling"},
    {"model"},
    {"optim"},
    {"engine"},
    {"estimate", "guard", "health", "launch"},
    {"checkpoint"},
    {"train"},
    {"cli"},
]
FILES = sorted(PACKAGE.rglob("*.py"))


def _layer(module: str) -> int:
    """Position of poet_megatron.<module> among the layers."""
    if module.endswith(".config") or module in ("config.checks", "config.unsupported", "errors"):
        return 0
    head = module.split(".")[0]
    return next(number for number, names in enumerate(LAYERS) if head in names)


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("poet_megatron."):
            found.add(node.module.removeprefix("poet_megatron."))
        elif isinstance(node, ast.Import):
            found |= {name.name.removeprefix("poet_megatron.") for name in node.names if name.name.startswith("poet_megatron.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path):
    module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    if module in ("__init__", "__main__") or module.endswith("__init__"):
        return
    for imported in _imports(path):
        assert _layer(imported) <= _layer(module), f"{module} imports {imported}, which is above it"


def test_ops_import_only_torch_and_numpy():
    for path in (PACKAGE / "ops").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                assert name.split(".")[0] in {"torch", "numpy", "poet_megatron", *sys.stdlib_module_names}, (path.name, name)


def test_only_the_cli_parses_arguments():
    for path in FILES:
        if path.is_relative_to(PACKAGE / "cli"):
            continue
        text = path.read_text()
        assert "argparse" not in text and "sys.argv[" not in text, path


def test_importing_the_package_loads_no_torch_and_prints_nothing():
    code = "import sys, poet_megatron; print(sorted(m for m in ('torch', 'megatron', 'numpy') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""
