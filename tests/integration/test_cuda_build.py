"""The CUDA library compiles without a GPU and a CUDA build of torch, and loads where there is neither driver nor CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import toolchain

ROOT = Path(__file__).parents[2]
LOAD = """
import sys
from pathlib import Path
from poet_megatron.ops import native
native.FOLDER = Path(sys.argv[1])
assert native.native_available("cuda"), native.load("cuda").why
assert {found.cuda for found in native.explain()} == {"native"}
import torch
needed = [] if torch.version.cuda else [line for line in open("/proc/self/maps") if "libcuda" in line]
assert not needed, needed
"""


@pytest.mark.slow
def test_the_cuda_ops_build_and_load(tmp_path: Path) -> None:
    try:
        toolchain.find_nvcc(os.environ)
        toolchain.find_compiler(os.environ)
    except toolchain.MissingToolError as error:
        pytest.skip(str(error))
    command = [sys.executable, "setup.py", "build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    environment = {**os.environ, "POET_NATIVE": "1", "POET_CUDA": "1", "POET_CUDA_ARCHS": "80"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "lib" / "poet_megatron")], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
