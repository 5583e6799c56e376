"""What only a GPU can show: streams, devices, graphs, and the compiled ops through torch. Skipped without one."""

from __future__ import annotations

import pytest
import torch

from poet_megatron.ops import native
from poet_megatron.ops.merge import merge_into
from poet_megatron.ops.permuted_product import adjacent_runs, permuted_block_product, permuted_block_product_grad

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not native.native_available("cuda"), reason=f"the compiled CUDA ops are not here: {native.load('cuda').why}"),
]


def data(dtype, tokens=1000, width=300, device="cuda"):
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(tokens, width, generator=generator).to(dtype).to(device) for _ in range(2))
    increments = [(torch.randn(count, size, size, generator=generator) / size).to(dtype).to(device) for count, size in ((4, 64), (1, 44))]
    return x, grad, increments, torch.randperm(width, generator=generator).int().to(device)


def rms(tensor):
    return tensor.double().square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_those_of_float64(dtype):
    x, grad, increments, perm = data(dtype)
    exact = [e.double() for e in increments]
    expected = permuted_block_product(x.double(), perm, exact, False, None)
    library = permuted_block_product(x.cpu().float(), perm.cpu(), [e.cpu().float() for e in increments], False, None).to(dtype)
    found = permuted_block_product(x, perm, increments, False, None)
    assert rms(found - expected) <= 2 * rms(library.double() - expected.cpu()) + 1e-12
    runs = adjacent_runs([(4, 64), (1, 44)])
    for mine, oracle in zip(
        permuted_block_product_grad(x, perm, grad, None, runs),
        permuted_block_product_grad(x.double(), perm, grad.double(), None, runs),
        strict=True,
    ):
        assert (mine - oracle).norm() <= 1e-5 * oracle.norm()


def test_results_are_the_same_bits_every_time():
    x, grad, _, perm = data(torch.bfloat16)
    runs = adjacent_runs([(4, 64), (1, 44)])
    first = permuted_block_product_grad(x, perm, grad, None, runs)
    for _ in range(5):
        again = permuted_block_product_grad(x, perm, grad, None, runs)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_launches_follow_the_current_stream():
    x, _, increments, perm = data(torch.bfloat16, tokens=4096)
    expected = permuted_block_product(x, perm, increments, False, None)
    streams = [torch.cuda.Stream() for _ in range(2)]
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # whatever ignores the stream would run before x is overwritten
            own = torch.zeros_like(x)
            own.copy_(x)
            found.append(permuted_block_product(own, perm, increments, False, None))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found)


def test_a_graph_captures_and_replays():
    x, _, increments, perm = data(torch.bfloat16)
    permuted_block_product(x, perm, increments, False, None)  # loads the library outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = permuted_block_product(x, perm, increments, False, None)
    x.mul_(2.0)
    graph.replay()
    assert torch.equal(y, permuted_block_product(x, perm, increments, False, None))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_another_device_run_there():
    arguments = data(torch.float32, device="cuda:1")
    with torch.cuda.device(0):
        found = permuted_block_product(arguments[0], arguments[3], arguments[2], False, None)
    assert found.device.index == 1
    reference = permuted_block_product(arguments[0].cpu(), arguments[3].cpu(), [e.cpu() for e in arguments[2]], False, None)
    torch.testing.assert_close(found.cpu(), reference)


def test_a_merge_is_that_of_the_cpu():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 192, generator=generator)
    sides = [[torch.randn(count, 64, 64, generator=generator) / 64] for count in (3, 4)]
    rows, columns = torch.randperm(256, generator=generator).int(), torch.randperm(192, generator=generator).int()
    inverse = columns.argsort().int()
    expected, found = torch.empty_like(weight), torch.empty_like(weight, device="cuda")
    merge_into(weight, rows, columns, inverse, sides[0], sides[1], expected)
    on_gpu = [tensor.cuda() for tensor in (weight, rows, columns, inverse)]
    merge_into(*on_gpu, [sides[0][0].cuda()], [sides[1][0].cuda()], found)
    torch.testing.assert_close(found.cpu(), expected, rtol=2e-6, atol=1e-5)


@pytest.mark.slow
def test_more_than_two_billion_elements():
    """8.6 GB of bf16 in, as much out: the last rows are right."""
    tokens, width = 2**20 + 8, 2**12
    x = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    x[-8:] = torch.randn(8, width).to(x)
    increments = [(torch.randn(64, 64, 64) / 64).to(x)]
    perm = torch.randperm(width).int().cuda()
    y = permuted_block_product(x, perm, increments, False, None)
    assert torch.equal(y[-8:], permuted_block_product(x[-8:].contiguous(), perm, increments, False, None))
