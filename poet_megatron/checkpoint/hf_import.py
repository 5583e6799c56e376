"""Reads a Hugging Face Llama folder as the model's canonical tensors, to start from a pretrained dense model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from poet_megatron.checkpoint.hf_layout import INDEX_FILE, MODEL_NAMES, SINGLE_FILE, TensorSpec, tensor_specs
from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig


def iter_hf_weights(folder: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield (canonical name, CPU tensor in the stored dtype) for every tensor of the model, one in memory at a time.

    The folder's config.json, names and shapes are all checked against `config` before the first tensor is yielded.
    The rows that pad the vocabulary are zero; a folder with tied embeddings yields the embedding as lm_head too.
    Only safetensors are read: nothing in the folder is executed or unpickled.
    """
    folder = Path(folder)
    tied = _check_architecture(folder, config)
    files = _files_by_tensor(folder)
    specs = [_untie(spec) if tied and spec.hf not in files else spec for spec in tensor_specs(config)]
    _check_tensors(folder, files, specs)
    for spec in specs:
        with safe_open(files[spec.hf], framework="pt") as file:
            stored = file.get_tensor(spec.hf)
        if spec.shape != spec.hf_shape:
            padded = torch.zeros(spec.shape, dtype=stored.dtype)
            padded[: len(stored)] = stored
            stored = padded
        yield spec.canonical, stored


def _untie(spec: TensorSpec) -> TensorSpec:
    """Read lm_head from the embedding (they are tied in the folder); other tensors as they are."""
    return TensorSpec(spec.canonical, MODEL_NAMES["embed"], spec.shape, spec.hf_shape) if spec.canonical == "lm_head" else spec


def _check_architecture(folder: Path, config: ModelConfig) -> bool:
    """Raise UserError unless config.json describes the Llama of `config`; return whether its embeddings are tied."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no config.json; give the folder of a Hugging Face Llama model")
    stored: dict[str, Any] = json.loads(path.read_text())
    if stored.get("model_type") != "llama":
        raise UserError(f"{path}: model_type is {stored.get('model_type')!r}; only 'llama' can be imported")
    described = _described(stored)
    for key, value in _required(config).items():
        if described[key] != value:
            name = _OUR_NAMES.get(key)
            fix = f"set {name} to match, or choose another model" if name else "only that value is supported; choose another model"
            raise UserError(f"{path}: {key} is {described[key]!r}, but the model needs {value!r}; {fix}")
    return bool(stored.get("tie_word_embeddings", False))


_OUR_NAMES = {
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.ffn_hidden_size",
    "num_hidden_layers": "model.num_layers",
    "num_attention_heads": "model.num_attention_heads",
    "num_key_value_heads": "model.num_query_groups",
    "vocab_size": "model.vocab_size",
    "rms_norm_eps": "model.norm_epsilon",
    "rope_theta": "model.rotary_base",
}
"""Key of config.json -> the setting that must equal it."""


def _described(stored: dict[str, Any]) -> dict[str, Any]:
    """What a config.json says of the architecture, with Llama's defaults where it is silent (both old and new spellings of rotary)."""
    defaults = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0}
    described = {key: stored.get(key, defaults.get(key)) for key in (*_OUR_NAMES, *defaults)}
    heads, hidden = stored.get("num_attention_heads") or 0, stored.get("hidden_size") or 0
    described["num_key_value_heads"] = stored.get("num_key_value_heads") or heads
    described["head_dim"] = stored.get("head_dim") or (hidden // heads if heads else 0)
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    described["rope_theta"] = rope.get("rope_theta", described["rope_theta"])
    described["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    return described


def _required(config: ModelConfig) -> dict[str, object]:
    """What `config` needs config.json to say."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.query_groups,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary_base,
        "rope_type": "default",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
    }


def _files_by_tensor(folder: Path) -> dict[str, Path]:
    """Hugging Face name -> file, from the index or the single file."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if index.is_file():
        names = json.loads(index.read_text())["weight_map"]
        return {name: folder / Path(file).name for name, file in names.items()}
    if not single.is_file():
        raise UserError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; only safetensors are read (convert .bin files first)")
    with safe_open(single, framework="pt") as file:
        return dict.fromkeys(file.keys(), single)


def _check_tensors(folder: Path, files: dict[str, Path], specs: list[TensorSpec]) -> None:
    """Raise UserError on a missing, unexpected or misshapen tensor, reading headers only."""
    wanted = {spec.hf for spec in specs}
    for name in files:
        if name not in wanted and not name.endswith("rotary_emb.inv_freq"):
            raise UserError(f"{folder} holds tensor {name}, which this Llama does not have; model.num_layers or biases may differ")
    for spec in specs:
        if spec.hf not in files:
            raise UserError(f"{folder} lacks tensor {spec.hf} ({spec.canonical})")
        path = files[spec.hf]
        if not path.is_file():
            raise UserError(f"{path} is missing, though {INDEX_FILE} names it; copy the whole folder")
        with safe_open(path, framework="pt") as file:
            if spec.hf not in file.keys():  # noqa: SIM118
                raise UserError(f"{path} lacks tensor {spec.hf}, though {INDEX_FILE} names it; the folder is damaged")
            shape = tuple(file.get_slice(spec.hf).get_shape())
        if shape != spec.hf_shape:
            raise UserError(f"{spec.hf} in {path} has shape {shape}; the model's settings need {spec.hf_shape} ({spec.canonical})")
