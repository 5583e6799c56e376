"""Which AdamW, gradient norm and weight-gradient accumulation a run uses: fused CUDA kernels where they are, torch elsewhere.

megatron-core 0.16.1 chooses while it is imported, by what can be imported. Of what Transformer Engine or Apex offer, our runs can meet:

- FusedAdam (megatron.core.optimizer): Transformer Engine's, else Apex's, else torch's AdamW. Apex's Python part alone is enough to be
  chosen, and then fails when the optimizer is built; so does either one on a CPU.
- multi-tensor norm and scaling, for clipping (optimizer.clip_grads) and for copies of masters (optimizer.optimizer): Transformer Engine's,
  else Apex's if its extension amp_C is there, else a loop over tensors.
- wgrad_gemm_accum_fp32, which adds the weight gradient of a linear layer to its fp32 buffer inside the product: Apex's extension
  fused_weight_gradient_mlp_cuda, where the TransformerConfig asks for it. Nothing falls back here: Megatron's layers raise.

Apex's fused layer norms are not for RMSNorm, which is our own. We look for extensions, never for the package `apex`, which may be Python
only, or another project altogether.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from megatron.core import optimizer as mcore_optimizer

NAMES = {"transformer_engine": "Transformer Engine", "apex": "Apex"}
DOCUMENTATION = "docs/dependencies.md"


@dataclass(frozen=True)
class FusedKernels:
    """What is used on one kind of device.

    Attributes:
        source: "transformer_engine" or "apex", whose FusedAdam and multi-tensor kernels are used; "torch" for neither.
        weight_gradient: whether weight gradients are added to their fp32 buffer inside the product (gradient_accumulation_fusion).
        reason: why `source` is torch.
    """

    source: str
    weight_gradient: bool
    reason: str = ""

    def describe(self) -> str:
        """The choice as one line for the start of a run."""
        adam = f"torch AdamW ({self.reason})" if self.source == "torch" else f"{NAMES[self.source]}'s FusedAdam and multi-tensor kernels"
        return f"optimizer: {adam}{', fused weight gradients' if self.weight_gradient else ''}"


def fused_kernels(device_type: str, engine: str = "megatron") -> FusedKernels:
    """What a run of an engine on `device_type` uses."""
    if device_type != "cuda":
        return FusedKernels("torch", False, "the fused kernels are for GPUs")
    # Only Megatron's engine has the gradient buffers that a product could add to.
    weight_gradient = engine == "megatron" and _installed("fused_weight_gradient_mlp_cuda")
    source = mcore_optimizer.Adam.__module__.partition(".")[0]
    if source == "transformer_engine":  # it imports its kernels with the class
        return FusedKernels(source, weight_gradient)
    if source == "apex" and _installed("amp_C"):
        return FusedKernels(source, weight_gradient)
    return FusedKernels("torch", weight_gradient, f"Apex's kernels are not installed: {DOCUMENTATION}")


@contextmanager
def chosen_adam(kernels: FusedKernels) -> Iterator[None]:
    """While active, megatron-core builds the optimizer that `kernels` says, whatever it found while it was imported."""
    if kernels.source != "torch":
        yield
        return
    with mock.patch.multiple(mcore_optimizer, Adam=torch.optim.AdamW, USING_PYTORCH_OPTIMIZER=True):
        yield


def adamw(groups: list[dict[str, Any]], kernels: FusedKernels, **defaults: Any) -> torch.optim.Optimizer:
    """AdamW of `kernels` over parameter groups, with the `defaults` lr, betas, eps and weight_decay."""
    if kernels.source == "torch":
        return torch.optim.AdamW(groups, **defaults)
    return mcore_optimizer.Adam(groups, adam_w_mode=True, **defaults)


def _installed(extension: str) -> bool:
    return importlib.util.find_spec(extension) is not None
