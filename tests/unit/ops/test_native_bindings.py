"""What the compiled ops refuse, and that the message names op, argument, dtype, shape and bound; layouts that they accept."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from poet_megatron.ops import native

OPS = torch.ops.poet_native
WIDTH = 20
X = torch.arange(3.0 * WIDTH).view(3, WIDTH) / 7
BLOCKS, RAGGED = torch.ones(2, 8, 8), torch.ones(1, 4, 4)
ORDER = torch.arange(WIDTH, dtype=torch.int32).flip(0)
W = torch.zeros(WIDTH, WIDTH)
Q = torch.zeros(2, 4, 4)


@pytest.fixture(autouse=True)
def built() -> None:
    if not native.load("cpu").available:
        pytest.skip(f"the compiled ops are not here: {native.load('cpu').why}")


def product(x: torch.Tensor = X, gather: Any = None, increments: Any = (BLOCKS, RAGGED), inverse: Any = None) -> torch.Tensor:
    return OPS.permuted_block_product(x, gather, list(increments), False, inverse)


def grad(x: torch.Tensor = X, g: torch.Tensor = X, runs: Any = (2, 8, 1, 4), gather: Any = None) -> list[torch.Tensor]:
    return OPS.permuted_block_product_grad(x, gather, g, None, list(runs))


def merge(w: torch.Tensor = W, out: torch.Tensor = W, **given: Any) -> None:
    lists = {name: list(given.pop(name, ())) for name in ("increments_in", "increments_out")}
    OPS.merge(
        w, given.get("rows"), given.get("columns"), given.get("inverse_columns"), lists["increments_in"], lists["increments_out"], out
    )


REFUSED = {
    "element type": (lambda: product(X.double()), "permuted_block_product: x must be float32 or bfloat16, got float64 [3, 20] on cpu"),
    "dimensions": (lambda: product(X[0]), "permuted_block_product: x must be [tokens, width], got float32 [20] on cpu"),
    "index type": (lambda: product(gather=ORDER.long()), "gather must be int32, got int64 [20] on cpu"),
    "index length": (lambda: product(inverse=ORDER[:5]), "inverse must be [20] to go with float32 [3, 20] on cpu, got int32 [5] on cpu"),
    "index range": (lambda: product(gather=ORDER + 1), "gather[0] is 20, must be >= 0 and < 20 to go with float32 [3, 20] on cpu"),
    "negative index": (lambda: product(gather=ORDER - 1), "gather[19] is -1, must be >= 0 and < 20"),
    "wide blocks": (lambda: product(increments=[torch.ones(3, 8, 8)]), "increments: 3 blocks of side 8 do not fit into a width of 20"),
    "wide ragged block": (
        lambda: product(increments=[BLOCKS, torch.ones(1, 5, 5)]),
        "increments: 2 blocks of side 8 and 1 of side 5 do not fit into a width of 20",
    ),
    "block type": (lambda: product(increments=[BLOCKS.bfloat16()]), "increments must be float32, got bfloat16 [2, 8, 8] on cpu"),
    "block shape": (lambda: product(increments=[BLOCKS[:, :4]]), "increments must be [count, size, size], got float32 [2, 4, 8] on cpu"),
    "three runs": (lambda: product(increments=[RAGGED] * 3), "increments must be at most two tensors (full blocks, ragged blocks), got 3"),
    "gradient shape": (lambda: grad(g=X[:2]), "g must have the shape and dtype of x, float32 [3, 20] on cpu, got float32 [2, 20] on cpu"),
    "gradient type": (lambda: grad(g=X.bfloat16()), "permuted_block_product_grad: g must have the shape and dtype of x"),
    "runs": (lambda: grad(runs=[2, 8, 1]), "runs must be [count, size] or [count, size, ragged_count, ragged_size], got 3 numbers"),
    "huge runs": (lambda: grad(runs=[2**40, 2**40]), "runs: 1099511627776 blocks of side 1099511627776 do not fit into a width of 20"),
    "negative runs": (lambda: grad(runs=[-1, 8]), "runs: -1 blocks of side 8; neither may be negative"),
    "packed length": (
        lambda: OPS.skew_unpack(X, 4),
        "skew_unpack: packed must have b (b - 1) / 2 = 6 columns for b = 4, got float32 [3, 20]",
    ),
    "packed type": (lambda: OPS.skew_unpack(X.bfloat16(), 4), "skew_unpack: packed must be float32, got bfloat16 [3, 20] on cpu"),
    "block side": (lambda: OPS.skew_unpack(X, 0), "skew_unpack: b is 0, must be >= 1"),
    "skew shape": (lambda: OPS.skew_pack_grad(X), "skew_pack_grad: dq must be [count, b, b], got float32 [3, 20] on cpu"),
    "series type": (lambda: OPS.series_increment(Q.double(), [0.0, 1.0]), "series_increment: q must be float32, got float64 [2, 4, 4]"),
    "constant term": (lambda: OPS.series_increment(Q, [1.0, 1.0]), "coefficients must be 0, c_1, ..., c_degree with degree >= 1"),
    "no coefficients": (lambda: OPS.series_grad(Q, [], Q), "series_grad: coefficients must be 0, c_1"),
    "series gradient": (
        lambda: OPS.series_grad(Q, [0.0, 1.0], Q[:1]),
        "grad must be float32 [2, 4, 4] on cpu like q, got float32 [1, 4, 4]",
    ),
    "half of a permutation": (lambda: merge(columns=ORDER), "merge: give both columns and inverse_columns, or neither"),
    "merge shape": (
        lambda: merge(out=W[:, :10]),
        "merge: out must have the shape of w, float32 [20, 20] on cpu, got float32 [20, 10] on cpu",
    ),
    "merge overlap": (lambda: merge(W[:10], W[5:15]), "merge: out overlaps w but is not the same matrix in the same dtype"),
    "merge layout": (lambda: merge(out=W.T), "merge: out must have contiguous rows, got strides [1, 20]"),
    "merge rows": (lambda: merge(rows=ORDER[:3]), "merge: rows must be [20] to go with float32 [20, 20] on cpu, got int32 [3] on cpu"),
    "merge blocks": (
        lambda: merge(W[:10], W[10:], increments_out=[BLOCKS]),
        "merge: increments_out: 2 blocks of side 8 do not fit into a width of 10",
    ),
    "merge block type": (lambda: merge(increments_in=[BLOCKS.bfloat16()]), "merge: increments_in must be float32, got bfloat16 [2, 8, 8]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_a_value_error_that_names_it(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call()
    assert str(caught.value).startswith("poet_native::")


def test_rows_may_be_apart_and_anything_else_is_copied() -> None:
    expected = product(X.contiguous(), ORDER)
    apart = torch.full((3, WIDTH + 5), 99.0)
    apart[:, :WIDTH] = X
    columns_first = torch.empty_strided((3, WIDTH), (1, 3)).copy_(X)
    for x in (apart[:, :WIDTH], columns_first):
        assert not x.is_contiguous()
        assert torch.equal(product(x, ORDER), expected)
        for found, wanted in zip(grad(x, x, gather=ORDER), grad(gather=ORDER), strict=True):
            assert torch.equal(found, wanted)
    one = X[:1].expand(3, WIDTH)
    assert torch.equal(product(one, ORDER), product(one.contiguous(), ORDER))
    assert torch.equal(product(X, ORDER, [BLOCKS.mT, RAGGED.mT]), expected)


def test_nothing_to_do_is_done() -> None:
    assert product(X[:0]).shape == (0, WIDTH)
    assert [tuple(g.shape) for g in grad(X[:0], X[:0])] == [(2, 8, 8), (1, 4, 4)]
    assert all(not g.any() for g in grad(X[:0], X[:0]))
    assert torch.equal(product(increments=[]), X) and torch.equal(product(gather=ORDER, increments=[]), X.flip(1))
    assert [tuple(g.shape) for g in grad(runs=[0, 8])] == [(0, 8, 8)]
    assert OPS.skew_unpack(torch.zeros(2, 0), 1).tolist() == [[[0.0]], [[0.0]]]
    assert OPS.skew_pack_grad(torch.zeros(2, 1, 1)).shape == (2, 0)
    assert OPS.series_increment(Q[:0], [0.0, 1.0]).shape == (0, 4, 4)
