"""Floating-point operations of a training step, counted exactly for POET layers (used for the MFU column)."""

from __future__ import annotations

from torch import nn

from poet_megatron.config.run import RunConfig
from poet_megatron.layers.cost import input_centric_flops, weight_centric_flops
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.model.build import part_sizes


def step_flops(run: RunConfig, model: nn.Module, tokens: int) -> int:
    """Flops of one rank in one optimizer step: linear layers, causal attention and lm_head, forward and backward.

    Args:
        run: gives architecture and method.
        model: this rank's model.
        tokens: tokens of this rank and step.
    """
    shape = run.model
    attention = 6 * tokens * shape.num_layers * shape.seq_length * shape.hidden_size
    head = 6 * tokens * shape.hidden_size * shape.padded_vocab_size
    matrices = [module for module in model.modules() if isinstance(module, RotatedMatrix)]
    if not matrices:
        return attention + head + 6 * tokens * dense_weights(run)
    return attention + head + sum(_matrix_flops(matrix, tokens) for matrix in matrices)


def dense_weights(run: RunConfig) -> int:
    """Elements of all linear layers outside embedding and lm_head."""
    shape = run.model
    sizes = part_sizes(shape)
    inputs = {name: shape.ffn_hidden_size if name == "down" else shape.hidden_size for name in sizes}
    return shape.num_layers * sum(sizes[name] * inputs[name] for name in sizes)


def _matrix_flops(matrix: RotatedMatrix, tokens: int) -> int:
    flops = weight_centric_flops if matrix.compute == "weight" else input_centric_flops
    return flops(tokens, matrix.rotation_in.layout, matrix.rotation_out.layout)
