"""Writes the model as a Hugging Face Llama folder: safetensors, config.json, generation_config.json and the tokenizer.

The folder is written aside and renamed into place, so a folder under its final name is always complete. Memory: one tensor.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from poet_megatron.checkpoint.hf_layout import TensorSpec, tensor_specs
from poet_megatron.checkpoint.hf_tokenizer import SpecialIds, convert_tokenizer
from poet_megatron.checkpoint.safetensors_writer import DTYPE_NAMES, ShardedWriter
from poet_megatron.errors import UserError
from poet_megatron.model.config import ModelConfig

MARKER = "poet_export.json"
"""File that marks a folder as an export of ours and lists its files; only such folders are ever replaced."""
MAX_SHARD_BYTES = 4 * 2**30
"""Default size above which the weights are split over several files."""


def export_hf(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    tokenizer_model: Path | None,
    output: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Write the folder `output` and return it.

    weights: canonical name -> merged, un-permuted full tensor ([out, in] or [hidden], floating point, any device), each exactly once,
    in any order; an iterator is consumed one tensor at a time.
    tokenizer_model: the sentencepiece model the data was prepared with; None leaves the tokenizer out.
    dtype: of the stored tensors; a value that is not finite in it is an error.
    Vocabulary padding rows are stripped. An existing `output` is replaced if it is an earlier export, else UserError.
    """
    output = Path(output).absolute()
    _check_dtype(dtype, max_shard_bytes)
    check_replaceable(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.parent / f".{output.name}.writing-{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        ids = convert_tokenizer(tokenizer_model, aside, config) if tokenizer_model is not None else SpecialIds()
        _write_weights(weights, config, aside, dtype, max_shard_bytes)
        _write_configs(config, ids, aside, dtype)
        _write_marker(aside, dtype)
        _sync(aside)
        _put_in_place(aside, output)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return output


def _check_dtype(dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Raise UserError on a dtype that cannot be stored or a senseless shard size."""
    if dtype not in DTYPE_NAMES:
        raise UserError(f"export dtype is {dtype}; choose one of {', '.join(str(d) for d in DTYPE_NAMES)}")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes is {max_shard_bytes}; it must be at least 1")


def check_replaceable(output: Path) -> None:
    """Raise UserError if something other than an empty folder or an untouched earlier export is at `output`."""
    if output.is_symlink() or (output.exists() and not output.is_dir()):
        raise UserError(f"{output} exists and is not a folder; choose another --output")
    if not output.is_dir():
        return
    present = {path.name for path in output.iterdir()}
    marker = output / MARKER
    if present and not marker.is_file():
        raise UserError(f"{output} exists and is not an earlier export (no {MARKER} in it); choose another --output or remove it")
    extra = present - {MARKER, *json.loads(marker.read_text())["files"]} if present else set()
    if extra:
        raise UserError(
            f"{output} is an earlier export, but {sorted(extra)[0]} in it was added since; move it away or choose another --output"
        )


def _write_weights(
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    """Write every tensor; raise UserError naming a missing, repeated, unknown or misshapen one."""
    specs = {spec.canonical: spec for spec in tensor_specs(config)}
    arrived: set[str] = set()
    with ShardedWriter(folder, {spec.hf: spec.hf_shape for spec in specs.values()}, dtype, max_shard_bytes) as writer:
        for name, tensor in weights.items() if isinstance(weights, Mapping) else weights:
            if name not in specs:
                raise UserError(
                    f"tensor {name} is not part of this model ({config.num_layers} layers); expected names such as {next(iter(specs))}"
                )
            if name in arrived:
                raise UserError(f"tensor {name} arrived twice; each must come exactly once")
            arrived.add(name)
            writer.write(specs[name].hf, _stored(tensor, specs[name], dtype))
    missing = [name for name in specs if name not in arrived]
    if missing:
        raise UserError(f"tensor {missing[0]} did not arrive ({len(missing)} of {len(specs)} are missing); all must")


def _stored(tensor: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """`tensor` as the folder stores it (`spec.hf_shape`, `dtype`); raise UserError on a wrong shape or on values that are not finite."""
    if tuple(tensor.shape) != spec.shape:
        raise UserError(f"tensor {spec.canonical} has shape {tuple(tensor.shape)}; the model's settings need {spec.shape}")
    if not tensor.is_floating_point():
        raise UserError(f"tensor {spec.canonical} has dtype {tensor.dtype}; a floating-point dtype is needed")
    stored = tensor.detach()[: spec.hf_shape[0]].to(dtype)
    if not torch.isfinite(stored).all():
        raise UserError(
            f"tensor {spec.canonical} is not finite as {dtype}; export another step, or as fp32 or bf16 if this is fp16's range"
        )
    return stored


def _llama_config(config: ModelConfig, ids: SpecialIds, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's content, from transformers.LlamaConfig."""
    from transformers import LlamaConfig

    llama = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.query_groups,
        max_position_embeddings=config.seq_length,
        initializer_range=config.init_std,
        rms_norm_eps=config.norm_epsilon,
        rope_theta=float(config.rotary_base),
        bos_token_id=ids.bos,
        eos_token_id=ids.eos,
        pad_token_id=ids.pad,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )
    content = llama.to_dict()
    # transformers 4 reads rope_theta and torch_dtype, 5 reads rope_parameters and dtype; either would silently use its default otherwise.
    content["rope_theta"] = float(config.rotary_base)
    content["dtype"] = content["torch_dtype"] = str(dtype).removeprefix("torch.")
    return content


def _write_configs(config: ModelConfig, ids: SpecialIds, folder: Path, dtype: torch.dtype) -> None:
    """Write config.json and generation_config.json."""
    content = _llama_config(config, ids, dtype)
    generation = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad if ids.pad is not None else ids.eos}
    generation["transformers_version"] = content.get("transformers_version")
    known = {key: value for key, value in generation.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(known, indent=2) + "\n")


def _write_marker(folder: Path, dtype: torch.dtype) -> None:
    """Write the file that marks the folder as ours and lists what is in it."""
    files = sorted(path.name for path in folder.iterdir())
    content = {"format": "poet_megatron Hugging Face export", "version": 1, "dtype": str(dtype).removeprefix("torch."), "files": files}
    (folder / MARKER).write_text(json.dumps(content, indent=2) + "\n")


def _sync(folder: Path) -> None:
    """Force the folder's files, and the folder itself, to disk."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _put_in_place(aside: Path, output: Path) -> None:
    """Rename `aside` to `output`, replacing an earlier export (which is put back if the rename fails)."""
    check_replaceable(output)
    old = output.parent / f".{output.name}.replaced-{os.getpid()}"
    if output.exists():
        output.rename(old)
    try:
        aside.rename(output)
    except OSError:
        if old.exists():
            old.rename(output)
        raise
    shutil.rmtree(old, ignore_errors=True)
