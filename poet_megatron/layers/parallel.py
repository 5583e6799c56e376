"""POET column- and row-parallel linear layers on megatron-core's tensor-parallel groups, with Megatron's constructor and return values.

On each layer one of R and P is split with W0 and the other is replicated: column-parallel layers split the outputs, so P is local and R is
replicated, before the copy or gather; row-parallel layers split the inputs, so R is local and P is replicated, after the reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix, ShardSpec


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
        tokens_per_step: tokens per rank and optimizer step, for compute = auto.
    """

    config: PoetConfig
    seed: int
    layer: int
    parts: tuple[Part, ...]
    tokens_per_step: int


class _PoetParallelLinear(nn.Module):
    """What column- and row-parallel layers share: the matrices, the bias and the sharded checkpoint."""

    shard_axes: dict[str, int]
    bias_axis: dict[str, int]

    def __init__(self, config: TransformerConfig, spec: PoetSpec, bias_size: int, skip_bias_add: bool, tp_group: Any) -> None:
        super().__init__()
        self.spec, self.skip_bias_add = spec, skip_bias_add
        self.sequence_parallel = config.sequence_parallel
        self.tp_group = tp_group if tp_group is not None else parallel_state.get_tensor_model_parallel_group()
        self.matrices = nn.ModuleDict()
        self._kwargs = {"device": None if config.use_cpu_initialization else torch.cuda.current_device(), "dtype": config.params_dtype}
        self.bias = nn.Parameter(torch.zeros(bias_size, **self._kwargs)) if bias_size else None

    def _add(self, part: Part, in_features: int, out_features: int, shards: ShardSpec) -> RotatedMatrix:
        spec = self.spec
        identity = MatrixId(spec.seed, spec.layer, part.matrix)
        matrix = RotatedMatrix(in_features, out_features, spec.config, identity, shards, spec.tokens_per_step, **self._kwargs)
        for rotation in (matrix.rotation_in, matrix.rotation_out):
            rotation.to(device=self._kwargs["device"])
            if rotation.skew is not None:
                rotation.skew.data = rotation.skew.data.to(self._kwargs["dtype"])
        self.matrices[part.name] = matrix
        return matrix

    def _finish(self, output: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.bias is None or self.skip_bias_add:
            return output, self.bias
        return output + self.bias, None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict[str, Any]:
        """Megatron's sharded state: W0 (canonical) and one factor split over tensor-parallel ranks, the other factor replicated."""
        state = self.state_dict(prefix="", keep_vars=True)
        axes = {f"matrices.{name}.{key}": axis for name in self.matrices for key, axis in self.shard_axes.items()} | self.bias_axis
        axes = {key: axis for key, axis in axes.items() if key in state}
        dp_cp_group = (metadata or {}).get("dp_cp_group")
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, tp_group=self.tp_group, dp_cp_group=dp_cp_group)


def _shard_groups(config: PoetConfig, tp_size: int) -> int:
    groups = config.shard_groups or tp_size
    if groups % tp_size:
        raise ValueError(f"parallel.tensor_parallel is {tp_size}, which does not divide poet.shard_groups = {groups}")
    return groups


