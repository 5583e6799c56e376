"""The flop model behind compute = auto, against flops counted while the layer runs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.cost import choose_compute, input_centric_flops, weight_centric_flops
from poet_megatron.layers.effective import EffectiveWeight
from poet_megatron.layers.factor_cache import cached_factors
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix
from poet_megatron.ops import native


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """The reference, whose products torch sees."""
    monkeypatch.setattr(native, "native_available", lambda device_type: False)


class ProductFlops(TorchDispatchMode):
    """Adds up 2 x rows x depth x columns of every matrix product below autograd (torch's own counter misses in-place ones)."""

    FIRST_FACTOR = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__.rstrip("_")
        if name in self.FIRST_FACTOR:
            first = self.FIRST_FACTOR[name]
            self.flops += 2 * args[first].numel() * args[first + 1].shape[-1]
        else:
            assert "mm" not in name and "matmul" not in name and "einsum" not in name, f"a product we do not count: {name}"
        return function(*args, **(kwargs or {}))


def counted(function):
    with ProductFlops() as counter:
        function()
    return counter.flops


def map_flops(matrix):
    """Flops of the orthogonal map and its gradient, which both computations share and the model leaves out."""

    def run():
        for rotation in (matrix.rotation_in, matrix.rotation_out):
            for q in rotation.skew_blocks():
                rotation.map.increment_grad(q, rotation.map.increment(q), torch.ones_like(q))

    return counted(run)


def measured_flops(variant, compute, width_in, width_out, blocks, tokens, micro_batches=2):
    """Flops of the matrix products of one optimizer step, counted."""
    config = PoetConfig(variant=variant, block_size_in=blocks[0], block_size_out=blocks[1])
    matrix = RotatedMatrix(width_in, width_out, config, MatrixId(0, 0, 0))
    matrix.load_canonical(torch.randn(width_out, width_in))
    matrix.effective = EffectiveWeight(matrix) if compute == "weight" else None
    matrix.factor_cache = matrix.effective.factor_cache if compute == "weight" else None

    def step():
        with cached_factors([matrix], micro_batches):
            for _ in range(micro_batches):
                x = torch.randn(tokens // micro_batches, width_in, requires_grad=True)
                matrix(x).sum().backward()

    return counted(step) - map_flops(matrix), matrix


FLOPS = {"input": input_centric_flops, "weight": weight_centric_flops}


@pytest.mark.parametrize("compute", ["input", "weight"])
@pytest.mark.parametrize(
    ("variant", "width_in", "width_out", "blocks"),
    [("bs", 96, 64, (32, 32)), ("bs", 100, 70, (32, 16)), ("fs", 96, 64, (0.5, 0.5)), ("fs", 64, 48, (0.25, 0.75))],
)
def test_the_model_counts_the_products_exactly(variant, width_in, width_out, blocks, compute):
    tokens = 80
    flops, matrix = measured_flops(variant, compute, width_in, width_out, blocks, tokens)
    assert flops == FLOPS[compute](tokens, matrix.rotation_in.layout, matrix.rotation_out.layout)


@pytest.mark.parametrize("compute", ["input", "weight"])
@pytest.mark.parametrize("blocks", [(0.25, 0), (0, 0.25)])
def test_the_model_of_one_sided_layers(blocks, compute):
    """Exact for rotated activations; an upper bound for the effective weight, which may save the products of the frozen side."""
    flops, matrix = measured_flops("fs", compute, 64, 48, blocks, 80)
    layouts = matrix.rotation_in.layout, matrix.rotation_out.layout
    model = FLOPS[compute](80, *layouts)
    saved = 2 * (layouts[0].sum_squares * 48 + layouts[1].sum_squares * 64)
    assert flops == model if compute == "input" else model - saved <= flops <= model


@pytest.mark.parametrize("fraction", [0.125, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [16, 128, 1024])
def test_auto_takes_the_cheaper_computation_for_fully_stochastic_layers(fraction, tokens):
    width_in, width_out = 64, 96
    flops = {c: measured_flops("fs", c, width_in, width_out, (fraction, fraction), tokens)[0] for c in FLOPS}
    cheaper = min(flops, key=flops.get)
    assert flops["input"] != flops["weight"]
    matrix = RotatedMatrix(
        width_in, width_out, PoetConfig(variant="fs", block_size=fraction), MatrixId(0, 0, 0), tokens_per_step=tokens, device="meta"
    )
    assert matrix.compute == cheaper
    assert (matrix.effective is not None) == (cheaper == "weight")


def test_both_choices_of_auto_occur():
    chosen = set()
    for fraction, tokens in [(0.125, 1024), (1.0, 1024)]:
        matrix = RotatedMatrix(
            64, 96, PoetConfig(variant="fs", block_size=fraction), MatrixId(0, 0, 0), tokens_per_step=tokens, device="meta"
        )
        chosen.add(matrix.compute)
    assert chosen == {"input", "weight"}


@pytest.mark.parametrize(("block", "expected"), [(16, "input"), (32, "weight")])
def test_auto_takes_the_cheaper_one_for_block_stochastic_layers(block, expected):
    """3 b (1/m + 1/n) is 0.88 and 1.75 on this layer: small blocks rotate activations, large ones form the weight."""
    flops = {c: measured_flops("bs", c, 96, 128, (block, block), 512)[0] for c in FLOPS}
    matrix = RotatedMatrix(96, 128, PoetConfig(block_size=block), MatrixId(0, 0, 0), tokens_per_step=512, device="meta")
    assert min(flops, key=lambda c: flops[c]) == matrix.compute == expected


@pytest.mark.parametrize("mode", ["input", "weight"])
def test_an_explicit_setting_is_taken(mode):
    layout = RotatedMatrix(64, 64, PoetConfig(variant="fs", block_size=0.5), MatrixId(0, 0, 0)).rotation_in.layout
    assert choose_compute(mode, 1, layout, layout) == mode
