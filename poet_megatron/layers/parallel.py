"""POET column- and row-parallel linear layers on megatron-core's tensor-parallel groups, with Megatron's constructor and return values.

On each layer one of R and P is split with W0 and the other is replicated: column-parallel layers split the outputs, so P is local and R is
replicated; row-parallel layers split the inputs, so R is local and P is replicated, after the reduction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from torch import Tensor
from torch.distributed import ProcessGroup

from poet_megatron.layers.cost import TensorParallelism, choose_compute, choose_placement
from poet_megatron.layers.effective import EffectiveWeight
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.sharded import Part, PoetParallelLinear, PoetSpec

__all__ = ["Part", "PoetColumnParallelLinear", "PoetQkvLinear", "PoetRowParallelLinear", "PoetSpec"]


class PoetColumnParallelLinear(PoetParallelLinear):
    """Rotated matrices on one input, with outputs split over tensor-parallel ranks; their outputs are joined by `assemble`.

    Parameters:
        matrices.<part>: RotatedMatrix [out / tp, in]; P is local, R is replicated.
        bias: [out / tp] or None, added after P.

    Attributes:
        placement: where the input is rotated. "outside": by each part, before a copy or gather of its own (parts that rotate no
            activations, weight-centric or with a frozen R, share one); R's gradient is whole, or under sequence parallelism added up by
            Megatron. "inside": on every rank, after one copy or gather; R's gradient is all-reduced once per step. "shared": by the one R,
            before one copy or gather. The R of a weight-centric part always has the gradient of "inside".
    """

    splits_outputs = True

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
        tp_group: ProcessGroup | None = None,
        stride: int = 1,
    ) -> None:
        """Megatron's arguments, plus `poet`. Weights are left uninitialized (see model.init).

        Raises:
            ValueError: the parts do not add up to output_size, an expert layer, gather_output, or sizes that shard groups do not divide.
        """
        super().__init__(config, poet, skip_bias_add, _resolve(tp_group))
        if is_expert or gather_output:
            raise ValueError("POET layers support neither experts (MoE) nor gather_output")
        if sum(part.out_features for part in poet.parts) != output_size:
            raise ValueError(f"parts {poet.parts} do not add up to output_size = {output_size}")
        self.effective: EffectiveWeight | None = None
        if poet.config.share_input_rotation and len(poet.parts) > 1:
            self._build_shared(input_size)
        else:
            for part in poet.parts:
                self._add_matrix(part, input_size, poet.config)
            self.placement = self._place(config.params_dtype)
        self._add_bias(output_size // self.tp_group.size() if bias else 0)
        for matrix in self.parts:
            self._mark(matrix, partial=matrix.compute == "weight" or self.placement == "inside")

    def forward(self, x: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in] (or [s/tp, b, in] under sequence parallelism) -> ([s, b, out / tp], bias to be added by the caller or None)."""
        outputs = {"outside": self._outside, "inside": self._inside, "shared": self._shared}[self.placement](x)
        return self._finish(self.assemble(outputs))

    def assemble(self, outputs: list[Tensor]) -> Tensor:
        """Join the outputs of the parts in Megatron's order; concatenation by default."""
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _outside(self, x: Tensor) -> list[Tensor]:
        plain = None if all(_rotates(matrix) for matrix in self.parts) else self._distribute(x)
        return [_project(matrix, self._distribute(matrix.rotate_input(x))) if _rotates(matrix) else matrix(plain) for matrix in self.parts]

    def _inside(self, x: Tensor) -> list[Tensor]:
        x = self._distribute(x)
        return [matrix(x) for matrix in self.parts]

    def _shared(self, x: Tensor) -> list[Tensor]:
        if self.effective is not None:
            return list(self.effective(self._distribute(x)).split([matrix.weight.shape[0] for matrix in self.parts], dim=-1))
        x = self._distribute(self.parts[0].rotate_input(x))
        return [_project(matrix, x) for matrix in self.parts]

    def _distribute(self, x: Tensor) -> Tensor:
        if self.sequence_parallel:
            return gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=True, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _build_shared(self, input_size: int) -> None:
        """Create parts that use the R of the first, and decide for all of them together how they compute."""
        spec, owner = self.spec, None
        for part in spec.parts:
            matrix = self._add_matrix(part, input_size, replace(spec.config, compute="input"), owner)
            owner = owner or matrix
        sides_out = [matrix.rotation_out.layout for matrix in self.parts]
        side_in, share = self.parts[0].rotation_in.layout, self._replicated_share()
        compute = choose_compute(spec.config.compute, spec.tokens_per_step, side_in, *sides_out, share_in=share)
        for matrix in self.parts:
            matrix.compute = compute
        if compute == "weight":
            self.effective = EffectiveWeight(*self.parts)
            self.factor_cache = self.effective.factor_cache
        self.placement = "shared"

    def _replicated_share(self) -> float:
        """See PoetParallelLinear. Where several parts may be rotated inside, they are taken to be."""
        config, several = self.spec.config, len(self.spec.parts) > 1
        inside = several and not config.share_input_rotation and config.tp_placement != "outside"
        return 1.0 if inside else super()._replicated_share()

    def _place(self, dtype: torch.dtype) -> str:
        rotating = [matrix.rotation_in.layout for matrix in self.parts if _rotates(matrix)]
        tp = TensorParallelism(self.tp_group.size(), self.sequence_parallel, dtype.itemsize)
        return choose_placement(self.spec.config.tp_placement, self.spec.tokens_per_step, len(self.parts), rotating, tp)


