"""The rotated matrices of a layer, and the numbers that seed their weights and permutations. Changing a number changes every run."""

from __future__ import annotations

MATRIX_IDS = {"q": 0, "k": 1, "v": 2, "o": 3, "gate": 4, "up": 5, "down": 6}
NORM_IDS = {"attention_norm": 16, "mlp_norm": 17}
MODEL_LAYER = 2**31  # layer number under which tensors outside the layers are seeded
MODEL_IDS = {"embed": 0, "final_norm": 1, "lm_head": 2}
SPLIT_AXES = {"embed": 0, "lm_head": 0, "q": 0, "k": 0, "v": 0, "gate": 0, "up": 0, "o": 1, "down": 1}
"""Dimension of a tensor [out, in] that tensor parallelism splits; norms are replicated."""


def layer_tensor(layer: int, name: str) -> str:
    """Canonical name of a tensor of layer `layer` (from 0), such as layers.3.gate."""
    return f"layers.{layer}.{name}"
