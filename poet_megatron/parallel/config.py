"""Settings of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are laid out; data parallelism takes what is left (world size / (tensor x pipeline))."""

    tensor_parallel: int = 1
    """Ranks that split every layer."""
    pipeline_parallel: int = 1
    """Pipeline stages."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel layers."""
    overlap_grad_reduce: bool = False
    """Overlap the data-parallel gradient reduction with the backward pass."""
    timeout_minutes: float = 10.0
    """Minutes after which a stuck collective aborts the run."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
            if getattr(self, name) > 1:
                raise ValueError(f"parallel.{name} is {getattr(self, name)}; this version is data-parallel only: set it to 1")
        if self.sequence_parallel:
            raise ValueError("parallel.sequence_parallel needs tensor parallelism, which this version does not have: set it to false")
