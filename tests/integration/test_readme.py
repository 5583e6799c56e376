"""The commands of the README do what it says: every ```bash test block is executed, in order, in a scratch folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```bash test\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMANDS = ("prepare", "pretrain", "evaluate", "export", "estimate", "doctor", "compare")


def test_readme_commands_run(tmp_path):
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    assert all(any(f"poet-megatron {name}" in block for block in blocks) for name in COMMANDS)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for block in blocks:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_first_two_commands_are_demo_and_test():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    commands = re.findall(r"^(make \w+)", "\n".join(blocks), re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]


def test_links_and_files_named_in_the_docs_exist():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            assert target.startswith(("http", "mailto:")) or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_docs_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text


def test_the_configuration_page_is_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from generate_configuration import render
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "configuration.md").read_text() == render()
