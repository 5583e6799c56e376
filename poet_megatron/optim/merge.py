"""Merge-then-reinitialize over a whole model, with everything the optimizer remembers of the merged skews, and its schedule."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import RotatedMatrix
from poet_megatron.layers.rotation import Rotation
from poet_megatron.optim.state import state_of


def rotated_matrices(chunks: Sequence[nn.Module]) -> list[RotatedMatrix]:
    """Every rotated matrix of this rank's model chunks."""
    return [module for chunk in chunks for module in chunk.modules() if isinstance(module, RotatedMatrix)]


def merge_model(chunks: Sequence[nn.Module], optimizer: MegatronOptimizer, config: PoetConfig) -> None:
    """Merge every rotated matrix and reset its skews, their fp32 masters, their moments and Adam's step.

    Only the skews are touched: masters and moments of embeddings and norms stay bit-identical (Megatron's reload_model_params would round
    every master to the model's dtype).

    Args:
        chunks: model chunks of this rank.
        optimizer: updates the skews.
        config: merge_polish and merge_reset_moments.
    """
    for matrix in rotated_matrices(chunks):
        matrix.merge(exact=config.merge_polish == "exact")
    for state in state_of(optimizer, skew_parameters(chunks)).values():
        state.param.data.zero_()
        if config.merge_reset_moments:
            state.reset_moments()


def skew_parameters(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The trainable skews of this rank's model chunks by name."""
    return {
        f"{index}.{name}.skew": module.skew
        for index, chunk in enumerate(chunks)
        for name, module in chunk.named_modules()
        if isinstance(module, Rotation) and module.skew is not None
    }


def set_merge_index(chunks: Sequence[nn.Module], merge_index: int) -> None:
    """Draw the permutations of `merge_index` in every rotated matrix (before loading a checkpoint)."""
    for matrix in rotated_matrices(chunks):
        matrix.set_merge_index(merge_index)


def largest_skew_norm(chunks: Sequence[nn.Module]) -> float:
    """Largest |Q|_2 over all blocks of this rank's model."""
    return max((d[2] for d in _diagnostics(chunks)), default=0.0)


def rotation_health(chunks: Sequence[nn.Module]) -> tuple[float, float]:
    """(e_orth = |G G^T - I|_F / |I|_F over all blocks, largest |Q|_2) of this rank's model."""
    diagnostics = _diagnostics(chunks)
    size = sum(d[1] for d in diagnostics)
    error = (sum(d[0] for d in diagnostics) / size) ** 0.5 if size else 0.0
    return error, max((d[2] for d in diagnostics), default=0.0)


def _diagnostics(chunks: Sequence[nn.Module]) -> list[tuple[float, float, float]]:
    return [
        module.diagnostics() for chunk in chunks for module in chunk.modules() if isinstance(module, Rotation) and module.skew is not None
    ]


def clip_threshold(step: int, last_merge: int, clip_grad: float, config: PoetConfig) -> float:
    """Gradient clipping threshold of `step` (from 1): ramps from merge_clip_scale x clip_grad back to clip_grad after a merge.

    The i-th step after a merge (i = 1 .. merge_clip_warmup) uses clip_grad x (s + (1 - s)(i - 1) / merge_clip_warmup).

    Args:
        step: the step about to be taken.
        last_merge: step after which the last merge happened; 0 before the first.
        clip_grad: the full threshold.
        config: merge_clip_warmup and merge_clip_scale s.
    """
    since = step - last_merge
    if last_merge == 0 or since > config.merge_clip_warmup:
        return clip_grad
    start = config.merge_clip_scale
    return clip_grad * (start + (1.0 - start) * (since - 1) / config.merge_clip_warmup)