class PoetQkvLinear(PoetColumnParallelLinear):
    """Query, key and value as three rotated matrices, joined as Megatron does: per key/value head, its query heads, key and value."""

    def __init__(self, *args: Any, config: TransformerConfig, tp_group: ProcessGroup | None = None, **kwargs: Any) -> None:
        """See PoetColumnParallelLinear.

        Raises:
            ValueError: the key/value heads cannot be split evenly.
        """
        tp_group = _resolve(tp_group)
        if config.num_query_groups % tp_group.size():
            raise ValueError(
                f"model.num_query_groups is {config.num_query_groups}, which parallel.tensor_parallel = {tp_group.size()} does not divide: "
                "every rank holds whole key/value heads, so choose a tensor_parallel that divides them"
            )
        super().__init__(*args, config=config, tp_group=tp_group, **kwargs)
        self.head_size = config.kv_channels

    def assemble(self, outputs: list[Tensor]) -> Tensor:
        """[s, b, q], [s, b, k], [s, b, v] -> [s, b, q + k + v] interleaved by key/value head."""
        query_groups = outputs[1].shape[-1] // self.head_size
        joined = torch.cat([output.unflatten(-1, (query_groups, -1)) for output in outputs], dim=-1)
        return joined.flatten(-2)


class PoetRowParallelLinear(PoetParallelLinear):
    """A rotated matrix with inputs split over tensor-parallel ranks.

    Parameters:
        matrices.<part>: RotatedMatrix [out, in / tp]; R is local, P is replicated and follows the reduction (it is linear). Weight-centric,
            P is part of every rank's effective weight instead, and its gradient is all-reduced once per step.
        bias: [out] or None, added after P.
    """

    splits_outputs = False

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
        tp_group: ProcessGroup | None = None,
    ) -> None:
        """Megatron's arguments, plus `poet` (with a single part). Weights are left uninitialized (see model.init).

        Raises:
            ValueError: an expert layer, an input that is not parallel, or sizes that shard groups do not divide.
        """
        super().__init__(config, poet, skip_bias_add, _resolve(tp_group))
        if is_expert or not input_is_parallel:
            raise ValueError("POET layers support neither experts (MoE) nor inputs that are not split")
        (part,) = poet.parts
        self._add_bias(output_size if bias else 0)
        matrix = self._add_matrix(part, input_size, poet.config)
        self._mark(matrix, partial=matrix.compute == "weight")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [s, b, in / tp] -> ([s, b, out] (or [s/tp, b, out]), bias to be added by the caller or None)."""
        (matrix,) = self.parts
        if matrix.effective is not None:
            return self._finish(self._reduce(matrix(x)))
        return self._finish(matrix.rotate_output(self._reduce(F.linear(matrix.rotate_input(x), matrix.weight))))

    def _reduce(self, z: Tensor) -> Tensor:
        if self.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(z, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(z, group=self.tp_group)


def _resolve(tp_group: ProcessGroup | None) -> ProcessGroup:
    return parallel_state.get_tensor_model_parallel_group() if tp_group is None else tp_group


def _rotates(matrix: RotatedMatrix) -> bool:
    """Whether the matrix rotates its input activations."""
    return matrix.effective is None and matrix.rotation_in.skew is not None


def _project(matrix: RotatedMatrix, rotated: Tensor) -> Tensor:
    """W0 and P, for an input that R has rotated."""
    return matrix.rotate_output(F.linear(rotated, matrix.weight))
