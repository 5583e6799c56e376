"""Fixtures of the CUDA kernel tests: `device` is every device there is, `simulator` the PTX simulator alone.

A plugin of each test module, not a conftest: other tests import from the one conftest that there is.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from harness import SEEDS, Device, Gpu, Simulator

from benchmarks.cuda_toolchain import MissingToolError

DEVICES = {"simulator": Simulator, "gpu": Gpu}


def _open(name: str) -> Device:
    try:
        return DEVICES[name]()
    except MissingToolError as missing:
        pytest.skip(str(missing))


@pytest.fixture(params=["simulator", *(["gpu"] if torch.cuda.is_available() else [])])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    """The PTX simulator and, where there is one, the GPU."""
    opened = _open(request.param)
    yield opened
    opened.release()


@pytest.fixture
def simulator() -> Iterator[Simulator]:
    """The PTX simulator, for what only it can tell: counters and planted faults."""
    opened = _open("simulator")
    assert isinstance(opened, Simulator)
    yield opened
    opened.release()


@pytest.fixture(params=SEEDS, ids=lambda seed: f"seed{seed}")
def seed(request: pytest.FixtureRequest) -> int:
    """Schedules of blocks and warps."""
    return request.param
