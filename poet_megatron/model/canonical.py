"""The model as a flat list of canonical tensors (layers.0.q, layers.0.gate, embed, ...), whatever Megatron fuses and POET permutes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.parallel import PoetColumnParallelLinear, PoetRowParallelLinear
from poet_megatron.model.build import part_sizes
from poet_megatron.model.config import ModelConfig
from poet_megatron.model.naming import layer_tensor


@dataclass(frozen=True)
class Slot:
    """One canonical tensor of the model on this rank.

    Attributes:
        name: canonical name.
        layer: global layer number, or None outside the layers.
        shape: shape of the tensor.
        read: merged tensor in feature order, at least fp32.
        write: sets W0 (or the dense parameter) from a tensor in feature order.
    """

    name: str
    layer: int | None
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def canonical_slots(model: MegatronModule, config: ModelConfig) -> Iterator[Slot]:
    """Every tensor of this rank's part of the model, in a fixed order.

    Args:
        model: a GPTModel, not wrapped.
        config: its architecture.
    """
    if model.pre_process:
        yield _whole("embed", None, model.embedding.word_embeddings.weight)
    for module in model.decoder.layers:
        layer = module.layer_number - 1
        attention, mlp = module.self_attention, module.mlp
        yield _whole("attention_norm", layer, module.input_layernorm.weight)
        yield from _linear(layer, attention.linear_qkv, _qkv_rows(config))
        yield from _linear(layer, attention.linear_proj, {"o": slice(None)})
        yield _whole("mlp_norm", layer, module.pre_mlp_layernorm.weight)
        yield from _linear(layer, mlp.linear_fc1, {"gate": slice(0, config.ffn_hidden_size), "up": slice(config.ffn_hidden_size, None)})
        yield from _linear(layer, mlp.linear_fc2, {"down": slice(None)})
    if model.post_process:
        yield _whole("final_norm", None, model.decoder.final_layernorm.weight)
        yield _whole("lm_head", None, model.output_layer.weight)


def _whole(name: str, layer: int | None, parameter: Tensor) -> Slot:
    return _rows(name, layer, parameter, slice(None))


def _rows(name: str, layer: int | None, parameter: Tensor, rows: slice | Tensor) -> Slot:
    def read() -> Tensor:
        return parameter.detach()[rows].to(torch.promote_types(parameter.dtype, torch.float32))

    def write(value: Tensor) -> None:
        with torch.no_grad():
            parameter[rows] = value.to(parameter)

    with torch.device("meta"):
        shape = tuple(torch.empty(parameter.shape)[rows if isinstance(rows, slice) else rows.to("meta")].shape)
    return Slot(name if layer is None else layer_tensor(layer, name), layer, shape, read, write)


def _linear(layer: int, module: torch.nn.Module, rows: dict[str, slice | Tensor]) -> Iterator[Slot]:
    for name, selection in rows.items():
        if isinstance(module, PoetColumnParallelLinear | PoetRowParallelLinear):
            matrix = module.matrices[name]
            assert isinstance(matrix, RotatedMatrix)
            yield Slot(layer_tensor(layer, name), layer, tuple(matrix.weight.shape), matrix.merged, matrix.load_canonical)
        else:
            assert isinstance(module.weight, Tensor)
            yield _rows(name, layer, module.weight, selection)


def _qkv_rows(config: ModelConfig) -> dict[str, slice | Tensor]:
    """Rows of q, k, v in Megatron's fused weight: per key/value head, its query heads, its key, its value."""
    sizes = part_sizes(config)
    groups = config.query_groups
    widths = [sizes[name] // groups for name in ("q", "k", "v")]
    rows = torch.arange(sum(widths) * groups).view(groups, -1).split(widths, dim=1)
    return {name: part.flatten() for name, part in zip(("q", "k", "v"), rows, strict=True)}
