"""megatron-core's CUDA names on a CPU: what they mean inside, and that nothing is left behind."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from poet_megatron.parallel.cpu_shim import FACTORIES, cuda_names_on_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="inactive where CUDA exists")


def test_cuda_means_the_cpu_inside():
    with cuda_names_on_cpu():
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.tensor([1.0], device=torch.device("cuda")).device.type == "cpu"
        assert torch.empty_like(torch.zeros(2, device="meta"), device="cuda").device.type == "cpu"
        assert torch.zeros(2, device="meta").is_meta
        assert torch.ones(2).cuda().device.type == "cpu"
        assert torch.ones(2).type() == "torch.cuda.FloatTensor"
        assert torch.ones(2).type(torch.float64).dtype == torch.float64
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(first, torch.rand(3))


def test_everything_is_put_back_even_after_an_error():
    before = [getattr(torch, name) for name in FACTORIES]
    with pytest.raises(KeyError), cuda_names_on_cpu():
        raise KeyError
    assert [getattr(torch, name) for name in FACTORIES] == before
    assert torch.ones(2).type() == "torch.FloatTensor"
    assert "type" not in vars(torch.Tensor) and "cuda" not in vars(torch.Tensor)


def test_device_contexts_work_inside_and_afterwards():
    code = """
import torch
from poet_megatron.parallel.cpu_shim import cuda_names_on_cpu
with cuda_names_on_cpu():
    with torch.device("meta"):
        assert torch.empty(1).is_meta and torch.tensor([1]).is_meta
with torch.device("meta"):
    assert torch.empty(1).is_meta and torch.tensor([1]).is_meta
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)  # in a process that has not used such a context before
