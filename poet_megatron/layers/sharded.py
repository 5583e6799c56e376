"""What POET's tensor-parallel layers have in common: their matrices, bias, marks for Megatron, and sharded checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix, ShardSpec
from poet_megatron.layers.rotation import Rotation


@dataclass(frozen=True)
class Part:
    """One rotated matrix of a fused layer: its name, its number in the layer and its outputs over all ranks."""

    name: str
    matrix: int
    out_features: int


@dataclass(frozen=True)
class PoetSpec:
    """What a POET layer needs beyond Megatron's arguments.

    Attributes:
        config: POET settings.
        seed: run seed.
        layer: global layer number, from 0.
        parts: the matrices of the layer.
        tokens_per_step: tokens per optimizer step of one data-parallel replica, for compute and tp_placement = auto.
    """

    config: PoetConfig
    seed: int
    layer: int
    parts: tuple[Part, ...]
    tokens_per_step: int


class PoetParallelLinear(nn.Module):
    """Rotated matrices whose outputs (and P) or inputs (and R) are split over tensor-parallel ranks; the other factor is replicated.

    Attributes:
        splits_outputs: which of the two.
        matrices: the parts by name.
    """

    splits_outputs: bool

    def __init__(self, config: TransformerConfig, spec: PoetSpec, skip_bias_add: bool, tp_group: ProcessGroup) -> None:
        super().__init__()
        self.spec, self.skip_bias_add, self.tp_group = spec, skip_bias_add, tp_group
        self.sequence_parallel = config.sequence_parallel
        self.shard_groups = _shard_groups(spec.config, tp_group.size())
        self.matrices = nn.ModuleDict()
        self._kwargs = {"device": None if config.use_cpu_initialization else torch.cuda.current_device(), "dtype": config.params_dtype}

    @property
    def parts(self) -> list[RotatedMatrix]:
        """The rotated matrices in order."""
        return [matrix for matrix in self.matrices.values() if isinstance(matrix, RotatedMatrix)]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron's sharded state: W0 (canonical), one factor and a column bias split over tensor-parallel ranks, the rest replicated.

        Where data-parallel ranks share out the fp32 masters, each weight comes from the rank that has its master, and from no other.
        """
        state = self.state_dict(prefix="", keep_vars=True)
        weights = {f"matrices.{name}.weight": matrix for name, matrix in zip(self.matrices, self.parts, strict=True)}
        state = {key: value for key, value in state.items() if not (key in weights and weights[key].master_elsewhere)}
        dp_cp_group = (metadata or {}).get("dp_cp_group") or parallel_state.get_data_parallel_group(with_context_parallel=True)
        axes = {key: axis for key in state if (axis := self._split_axis(key)) is not None}
        entries = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=dp_cp_group)
        for key, matrix in weights.items():
            if matrix.master is not None:
                entries[prefix + key].replica_id = (0, 0, 0)
        return entries

    def _split_axis(self, key: str) -> int | None:
        """Axis along which tensor-parallel ranks split a tensor of the state, None if it is replicated."""
        if key.endswith(".weight"):
            return 0 if self.splits_outputs else 1
        return 0 if key.endswith(("rotation_out.skew", "bias") if self.splits_outputs else "rotation_in.skew") else None

    def _add_bias(self, size: int) -> None:
        """Create the bias (size 0: none), which is added after P; replicated on a row-parallel layer."""
        self.bias = nn.Parameter(torch.zeros(size, **self._kwargs)) if size else None
        if self.bias is not None and self.splits_outputs:
            mark_split(self.bias, 0)
        elif self.bias is not None:
            self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def _add_matrix(self, part: Part, in_features: int, config: PoetConfig, owner: RotatedMatrix | None = None) -> RotatedMatrix:
        """Create the matrix of a part from its sizes over all ranks, using the R of `owner` if given."""
        spec, tp_size = self.spec, self.tp_group.size()
        out_features = part.out_features
        self._check_groups(part.name, {"inputs": in_features, "outputs": out_features})
        local = self.shard_groups // tp_size
        first, share = self.tp_group.rank() * local, self._replicated_share()
        if self.splits_outputs:
            shards, out_features = ShardSpec(self.shard_groups, local, 0, first, share_in=share), out_features // tp_size
        else:
            shards, in_features = ShardSpec(local, self.shard_groups, first, 0, share_out=share), in_features // tp_size
        identity = MatrixId(spec.seed, spec.layer, part.matrix)
        matrix = RotatedMatrix(in_features, out_features, config, identity, shards, spec.tokens_per_step, **self._kwargs, shares_with=owner)
        for rotation in (matrix.rotation_in, matrix.rotation_out):
            rotation.to(device=self._kwargs["device"])
            if rotation.skew is not None:
                rotation.skew.data = rotation.skew.data.to(self._kwargs["dtype"])
        self.matrices[part.name] = matrix
        return matrix

    def _replicated_share(self) -> float:
        """Fraction of the tokens that this rank rotates with a replicated factor."""
        return 1 / self.tp_group.size() if self.sequence_parallel else 1.0

    def _check_groups(self, name: str, widths: dict[str, int]) -> None:
        for side, width in widths.items():
            if width % self.shard_groups:
                raise ValueError(
                    f"poet.shard_groups is {self.shard_groups}, which does not divide the {width} {side} of {name}: "
                    f"set it to a multiple of parallel.tensor_parallel = {self.tp_group.size()} that divides every width"
                )

    def _mark(self, matrix: RotatedMatrix, partial: bool) -> None:
        """Set what Megatron's norms and gradient reductions go by: split parameters count on every rank, replicated ones once.

        Args:
            matrix: a matrix of this layer.
            partial: whether every rank has a partial sum of the gradient of the replicated factor, which then adds it up itself. Otherwise
                that gradient is whole, except that under sequence parallelism it is the sum over this rank's tokens, and left to Megatron.
        """
        split, replicated = matrix.rotation_out, matrix.rotation_in
        if not self.splits_outputs:
            split, replicated = replicated, split
        mark_split(matrix.weight, 0 if self.splits_outputs else 1)
        if split.skew is not None:
            mark_split(split.skew, 0)
        self._mark_replicated(replicated, partial)

    def _mark_replicated(self, rotation: Rotation, partial: bool) -> None:
        if rotation.skew is None:
            return
        rotation.partial_over = self.tp_group if partial and self.tp_group.size() > 1 else None
        rotation.skew.sequence_parallel = self.sequence_parallel and not partial  # type: ignore[attr-defined]

    def _finish(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.bias is None or self.skip_bias_add:
            return output, self.bias
        return output + self.bias, None


def mark_split(parameter: Tensor, axis: int) -> None:
    """Mark a parameter as split over tensor-parallel ranks, as Megatron does, so that gradient norms count every rank's share."""
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    parameter.partition_dim = axis  # type: ignore[attr-defined]
    parameter.partition_stride = 1  # type: ignore[attr-defined]


def _shard_groups(config: PoetConfig, tp_size: int) -> int:
    groups = config.shard_groups or tp_size
    if groups % tp_size:
        raise ValueError(
            f"parallel.tensor_parallel is {tp_size}, which does not divide poet.shard_groups = {groups}: choose a divisor of {groups}, "
            f"or, for a new run, a multiple of {tp_size} as poet.shard_groups"
        )
    return groups
