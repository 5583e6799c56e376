"""What is installed and set on each rank, and who differs."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import pytest
import torch
from known_worlds import only, statuses, world

from poet_megatron.health import versions
from poet_megatron.health.versions import judge, read

ROW = {"python": "3.11.7", "torch": "2.9.0", "driver": "550.54.15", "$NCCL_IB_HCA": "mlx5_0", "apex": "none"}
ROSTER = world(a=2, b=1, c=1)


def rows(changed: int, **changes: str) -> list[dict[str, str]]:
    return [ROW | changes if rank == changed else dict(ROW) for rank in range(4)]


def test_equal_rows_are_one_line_of_versions() -> None:
    (found,) = judge(rows(-1), ROSTER)
    assert found.status == "ok" and found.what == "python 3.11.7, torch 2.9.0, driver 550.54.15: the same on all ranks"


def test_one_rank_with_another_version_fails() -> None:
    (found,) = judge(rows(2, torch="2.8.0"), ROSTER)
    assert found.status == "FAIL" and found.ranks == (2,) and found.nodes == ("b",)
    assert found.what == "torch: 2.8.0 on rank 2 on b; 2.9.0 elsewhere"


def test_a_missing_package_is_a_difference() -> None:
    assert "apex: 0.1 on rank 3 on c; none elsewhere" in only(judge(rows(3, apex="0.1"), ROSTER), "FAIL").what


@pytest.mark.parametrize(("name", "value"), [("driver", "535.1"), ("$NCCL_IB_HCA", "mlx5_1"), ("$NCCL_DEBUG", "INFO")])
def test_drivers_and_variables_that_differ_are_warnings(name: str, value: str) -> None:
    found = judge(rows(1, **{name: value}), ROSTER)
    assert statuses(found) == ["ok", "warn"] and found[1].ranks == (1,) and found[1].nodes == ("a",)
    assert found[1].what.startswith(name.removeprefix("$") + ":")


def test_a_variable_that_is_not_set_everywhere_says_so() -> None:
    assert "NCCL_DEBUG: INFO on rank 1 on a; not set elsewhere" in only(judge(rows(1, **{"$NCCL_DEBUG": "INFO"}), ROSTER), "warn").what


def test_in_a_tie_rank_0_is_taken_as_right() -> None:
    found = only(judge([ROW, ROW, *[ROW | {"torch": "2.8.0"}] * 2], ROSTER), "FAIL")
    assert found.ranks == (2, 3) and "2.8.0 on ranks 2 on b and 3 on c; 2.9.0 elsewhere" in found.what


def test_rank_0_is_blamed_if_it_alone_differs() -> None:
    assert only(judge(rows(0, torch="2.8.0"), ROSTER), "FAIL").ranks == (0,)


def test_what_is_read_is_what_is_here() -> None:
    found = read({"NCCL_DEBUG": "INFO"})
    assert found["python"] == platform.python_version() and found["torch"] == torch.__version__ and found["$NCCL_DEBUG"] == "INFO"
    assert found["compiled ops"].startswith("cpu ") and found["transformer-engine"] == "none"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=versions.PACKAGE_FOLDER, capture_output=True, text=True, check=False).stdout
    assert found["git revision"].split(" ")[0] == (head.strip()[:12] or "none")


def test_the_digest_changes_with_any_source_file(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1\n")
    before = versions._digest(tmp_path)
    (tmp_path / "notes.txt").write_text("not code")
    assert versions._digest(tmp_path) == before
    (tmp_path / "sub" / "a.py").write_text("x = 2\n")
    assert versions._digest(tmp_path) != before


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc 11.4.0\n",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)\n", "570.86.15"),
        ("something else", "unknown"),
    ],
)
def test_the_driver_names_its_version(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text)
    assert versions.driver_version(tmp_path / "version") == version
    assert versions.driver_version(tmp_path / "none") == "none"
