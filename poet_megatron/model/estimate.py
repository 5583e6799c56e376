"""Shapes, parameter counts and memory of a run, from the real model built on the meta device: nothing large is allocated."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import nn

from poet_megatron.config.run import RunConfig
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.model.build import build_model, transformer_config
from poet_megatron.model.flops import dense_weights
from poet_megatron.parallel.context import parallel_context

FP32_BYTES = 4
GIB = 2**30


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        rotated_parameters: trainable parameters of the rotated matrices; under method adamw the elements of those matrices.
        trainable_parameters: everything the optimizer updates.
        total_parameters: elements of the model as it is exported, with vocabulary padding.
        shapes: every parameter's name and shape on this rank.
        memory_bytes: bytes per rank by part.
    """

    rotated_parameters: int
    trainable_parameters: int
    total_parameters: int
    shapes: list[tuple[str, tuple[int, ...]]]
    memory_bytes: dict[str, int]

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self))

    def to_text(self) -> str:
        """A table to read."""
        width = max(len(name) for name, _ in self.shapes)
        lines = [f"{name:<{width}}  {list(shape)}" for name, shape in self.shapes]
        lines += [""]
        for label, count in (
            ("rotated parameters", self.rotated_parameters),
            ("trainable parameters", self.trainable_parameters),
            ("total parameters", self.total_parameters),
        ):
            lines.append(f"{label:<22} {count:>15,}  ({count / 1e6:.2f} M)")
        lines += ["", "memory per rank"]
        lines += [f"  {part:<20} {size / GIB:>9.3f} GiB" for part, size in self.memory_bytes.items()]
        lines.append(f"  {'sum':<20} {sum(self.memory_bytes.values()) / GIB:>9.3f} GiB")
        return "\n".join(lines)


def estimate(run: RunConfig) -> Estimate:
    """Build the model of `run` on the meta device in a process group of its own and count.

    The activation estimate takes every tensor that the layers save for backward, for one micro-batch, without recomputation.
    """
    config = transformer_config(run)
    config.use_cpu_initialization = True  # an explicit CUDA device would win over the meta device
    with parallel_context(run.parallel, run.train.seed, on_cpu=True), torch.device("meta"):
        model = build_model(run, config)
    parameters = dict(model.named_parameters())
    trainable = sum(p.numel() for p in parameters.values() if p.requires_grad)
    skews = sum(p.numel() for name, p in parameters.items() if name.endswith(".skew"))
    return Estimate(
        rotated_parameters=skews if run.method == "poet" else dense_weights(run),
        trainable_parameters=trainable,
        total_parameters=sum(p.numel() for name, p in parameters.items() if not name.endswith(".skew")),
        shapes=[(name, tuple(p.shape)) for name, p in parameters.items()],
        memory_bytes=_memory(run, model, trainable),
    )


def _memory(run: RunConfig, model: nn.Module, trainable: int) -> dict[str, int]:
    bf16 = run.train.precision == "bf16"
    width = 2 if bf16 else 4
    matrices = [module for module in model.modules() if isinstance(module, RotatedMatrix)]
    frozen = sum(matrix.weight.numel() for matrix in matrices)
    masters = frozen if bf16 and run.poet.master_weights else 0
    increments = sum(side.sum_squares for m in matrices for side in (m.rotation_in.layout, m.rotation_out.layout))
    effective = sum(m.weight.numel() for m in matrices if m.compute == "weight")
    factors = increments * (FP32_BYTES + (width if bf16 else 0) + FP32_BYTES) + effective * (width + FP32_BYTES)
    return {
        "frozen W0": frozen * width,
        "fp32 master of W0": masters * FP32_BYTES,
        "trainable weights": trainable * width,
        "factors": factors,
        "gradients": trainable * FP32_BYTES,
        "optimizer": trainable * FP32_BYTES * (3 if bf16 else 2),
        "activations": _activations(run, width),
    }


def _activations(run: RunConfig, width: int) -> int:
    shape = run.model
    tokens = run.train.micro_batch_size * shape.seq_length
    keys = shape.query_groups * shape.head_size
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    per_token = 6 * hidden + 2 * (hidden + 2 * keys) + 5 * ffn
    if run.method == "poet":
        per_token += hidden + 2 * keys + 2 * hidden + 2 * ffn  # outputs before P
    logits = shape.padded_vocab_size * (width + 2 * FP32_BYTES)
    return tokens * (shape.num_layers * per_token * width + logits)
