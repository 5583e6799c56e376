"""Merges on several ranks: the result of one rank, whatever the optimizer and the layout (cases_merge.py has the cases)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases_merge import CASES, RANKS

ROOT = Path(__file__).parents[2]
MERGES = [name for name, case in CASES.items() if case.check == "merge"]


@functools.cache
def results() -> dict[str, dict]:
    """Run every case on 4 processes, once."""
    script = Path(__file__).with_name("cases_merge.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, str(script), str(output)], capture_output=True, text=True, env=environment, timeout=900)
        assert output.exists(), f"no results from {RANKS} ranks:\n{done.stderr[-3000:]}"
        return json.loads(output.read_text())


@pytest.mark.parametrize("name", CASES)
def test_case(name: str):
    """Merging: reset, weights, bytes. Overlap. Replicas: found and not found (see the checks)."""
    error = results()[name]["error"]
    assert not error, error


@pytest.mark.parametrize("name", MERGES)
def test_the_function_is_unchanged(name: str):
    """Evaluation loss across a merge: a few ulp in fp32; in bf16 the merged weights are rounded again, each to 2^-9."""
    assert results()[name]["loss_moved"] < (1e-3 if "bf16" in name else 1e-6)


def test_masters_keep_the_spectrum_over_100_merges():
    """|Q|_2 = 0.3, exact map, TP2 x DP2 in bf16: gathered weights, column- and row-parallel, to 1e-3; their masters to fp32 rounding."""
    figures = results()["spectrum-tp2-masters"]
    assert 0.25 < figures["smallest_skew_norm"] < figures["largest_skew_norm"] < 0.4
    for name in ("gate", "down"):
        assert figures[f"{name} working"] < 1e-3
        assert figures[f"{name} master"] < 2e-6


def test_without_masters_the_spectrum_drifts():
    """The same merges rounded to bf16 each time: beyond the bound that masters keep, and several times their drift."""
    rounded, kept = results()["spectrum-tp2-rounded"], results()["spectrum-tp2-masters"]
    for name in ("gate working", "down working"):
        assert rounded[name] > 1e-3
        assert rounded[name] > 5 * kept[name]
