"""How the model's canonical tensors map to a Hugging Face Llama folder: names, shapes, file names. Shared by export and import.

Shapes are [out, in] on both sides and both use the same rotary convention (rotate_half), so a tensor crosses over unchanged;
only the rows that pad the vocabulary exist on our side alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from poet_megatron.model.config import ModelConfig

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

MODEL_NAMES = {
    "embed": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
"""Canonical name -> Hugging Face name, tensors outside the layers."""

LAYER_NAMES = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "attention_norm": "input_layernorm.weight",
    "mlp_norm": "post_attention_layernorm.weight",
}
"""`layers.{i}.<key>` -> `model.layers.{i}.<value>`, tensors of every layer."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor on both sides."""

    canonical: str
    """Name in the model, such as `layers.0.q`."""
    hf: str
    """Name in the folder, such as `model.layers.0.self_attn.q_proj.weight`."""
    shape: tuple[int, ...]
    """Shape in the model."""
    hf_shape: tuple[int, ...]
    """Shape in the folder: without the vocabulary's padding rows."""


def _layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a layer, by its canonical name within the layer."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    queries, keys = config.num_attention_heads * config.head_size, config.query_groups * config.head_size
    return {
        "q": (queries, hidden),
        "k": (keys, hidden),
        "v": (keys, hidden),
        "o": (hidden, queries),
        "gate": (ffn, hidden),
        "up": (ffn, hidden),
        "down": (hidden, ffn),
        "attention_norm": (hidden,),
        "mlp_norm": (hidden,),
    }


def tensor_specs(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of the model, in the order in which the folder stores them: embedding, layers, final norm, lm_head."""
    padded, stripped = (config.padded_vocab_size, config.hidden_size), (config.vocab_size, config.hidden_size)
    yield TensorSpec("embed", MODEL_NAMES["embed"], padded, stripped)
    layer_shapes = _layer_shapes(config)
    for i in range(config.num_layers):
        for name, hf in LAYER_NAMES.items():
            yield TensorSpec(f"layers.{i}.{name}", f"model.layers.{i}.{hf}", layer_shapes[name], layer_shapes[name])
    yield TensorSpec("final_norm", MODEL_NAMES["final_norm"], (config.hidden_size,), (config.hidden_size,))
    yield TensorSpec("lm_head", MODEL_NAMES["lm_head"], padded, stripped)


def shard_name(index: int, count: int) -> str:
    """File name of shard `index` (from 0) of `count`."""
    return SINGLE_FILE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
