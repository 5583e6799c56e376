"""Floating-point operations of a training step: what the model needs, counted exactly for POET layers (used for MFU and estimates)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.module import MegatronModule

from poet_megatron.config.run import RunConfig
from poet_megatron.layers.cost import weight_centric_flops
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.sharded import PoetParallelLinear
from poet_megatron.model.build import part_sizes


def step_flops(run: RunConfig, chunks: Sequence[MegatronModule], tokens: int) -> int:
    """Flops of one rank in one optimizer step: the sum of `flop_parts`."""
    return sum(flop_parts(run, chunks, tokens).values())


def flop_parts(run: RunConfig, chunks: Sequence[MegatronModule], tokens: int) -> dict[str, int]:
    """Flops of one rank in one optimizer step, forward and backward, by part.

    As usual for MFU this is what the model needs: recomputation is not counted, and work that tensor-parallel ranks repeat (rotations by a
    replicated factor) is divided among them. The orthogonal map is left out (it does not grow with the tokens).

    Args:
        run: gives architecture and layout.
        chunks: this rank's model chunks.
        tokens: tokens that this rank's pipeline sees in a step.

    Returns:
        {"linear layers", "rotations", "attention", "lm_head"}; linear layers are products with W0, effective or dense weights.
    """
    shape, size = run.model, run.parallel.tensor_parallel
    layers = sum(len(chunk.decoder.layers) for chunk in chunks)
    linears = [m for c in chunks for m in c.modules() if isinstance(m, PoetParallelLinear)]
    matrices = [matrix for linear in linears for matrix in linear.parts]
    dense = 6 * tokens * dense_weights(run) * layers // (shape.num_layers * size)
    frozen = sum(_weight_flops(matrix) * tokens * matrix.weight.numel() for matrix in matrices)
    return {
        "linear layers": frozen if linears else dense,
        "rotations": sum(_rotation_flops(linear, tokens, size) for linear in linears),
        "attention": 6 * tokens * layers * shape.seq_length * shape.hidden_size // size,
        "lm_head": sum(6 * tokens * shape.hidden_size * shape.padded_vocab_size // size for chunk in chunks if chunk.post_process),
    }


def dense_weights(run: RunConfig) -> int:
    """Elements of all linear layers outside embedding and lm_head."""
    shape = run.model
    sizes = part_sizes(shape)
    inputs = {name: shape.ffn_hidden_size if name == "down" else shape.hidden_size for name in sizes}
    return shape.num_layers * sum(sizes[name] * inputs[name] for name in sizes)


def _weight_flops(matrix: RotatedMatrix) -> int:
    """Flops per token and weight: an effective weight needs a gradient, a frozen one does not."""
    return 6 if matrix.compute == "weight" else 4


def _rotation_flops(linear: PoetParallelLinear, tokens: int, size: int) -> int:
    total, counted = 0, set()
    for matrix in linear.parts:
        side_in, side_out = matrix.rotation_in.layout, matrix.rotation_out.layout
        if matrix.compute == "weight":
            total += weight_centric_flops(0, side_in, side_out)
            continue
        shares = (size, 1) if linear.splits_outputs else (1, size)
        for rotation, share in zip((matrix.rotation_in, matrix.rotation_out), shares, strict=True):
            if id(rotation) not in counted:  # a shared R rotates once
                counted.add(id(rotation))
                total += 6 * tokens * rotation.layout.sum_squares // share
    return total
