"""Initial weights do not depend on the number of threads: torchrun gives each rank one, a single process takes them all."""

from __future__ import annotations

import pytest
import torch

from poet_megatron.model.config import INITS
from poet_megatron.model.init import initial_weight


@pytest.mark.parametrize("shape", [(512, 512), (300, 700)])
@pytest.mark.parametrize("init", INITS)
def test_the_same_bits_on_one_thread_and_on_two(init: str, shape: tuple[int, int]):
    gaussian = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    before = torch.get_num_threads()
    weights = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weights.append(initial_weight(gaussian.clone(), init, 0.02))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*weights)
