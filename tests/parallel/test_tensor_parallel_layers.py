"""POET layers split over 2 and 4 tensor-parallel ranks equal the unsplit ones (cases_layers.py has the cases and what they check)."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from cases_layers import CASES

ROOT = Path(__file__).parents[2]


@functools.cache
def results(ranks: int) -> dict[str, dict]:
    """Run every case on `ranks` processes, once."""
    script = Path(__file__).with_name("cases_layers.py")
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), str(script), str(output)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
        assert output.exists(), f"no results from {ranks} ranks:\n{done.stderr[-3000:]}"
        return json.loads(output.read_text())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_layer(ranks: int, name: str):
    error = results(ranks)[name]["error"]
    assert not error, error
