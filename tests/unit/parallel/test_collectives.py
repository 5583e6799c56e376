"""The counter sees collectives however they are called: forward, backward, asynchronously, or by a function bound elsewhere."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import mappings

from poet_megatron.parallel.collectives import Collective, CollectiveCounter


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


class ReducedBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        dist.all_reduce(grad)
        return grad


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_every_collective_is_recorded(group):
    x = torch.ones(6, requires_grad=True)
    other = dist.new_group([0])
    with CollectiveCounter() as counter:
        ReducedBackward.apply(x).sum().backward()
        mappings.dist_all_gather_func(torch.empty(6), x.detach(), group=group, async_op=True).wait()
        mappings.dist_reduce_scatter_func(torch.empty(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16), group=other)
        dist.all_gather([torch.empty(2)], torch.ones(2))
        dist.broadcast(torch.ones(3, dtype=torch.float64), src=0)
        dist.barrier()
    dist.all_reduce(torch.ones(1))  # outside
    assert counter.records == [
        Collective("all_reduce", (0,), 24),
        Collective("all_gather", (0,), 24),
        Collective("reduce_scatter", (0,), 12),
        Collective("all_gather", (0,), 8),
        Collective("broadcast", (0,), 24),
    ]
    assert counter.calls() == counter.calls(0) == {"all_reduce": 1, "all_gather": 2, "reduce_scatter": 1, "broadcast": 1}
    assert counter.bytes() == {"all_reduce": 24, "all_gather": 32, "reduce_scatter": 12, "broadcast": 24}
    assert counter.calls(0, 1) == counter.bytes(0, 1) == {}
