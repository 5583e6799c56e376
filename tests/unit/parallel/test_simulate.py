"""A simulated world has the groups of a real one, and tensors without data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state

from poet_megatron.parallel.collectives import CollectiveCounter
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.parallel.context import parallel_context
from poet_megatron.parallel.simulate import simulated_world


def test_groups_of_a_large_world():
    config = ParallelConfig(tensor_parallel=8, pipeline_parallel=4)
    with simulated_world(config, 1024, 3 * 256 + 8 * 5 + 2) as context:
        assert (context.rank, context.world_size, context.data_size, context.data_rank) == (3 * 256 + 42, 1024, 32, 5)
        assert parallel_state.get_tensor_model_parallel_rank() == 2
        assert parallel_state.get_pipeline_model_parallel_rank() == 3
        assert dist.get_process_group_ranks(parallel_state.get_pipeline_model_parallel_group()) == [42 + 256 * stage for stage in range(4)]
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_collectives_complete_and_are_seen():
    with simulated_world(ParallelConfig(tensor_parallel=2), 4, 0), CollectiveCounter() as counter:
        group = parallel_state.get_tensor_model_parallel_group()
        whole, part = torch.empty(8), torch.empty(4)
        dist.all_reduce(whole, group=group)
        dist.all_gather_into_tensor(whole, part, group=group)
        work = dist.reduce_scatter_tensor(part, whole, group=group, async_op=True)
        assert work is not None
        work.wait()
        with dist._coalescing_manager(group):
            dist.all_reduce(whole, group=group)
            dist.all_reduce(part, group=group)
    assert counter.calls(0, 1) == {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    assert counter.bytes(0, 1) == {"all_reduce": 32 + 48, "all_gather": 32, "reduce_scatter": 32}


def test_tensors_have_no_data_unless_they_are_made_of_numbers():
    with simulated_world(ParallelConfig(), 1, 0):
        assert torch.empty(2**40).is_meta and torch.zeros(3, device="cuda").is_meta
        assert torch.zeros(3, device=torch.cuda.current_device()).is_meta
        assert torch.tensor([7]).item() == 7
        assert not torch.cuda.is_available()
    assert not torch.zeros(3).is_meta


class Again(torch.autograd.Function):
    """Runs a function in the backward pass, as recomputation does."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        with torch.enable_grad():
            x = torch.empty(1, 2, 16, 8, device="meta", requires_grad=True)
            ctx.seen.append(_saved(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True)))
        return grad, None


def _saved(function) -> set[tuple[int, ...]]:
    shapes = set()

    def keep(tensor):
        shapes.add(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return shapes


def test_attention_keeps_no_matrix_forward_or_recomputed():
    seen: list = []
    with simulated_world(ParallelConfig(), 1, 0):
        x = torch.empty(1, 2, 16, 8, requires_grad=True)
        seen.append(_saved(lambda: F.scaled_dot_product_attention(x, x, x, is_causal=True)))
        Again.apply(x, seen).sum().backward()
    assert len(seen) == 2
    for shapes in seen:
        assert (1, 2, 16, 8) in shapes and not any(shape[-2:] == (16, 16) for shape in shapes)


def test_not_inside_a_real_world():
    with (
        parallel_context(ParallelConfig(), 0),
        pytest.raises(RuntimeError, match="part of one"),
        simulated_world(ParallelConfig(), 2, 0),
    ):
        pass
