"""The model as a flat list of canonical tensors (layers.0.q, layers.0.gate, embed, ...), whatever Megatron fuses and POET permutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.parallel import PoetColumnParallelLinear, PoetRowParallelLinear
from poet_megatron.model.build import part_sizes
from poet_megatron.model.config import ModelConfig
from poet_megatron.model.naming import SPLIT_AXES, layer_tensor


@dataclass(frozen=True)
class Slot:
    """One canonical tensor of the model on this rank.

    Attributes:
        name: canonical name.
        layer: global layer number, or None outside the layers.
        shape: shape of the whole tensor.
        part: what this tensor-parallel rank has of it, a slice per dimension.
        read: this rank's part, merged, in feature order, at least fp32.
        write: sets this rank's part of W0 (or of the dense parameter) from a tensor in feature order.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    part: tuple[slice, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def canonical_slots(model: MegatronModule, config: ModelConfig) -> Iterator[Slot]:
    """Every tensor of this rank's part of the model, in a fixed order.

    Args:
        model: a GPTModel (one pipeline stage), not wrapped.
        config: its architecture.
    """
    tp = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size())
    sizes = {name: size // tp[1] for name, size in part_sizes(config).items()}
    if model.pre_process:
        yield _dense("embed", None, model.embedding.word_embeddings.weight, tp)
    for module in model.decoder.layers:
        layer = module.layer_number - 1
        attention, mlp = module.self_attention, module.mlp
        yield _dense("attention_norm", layer, module.input_layernorm.weight, tp)
        yield from _linear(layer, attention.linear_qkv, _qkv_rows(config.query_groups // tp[1], sizes), tp)
        yield from _linear(layer, attention.linear_proj, {"o": slice(None)}, tp)
        yield _dense("mlp_norm", layer, module.pre_mlp_layernorm.weight, tp)
        yield from _linear(layer, mlp.linear_fc1, {"gate": slice(0, sizes["gate"]), "up": slice(sizes["gate"], None)}, tp)
        yield from _linear(layer, mlp.linear_fc2, {"down": slice(None)}, tp)
    if model.post_process:
        yield _dense("final_norm", None, model.decoder.final_layernorm.weight, tp)
        yield _dense("lm_head", None, model.output_layer.weight, tp)


def _linear(layer: int, module: torch.nn.Module, rows: dict[str, slice | Tensor], tp: tuple[int, int]) -> Iterator[Slot]:
    for name, selection in rows.items():
        if isinstance(module, PoetColumnParallelLinear | PoetRowParallelLinear):
            matrix = module.matrices[name]
            assert isinstance(matrix, RotatedMatrix)
            yield _slot(name, layer, tuple(matrix.weight.shape), tp, matrix.merged, matrix.load_canonical)
        else:
            assert isinstance(module.weight, Tensor)
            yield _dense(name, layer, module.weight, tp, selection)


def _dense(name: str, layer: int | None, parameter: Tensor, tp: tuple[int, int], rows: slice | Tensor = slice(None)) -> Slot:
    def read() -> Tensor:
        return parameter.detach()[rows].to(torch.promote_types(parameter.dtype, torch.float32))

    def write(value: Tensor) -> None:
        with torch.no_grad():
            parameter[rows] = value.to(parameter)

    with torch.device("meta"):
        shape = tuple(torch.empty(parameter.shape)[rows if isinstance(rows, slice) else rows.to("meta")].shape)
    return _slot(name, layer, shape, tp, read, write)


def _slot(
    name: str, layer: int | None, local: tuple[int, ...], tp: tuple[int, int], read: Callable[[], Tensor], write: Callable[[Tensor], None]
) -> Slot:
    """The slot of a tensor of which this rank has `local` elements per dimension."""
    axis = SPLIT_AXES.get(name)
    rank, size = tp
    shape = tuple(length * size if dimension == axis else length for dimension, length in enumerate(local))
    part = tuple(
        slice(length * rank, length * (rank + 1)) if dimension == axis else slice(0, length) for dimension, length in enumerate(local)
    )
    return Slot(name if layer is None else layer_tensor(layer, name), layer, shape, part, read, write)


def _qkv_rows(groups: int, sizes: dict[str, int]) -> dict[str, slice | Tensor]:
    """Rows of q, k, v in Megatron's fused weight: per key/value head, its query heads, its key, its value; all on this rank."""
    widths = [sizes[name] // groups for name in ("q", "k", "v")]
    rows = torch.arange(sum(widths) * groups).view(groups, -1).split(widths, dim=1)
    return {name: part.flatten() for name, part in zip(("q", "k", "v"), rows, strict=True)}
