"""A single-process POET layer: a drop-in for torch.nn.Linear, and a way to continue a dense layer without changing its function."""

from __future__ import annotations

from torch import Tensor, nn

from poet_megatron.layers.config import PoetConfig
from poet_megatron.layers.matrix import MatrixId, RotatedMatrix


class PoetLinear(nn.Module):
    """y = x R W0 P + bias. The bias is added after P, so merging never touches it.

    Parameters:
        matrix: the rotated matrix.
        bias: [out], trained, or None.
    """

    def __init__(self, matrix: RotatedMatrix, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: PoetConfig, identity: MatrixId | None = None, tokens_per_step: int = 1) -> PoetLinear:
        """Wrap a dense layer; the function is unchanged (permutations cancel while the skews are zero).

        Args:
            linear: the layer whose weight becomes W0; its bias is kept as it is.
            config: POET settings.
            identity: seeds the permutations; layer 0, matrix 0, seed 0 by default.
            tokens_per_step: for compute = auto.
        """
        matrix = RotatedMatrix(
            linear.in_features,
            linear.out_features,
            config,
            identity or MatrixId(0, 0, 0),
            tokens_per_step=tokens_per_step,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        matrix.rotation_in.to(linear.weight.device)
        matrix.rotation_out.to(linear.weight.device)
        matrix.load_canonical(linear.weight.detach())
        return cls(matrix, linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        y = self.matrix(x)
        return y if self.bias is None else y + self.bias
