"""One learnable orthogonal factor: the packed skews of its blocks, its permutation, and its product with activations.

A rotation acts on row vectors as x -> x Psi^T (I + Diag(E)) Psi. The permutation Psi is folded into the frozen weight, so the input side
only gathers (x in feature order -> stored order) and the output side only scatters (stored order -> feature order).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poet_megatron.layers.factor_cache import FactorCache
from poet_megatron.layers.side import SideLayout
from poet_megatron.ops.cayley import OrthogonalMap, orthogonality_defect, skew_norm
from poet_megatron.ops.permuted_product import permuted_block_product, permuted_block_product_grad
from poet_megatron.ops.philox import StreamKey
from poet_megatron.ops.skew import skew_pack_grad, skew_unpack


class Increments:
    """E of one factor: fp32 (or fp64) for the gradient of the map, and cast to the compute dtype for the products."""

    def __init__(self, exact: list[Tensor], dtype: torch.dtype) -> None:
        self.exact = exact
        self.cast = [e.to(dtype) for e in exact]


class Rotation(nn.Module):
    """The factor R (input side) or P (output side) of one matrix.

    Parameters:
        skew: [groups, packed_per_group], the strict upper triangles of the blocks, group-major; absent for a frozen side. Zero at first.

    Attributes:
        partial_over: tensor-parallel group over whose ranks the gradient of `skew` is a partial sum that this factor must add up; None
            where it is whole (a factor split with its matrix), the same on every rank, or added up by Megatron (`skew.sequence_parallel`).
    """

    perm: Tensor
    inverse: Tensor

    def __init__(self, layout: SideLayout, orthogonal_map: OrthogonalMap, key: StreamKey, first_group: int = 0) -> None:
        """Build the factor at merge index 0.

        Args:
            layout: blocks of this side.
            orthogonal_map: map from skew to orthogonal blocks.
            key: names this factor's permutations; its index is replaced by the merge index.
            first_group: global number of this rank's first shard group.
        """
        super().__init__()
        self.layout, self.map, self.key, self.first_group = layout, orthogonal_map, key, first_group
        self.factor_cache: FactorCache[Increments] = FactorCache()
        self.partial_over: dist.ProcessGroup | None = None
        if layout.frozen:
            self.register_parameter("skew", None)
            return
        self.skew = nn.Parameter(torch.zeros(layout.groups, layout.packed_per_group))
        self.register_buffer("perm", torch.zeros(layout.width, dtype=torch.int32), persistent=False)
        self.register_buffer("inverse", torch.zeros(layout.width, dtype=torch.int32), persistent=False)
        self.draw(0)

    def draw(self, merge_index: int) -> None:
        """Draw the permutation of `merge_index` (a pure function of the key; nothing is stored or broadcast)."""
        if self.layout.frozen or self.perm.is_meta:
            return
        key = StreamKey(self.key.seed, self.key.purpose, self.key.layer, self.key.matrix, self.key.side, 0, merge_index)
        perm = torch.from_numpy(self.layout.permutation(key, self.first_group))
        for buffer, values in ((self.perm, perm.int()), (self.inverse, torch.argsort(perm).int())):
            buffer.copy_(values.pin_memory() if buffer.is_cuda else values, non_blocking=True)

    def skew_blocks(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Q of every run [count, size, size], in at least fp32 (no gradient)."""
        if self.skew is None:
            return []
        layout = self.layout
        packed = self.skew.detach()
        packed = packed.to(dtype or torch.promote_types(packed.dtype, torch.float32))
        blocks = [skew_unpack(packed[:, : layout.packed_full].reshape(layout.groups * layout.full, -1), layout.block_size)]
        if layout.ragged:
            blocks.append(skew_unpack(packed[:, layout.packed_full :], layout.ragged))
        return blocks

    def increments(self, dtype: torch.dtype) -> Increments:
        """E of every run for the current skews, cached within a step."""
        return self.factor_cache.factor(lambda: Increments([self.map.increment(q) for q in self.skew_blocks()], dtype))

    def skew_grad(self, increments: Increments, grads: list[Tensor]) -> Tensor:
        """Gradient of `skew` for the gradients of E of every run, added up over `partial_over` in at least fp32."""
        layout = self.layout
        runs = [
            skew_pack_grad(self.map.increment_grad(q, e, g.to(q.dtype))).reshape(layout.groups, -1)
            for q, e, g in zip(self.skew_blocks(), increments.exact, grads, strict=True)
        ]
        packed = torch.cat(runs, dim=1)
        if self.partial_over is not None:
            dist.all_reduce(packed, group=self.partial_over)
        return packed.to(self.skew.dtype)

    def forward(self, x: Tensor, output_side: bool) -> Tensor:
        """Rotate activations.

        Args:
            x: [..., width]; in feature order on the input side, in stored order on the output side.
            output_side: which side this factor is on.

        Returns:
            [..., width]; in stored order on the input side, in feature order on the output side.
        """
        if self.skew is None:
            return x
        last = self.factor_cache.is_last()
        # Only the last micro-batch of a step is connected to the skews, so that their gradient hooks fire exactly once, with the whole sum.
        anchor = self.skew if last or not torch.is_grad_enabled() else x.new_zeros((), requires_grad=True)
        return _Rotate.apply(x, anchor, self, output_side, last)

    @torch.no_grad()
    def diagnostics(self) -> Tensor:
        """[|G G^T - I|_F^2, |I|_F^2, largest |Q|_2] over the blocks of this factor, float64, on its device: nothing waits for it."""
        runs = self.skew_blocks()
        if not runs:
            return torch.zeros(3, dtype=torch.float64)
        defect = torch.stack([orthogonality_defect(self.map.increment(q)).double() for q in runs]).sum()
        norm = torch.stack([skew_norm(q).double() for q in runs]).max()
        return torch.stack([defect, torch.full_like(defect, sum(q.shape[0] * q.shape[1] for q in runs)), norm])


class _Rotate(torch.autograd.Function):
    """The permuted block product; saves x only, and gathers by the inverse permutation on the way back (never a scatter-add).

    Stored order is gathered from feature order by `perm`; feature order from stored order by `inverse`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, anchor: Tensor, rotation: Rotation, output_side: bool, last: bool) -> Tensor:  # type: ignore[no-untyped-def]
        increments = rotation.increments(x.dtype)
        ctx.save_for_backward(x)
        ctx.rotation, ctx.output_side, ctx.last, ctx.increments = rotation, output_side, last, increments
        gather, inverse = (None, rotation.inverse) if output_side else (rotation.perm, None)
        return permuted_block_product(x.reshape(-1, x.shape[-1]), gather, increments.cast, False, inverse).view(x.shape)

    @staticmethod
    def backward(ctx, grad_y: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        rotation: Rotation = ctx.rotation
        flat, grad = x.reshape(-1, x.shape[-1]), grad_y.reshape(-1, x.shape[-1])
        gather_x, gather_grad, inverse = (None, rotation.perm, None) if ctx.output_side else (rotation.perm, None, rotation.inverse)
        grads = permuted_block_product_grad(flat, gather_x, grad, gather_grad, rotation.layout.runs)
        total = rotation.factor_cache.add(grads)
        grad_skew = rotation.skew_grad(ctx.increments, total) if ctx.last and ctx.needs_input_grad[1] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = permuted_block_product(grad, gather_grad, ctx.increments.cast, True, inverse).view(x.shape)
        return grad_x, grad_skew, None, None, None
