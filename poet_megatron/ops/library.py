"""The ops of this package as torch operators `torch.ops.poet.*`, with fake kernels and autograd, for torch.compile, export and users.

    poet::permuted_block_product(x, gather, increments, transpose, inverse) -> y
    poet::permuted_block_product_grad(x, gather_x, grad, gather_grad, runs) -> dE of every run
    poet::skew_unpack(packed, block_size) -> Q;  poet::skew_pack_grad(grad_q) -> gradient of packed
    poet::cayley_increment(q, kind, terms, tail) -> E;  poet::cayley_increment_grad(q, increment, grad, kind, terms, tail) -> dQ
    poet::merge(weight, rows, columns, inverse_columns, increments_in, increments_out, out!)

Each calls the Python function of the same name, which takes a compiled kernel where there is one (see native.py). Layers call those
functions themselves: their autograd function adds up gradients over micro-batches, which an operator cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from poet_megatron.ops.cayley import OrthogonalMap
from poet_megatron.ops.merge import merge_into
from poet_megatron.ops.permuted_product import adjacent_runs, permuted_block_product, permuted_block_product_grad
from poet_megatron.ops.skew import packed_length, skew_pack_grad, skew_unpack


def _pairs(runs: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(runs[::2], runs[1::2], strict=True))


@torch.library.custom_op("poet::permuted_block_product", mutates_args=())
def _product(x: Tensor, gather: Tensor | None, increments: Sequence[Tensor], transpose: bool, inverse: Tensor | None) -> Tensor:
    y = permuted_block_product(x, gather, increments, transpose, inverse)
    return y.clone() if y is x else y


@_product.register_fake
def _(x: Tensor, gather: Tensor | None, increments: Sequence[Tensor], transpose: bool, inverse: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _product_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gather, increments, transpose, inverse = inputs
    ctx.transpose = transpose
    ctx.save_for_backward(x, gather, inverse, *increments)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gathers by the inverse permutations; never a scatter-add."""
    x, gather, inverse, *increments = ctx.saved_tensors
    into = None if inverse is None else inverse.argsort().int()
    back = None if gather is None else gather.argsort().int()
    grad = grad.contiguous()
    grad_x = torch.ops.poet.permuted_block_product(grad, into, increments, not ctx.transpose, back)
    runs = [number for e in increments for number in (e.shape[0], e.shape[1])]
    grads = torch.ops.poet.permuted_block_product_grad(x, gather, grad, into, runs)
    return grad_x, None, [(g.mT if ctx.transpose else g).to(e.dtype) for g, e in zip(grads, increments, strict=True)], None, None


_product.register_autograd(_product_backward, setup_context=_product_setup)


@torch.library.custom_op("poet::permuted_block_product_grad", mutates_args=())
def _product_grad(x: Tensor, gather_x: Tensor | None, grad: Tensor, gather_grad: Tensor | None, runs: Sequence[int]) -> list[Tensor]:
    return permuted_block_product_grad(x, gather_x, grad, gather_grad, adjacent_runs(_pairs(runs)))


@_product_grad.register_fake
def _(x: Tensor, gather_x: Tensor | None, grad: Tensor, gather_grad: Tensor | None, runs: Sequence[int]) -> list[Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [x.new_empty(count, size, size, dtype=dtype) for count, size in _pairs(runs)]


@torch.library.custom_op("poet::skew_unpack", mutates_args=())
def _unpack(packed: Tensor, block_size: int) -> Tensor:
    return skew_unpack(packed, block_size)


@_unpack.register_fake
def _(packed: Tensor, block_size: int) -> Tensor:
    return packed.new_empty(packed.shape[0], block_size, block_size)


@torch.library.custom_op("poet::skew_pack_grad", mutates_args=())
def _pack(grad_q: Tensor) -> Tensor:
    return skew_pack_grad(grad_q)


@_pack.register_fake
def _(grad_q: Tensor) -> Tensor:
    return grad_q.new_empty(grad_q.shape[0], packed_length(grad_q.shape[-1]))


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block_size = inputs[1]


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block_size = inputs[0].shape[-1]


# Each is the adjoint of the other.
_unpack.register_autograd(lambda ctx, grad: (torch.ops.poet.skew_pack_grad(grad.contiguous()), None), setup_context=_unpack_setup)
_pack.register_autograd(lambda ctx, grad: torch.ops.poet.skew_unpack(grad.contiguous(), ctx.block_size), setup_context=_pack_setup)


@torch.library.custom_op("poet::cayley_increment", mutates_args=())
def _increment(q: Tensor, kind: str, terms: int, tail: float) -> Tensor:
    return OrthogonalMap(kind, terms, tail).increment(q)


@_increment.register_fake
def _(q: Tensor, kind: str, terms: int, tail: float) -> Tensor:
    return torch.empty_like(q)


@torch.library.custom_op("poet::cayley_increment_grad", mutates_args=())
def _increment_grad(q: Tensor, increment: Tensor, grad: Tensor, kind: str, terms: int, tail: float) -> Tensor:
    """Made skew: along skew directions the maps of this package give the same gradient, whoever computes it."""
    grad_q = OrthogonalMap(kind, terms, tail).increment_grad(q, increment, grad)
    return 0.5 * (grad_q - grad_q.mT)


@_increment_grad.register_fake
def _(q: Tensor, increment: Tensor, grad: Tensor, kind: str, terms: int, tail: float) -> Tensor:
    return torch.empty_like(q)


def _increment_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, *ctx.map = inputs
    ctx.save_for_backward(q, output)


def _increment_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    q, increment = ctx.saved_tensors
    return torch.ops.poet.cayley_increment_grad(q, increment, grad.contiguous(), *ctx.map), None, None, None


_increment.register_autograd(_increment_backward, setup_context=_increment_setup)


@torch.library.custom_op("poet::merge", mutates_args=("out",))
def _merge(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    inverse_columns: Tensor | None,
    increments_in: Sequence[Tensor],
    increments_out: Sequence[Tensor],
    out: Tensor,
) -> None:
    merge_into(weight, rows, columns, inverse_columns, increments_in, increments_out, out)


@_merge.register_fake
def _(
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    inverse_columns: Tensor | None,
    increments_in: Sequence[Tensor],
    increments_out: Sequence[Tensor],
    out: Tensor,
) -> None:
    return None
