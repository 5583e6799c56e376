"""A frozen matrix between two learnable rotations: W = R W0 P, stored as Megatron and torch store weights, [out, in] = W^T.

The stored weight w' has its rows and columns in the stored order of the two rotations (w' = w[perm_out][:, perm_in]), so that permutations
cost nothing in the GEMM. Checkpoints and exports see feature order only ("canonical").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.cost import choose_compute
from poet_megatron.layers.effective import EffectiveWeight
from poet_megatron.layers.rotation import Rotation
from poet_megatron.layers.side import SideLayout
from poet_megatron.ops.cayley import EXACT, OrthogonalMap
from poet_megatron.ops.merge import merge_into, permute_weight
from poet_megatron.ops.philox import PERMUTATION, StreamKey


@dataclass(frozen=True)
class MatrixId:
    """Names a matrix across ranks and restarts: run seed, global layer number, number of the matrix in its layer."""

    seed: int
    layer: int
    matrix: int


@dataclass(frozen=True)
class ShardSpec:
    """What a rank holds of the two sides.

    Attributes:
        groups_in, groups_out: shard groups of the side on this rank.
        first_group_in, first_group_out: global number of the first of them.
        share_in, share_out: fraction of the tokens that this rank rotates on the side, for compute = auto.
    """

    groups_in: int = 1
    groups_out: int = 1
    first_group_in: int = 0
    first_group_out: int = 0
    share_in: float = 1.0
    share_out: float = 1.0


class RotatedMatrix(nn.Module):
    """y = x R W0 P for row vectors x, with W0 frozen.

    Parameters:
        weight: [out, in], frozen, in stored order (canonical in state_dict).
        rotation_in.skew, rotation_out.skew: see Rotation. A matrix that shares the R of another refers to it without registering it, so
            that it is listed, saved and moved once, with its owner.

    Attributes:
        master: W0 [out, in] in fp32 and feature order, or None. Merges are computed on it and checkpoints hold it.
        master_elsewhere: another data-parallel rank keeps the master, and writes it to checkpoints.
        merge_index: merges so far; selects the permutations.
        sharers: the matrices that share rotation_in, its owner first; all of them merge together.
    """

    rotation_in: Rotation

    def __init__(
        self,
        in_features: int,
        out_features: int,
        config: PoetConfig,
        identity: MatrixId,
        shards: ShardSpec | None = None,
        tokens_per_step: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        shares_with: RotatedMatrix | None = None,
    ) -> None:
        """Allocate the matrix (uninitialized; see load_canonical) and its two factors at merge index 0.

        Args:
            in_features: inputs on this rank.
            out_features: outputs on this rank.
            config: what is learned and how.
            identity: seeds the permutations.
            shards: shard groups on this rank; one group per side by default.
            tokens_per_step: tokens per rank and optimizer step, for compute = auto.
            device: device of the weight.
            dtype: dtype of the weight; skews are float32 unless the module is converted.
            shares_with: owner of the R that this matrix uses.

        Raises:
            ValueError: a block is larger than its side, or the groups do not divide a side.
        """
        super().__init__()
        shards = shards or ShardSpec()
        self.config, self.merge_index = config, 0
        self.sharers: list[RotatedMatrix] = [] if shares_with is None else shares_with.sharers
        self.sharers.append(self)
        capped = max(shards.groups_in, shards.groups_out) > 1  # a side that is not split has all groups
        side_in = SideLayout.build(in_features, shards.groups_in, config.side_block("in"), config.variant, capped)
        side_out = SideLayout.build(out_features, shards.groups_out, config.side_block("out"), config.variant, capped)
        tail = 1.0 if config.neumann_tail == "paper" else 2.0
        orthogonal_map = OrthogonalMap(config.orthogonal_map, config.neumann_terms, tail)
        keys = [StreamKey(identity.seed, PERMUTATION, identity.layer, identity.matrix, side) for side in (0, 1)]
        if shares_with is None:
            self.rotation_in = Rotation(side_in, orthogonal_map, keys[0], shards.first_group_in)
        else:
            object.__setattr__(self, "rotation_in", shares_with.rotation_in)  # past nn.Module, which would register it
        self.rotation_out = Rotation(side_out, orthogonal_map, keys[1], shards.first_group_out)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False)
        shares = {"share_in": shards.share_in, "share_out": shards.share_out}
        self.compute = choose_compute(config.compute, tokens_per_step, side_in, side_out, **shares)
        self.effective: EffectiveWeight | None = None
        if self.compute == "weight":
            self.effective = EffectiveWeight(self)
            self.factor_cache = self.effective.factor_cache
        self.master: Tensor | None = None
        self.master_elsewhere = False
        self._register_state_dict_hook(_canonical_state)
        self._register_load_state_dict_pre_hook(self._store_state)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> y [..., out], dtype of the weight."""
        if self.effective is not None:
            return self.effective(x)
        return self.rotate_output(F.linear(self.rotate_input(x), self.weight))

    def rotate_input(self, x: Tensor) -> Tensor:
        """Apply R: x [..., in] in feature order -> stored order (input-centric computation)."""
        return self.rotation_in(x, output_side=False)

    def rotate_output(self, z: Tensor) -> Tensor:
        """Apply P: z [..., out] in stored order -> feature order (input-centric computation)."""
        return self.rotation_out(z, output_side=True)

    def canonical(self, stored: Tensor) -> Tensor:
        """Bring a [out, in] tensor from stored to feature order (a copy)."""
        return permute_weight(stored, _order(self.rotation_out, inverse=True), _order(self.rotation_in, inverse=True))

    def stored(self, canonical: Tensor) -> Tensor:
        """Bring a [out, in] tensor from feature to stored order (a copy)."""
        return permute_weight(canonical, _order(self.rotation_out), _order(self.rotation_in))

    def keep_master(self) -> None:
        """Keep an fp32 master of W0 from now on, starting from the working weight."""
        self.master = self.canonical(self.weight.detach()).float()

    @torch.no_grad()
    def load_canonical(self, weight: Tensor) -> None:
        """Set W0, and its master if there is one, from a weight [out, in] in feature order."""
        weight = weight.to(self.weight.device)
        if self.master is not None:
            self.master.copy_(weight)
        self.weight.copy_(self.stored(weight))

    @torch.no_grad()
    def set_merge_index(self, merge_index: int) -> None:
        """Redraw the permutations of `merge_index` and re-store the weight accordingly; its canonical form is unchanged.

        Sharers of R are redrawn and re-stored with it.
        """
        if all(matrix.merge_index == merge_index for matrix in self.sharers):
            return
        if self.weight.is_meta:
            self.merge_index = merge_index
            return
        weights = [matrix.canonical(matrix.weight) if matrix.master is None else matrix.master for matrix in self.sharers]
        for matrix in self.sharers:
            matrix._draw(merge_index)
        for matrix, weight in zip(self.sharers, weights, strict=True):
            matrix.load_canonical(weight)

    @torch.no_grad()
    def merged(self, exact: bool = False) -> Tensor:
        """R W0 P [out, in] in feature order, at least fp32, from the master if there is one; the module is unchanged.

        Args:
            exact: merge the exact Cayley map of the same skews (merge_polish = exact).
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        increments_in = _merge_factor(self.rotation_in, dtype, exact)
        increments_out = _merge_factor(self.rotation_out, dtype, exact)
        if self.master is None:
            merged = torch.empty_like(self.weight, dtype=dtype)
            merge_into(self.weight, None, None, None, increments_in, increments_out, merged)
            return self.canonical(merged)
        merged = torch.empty_like(self.master)
        rows, columns, inverse = _order(self.rotation_out), _order(self.rotation_in), _order(self.rotation_in, inverse=True)
        merge_into(self.master, rows, columns, inverse, increments_in, increments_out, merged)
        return merged

    @torch.no_grad()
    def merge(self, exact: bool = False) -> None:
        """Merge-then-reinitialize (paper, step 5): fold R and P into W0, zero the skews, draw the next permutations.

        The arithmetic is fp32; without a master the result is rounded to the dtype of the weight.

        Raises:
            RuntimeError: R is shared, so that all sharers have to be merged before it restarts.
        """
        if len(self.sharers) > 1:
            raise RuntimeError(
                f"R is shared by {len(self.sharers)} matrices: take merged() of each, then restart() each, then load_canonical()"
            )
        weight = self.merged(exact)
        self.restart()
        self.load_canonical(weight)

    @torch.no_grad()
    def restart(self) -> None:
        """Zero the skews and draw the permutations of merge_index + 1; the stored weight is stale until `load_canonical`.

        Calling it once for each sharer of R is right.
        """
        for rotation in (self.rotation_in, self.rotation_out):
            if rotation.skew is not None:
                rotation.skew.zero_()
        self._draw(self.merge_index + 1)

    def get_extra_state(self) -> dict[str, int]:
        """The merge index, which says what permutations the skews of a state_dict belong to."""
        return {"merge_index": self.merge_index}

    def set_extra_state(self, state: dict[str, int]) -> None:
        """Nothing left to do: `_store_state` has drawn the permutations before the tensors were loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotatedMatrix:
        module = super()._apply(fn, recurse)
        if self.master is not None:  # follows the weight to its device, but stays fp32
            self.master = self.master.to(self.weight.device)
        return module

    def _draw(self, merge_index: int) -> None:
        self.merge_index = merge_index
        self.rotation_in.draw(merge_index)
        self.rotation_out.draw(merge_index)

    def _store_state(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        if (extra := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_merge_index(extra["merge_index"])
        if (weight := state_dict.get(f"{prefix}weight")) is None:
            return
        weight = weight.to(self.weight.device)
        if self.master is not None:
            self.master.copy_(weight)
        state_dict[f"{prefix}weight"] = self.stored(weight)


def _canonical_state(module: RotatedMatrix, state_dict: dict[str, Any], prefix: str, _: Mapping[str, Any]) -> None:
    key = f"{prefix}weight"
    if module.master is not None:
        state_dict[key] = module.master
    elif not module.weight.is_meta:
        state_dict[key] = module.canonical(module.weight.detach())


def _order(rotation: Rotation, inverse: bool = False) -> Tensor | None:
    if rotation.skew is None:
        return None
    return rotation.inverse if inverse else rotation.perm


def _merge_factor(rotation: Rotation, dtype: torch.dtype, exact: bool) -> list[Tensor]:
    orthogonal_map = EXACT if exact and rotation.map.kind == "cayley-neumann" else rotation.map  # the other maps are exact
    return [orthogonal_map.increment(q) for q in rotation.skew_blocks(dtype)]