class PoetColumnParallelLinear(_PoetParallelLinear):
    """Rotated matrices on one input, with outputs split over tensor-parallel ranks; their outputs are joined by `assemble`.

    Parameters:
        matrices.<part>: RotatedMatrix [out / tp, in]; P is local, R is replicated.
        bias: [out / tp] or None, added after P.
    """

    shard_axes = {"weight": 0, "rotation_out.skew": 0}
    bias_axis = {"bias": 0}

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        poet: PoetSpec,
        bias: bool = False,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
        stride: int = 1,
    ) -> None:
        """Megatron's arguments, plus `poet`. Weights are left uninitialized (see model.init).

        Raises:
            ValueError: the parts do not add up to output_size, an expert layer, gather_output, or sizes that shard groups do not divide.
        """
        tp_group = tp_group if tp_group is not None else parallel_state.get_tensor_model_parallel_group()
        tp_size, tp_rank = tp_group.size(), tp_group.rank()
        super().__init__(config, poet, output_size // tp_size if bias else 0, skip_bias_add, tp_group)
        if is_expert or gather_output:
            raise ValueError("POET layers support neither experts (MoE) nor gather_output")
        if sum(part.out_features for part in poet.parts) != output_size:
            raise ValueError(f"parts {poet.parts} do not add up to output_size = {output_size}")
        groups = _shard_groups(poet.config, tp_size)
        local = groups // tp_size
        for part in poet.parts:
            matrix = self._add(part, input_size, part.out_features // tp_size, ShardSpec(groups, local, 0, tp_rank * local))
            _mark(
                matrix, split=matrix.rotation_out.skew, replicated=matrix.rotation_in.skew, axis=0, sequence_parallel=self.sequence_parallel
            )

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] (or [s/tp, b, in] under sequence parallelism) -> ([s, b, out / tp], bias to be added by the caller or None)."""
        outputs = [self._project(matrix, x) for matrix in self.matrices.values() if isinstance(matrix, RotatedMatrix)]
        return self._finish(self.assemble(outputs))

    def assemble(self, outputs: list[Tensor]) -> Tensor:
        """Join the outputs of the parts in Megatron's order; concatenation by default."""
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _project(self, matrix: RotatedMatrix, x: Tensor) -> Tensor:
        if matrix.effective is not None:
            return matrix(self._distribute(x))
        return matrix.rotate_output(F.linear(self._distribute(matrix.rotate_input(x)), matrix.weight))

    def _distribute(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)


class PoetQkvLinear(PoetColumnParallelLinear):
    """Query, key and value as three rotated matrices, joined as Megatron does: per key/value head, its query heads, key and value."""

    def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(*args, config=config, **kwargs)
        self.head_size = config.kv_channels

    def assemble(self, outputs: list[Tensor]) -> Tensor:
        """[s, b, q], [s, b, k], [s, b, v] -> [s, b, q + k + v] interleaved by key/value head."""
        query_groups = outputs[1].shape[-1] // self.head_size
        joined = torch.cat([output.unflatten(-1, (query_groups, -1)) for output in outputs], dim=-1)
        return joined.flatten(-2)


class PoetRowParallelLinear(_PoetParallelLinear):
    """A rotated matrix with inputs split over tensor-parallel ranks.

    Parameters:
        matrices.<part>: RotatedMatrix [out, in / tp]; R is local, P is replicated and follows the reduction (it is linear).
        bias: [out] or None, added after P.
    """

    shard_axes = {"weight": 1, "rotation_in.skew": 0}
    bias_axis: dict[str, int] = {}

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable,
        poet: PoetSpec,
        bias: bool = False,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        is_expert: bool = False,
        tp_comm_buffer_name: str | None = None,
        tp_group: Any = None,
    ) -> None:
        """Megatron's arguments, plus `poet` (with a single part). Weights are left uninitialized (see model.init).

        Raises:
            ValueError: an expert layer, an input that is not parallel, or sizes that shard groups do not divide.
        """
        tp_group = tp_group if tp_group is not None else parallel_state.get_tensor_model_parallel_group()
        tp_size, tp_rank = tp_group.size(), tp_group.rank()
        super().__init__(config, poet, output_size if bias else 0, skip_bias_add, tp_group)
        if is_expert or not input_is_parallel:
            raise ValueError("POET layers support neither experts (MoE) nor inputs that are not split")
        groups = _shard_groups(poet.config, tp_size)
        local = groups // tp_size
        (part,) = poet.parts
        matrix = self._add(part, input_size // tp_size, output_size, ShardSpec(local, groups, tp_rank * local, 0))
        _mark(matrix, split=matrix.rotation_in.skew, replicated=matrix.rotation_out.skew, axis=1, sequence_parallel=self.sequence_parallel)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in / tp] -> ([s, b, out] (or [s/tp, b, out]), bias to be added by the caller or None)."""
        matrix = self._only()
        if matrix.effective is not None:
            return self._finish(self._reduce(matrix(x)))
        return self._finish(matrix.rotate_output(self._reduce(F.linear(matrix.rotate_input(x), matrix.weight))))

    def _only(self) -> RotatedMatrix:
        (matrix,) = self.matrices.values()
        assert isinstance(matrix, RotatedMatrix)
        return matrix

    def _reduce(self, z: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(z, group=self.tp_group)


def _mark(matrix: RotatedMatrix, split: Tensor | None, replicated: Tensor | None, axis: int, sequence_parallel: bool) -> None:
    """Set the attributes by which Megatron counts norms and reduces gradients: split parameters once per rank, replicated ones once."""
    for parameter, dim in ((matrix.weight, axis), (split, 0)):
        if parameter is not None:
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            parameter.partition_dim = dim  # type: ignore[attr-defined]
            parameter.partition_stride = 1  # type: ignore[attr-defined]
    if replicated is not None:
        replicated.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]
