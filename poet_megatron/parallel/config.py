"""Settings of the parallel layout."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, one_of

RECOMPUTE_MODES = ("none", "selective", "full")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the ranks are laid out; data parallelism takes what is left (world size / (tensor x pipeline))."""

    tensor_parallel: int = 1
    """Ranks that split every layer."""
    pipeline_parallel: int = 1
    """Pipeline stages; layers are split evenly over them, the schedule is 1F1B."""
    virtual_stages: int = 1
    """Model chunks per pipeline stage; more than 1 interleaves them (needs pipeline_parallel of at least 2)."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel layers (needs tensor_parallel of at least 2)."""
    distributed_optimizer: bool = False
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer, ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Overlap the data-parallel gradient reduction with the backward pass."""
    recompute: str = "none"
    """Activation checkpointing: none; selective recomputes attention in the backward pass; full recomputes whole layers."""
    check_replicas: bool = True
    """Compare hashes of everything that ranks hold in common at every merge and before every checkpoint, and stop if they differ."""
    check_replicas_interval: int = 100
    """Steps between such comparisons at other times, optimizer state included; 0: none."""
    timeout_minutes: float = 10.0
    """Minutes after which a stuck collective aborts the run."""

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "virtual_stages"):
            at_least(f"parallel.{name}", getattr(self, name), 1)
        at_least("parallel.check_replicas_interval", self.check_replicas_interval, 0)
        one_of("parallel.recompute", self.recompute, RECOMPUTE_MODES)
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise ValueError(
                "parallel.sequence_parallel is true with parallel.tensor_parallel 1: set tensor_parallel to 2 or more, or turn it off"
            )
        if self.virtual_stages > 1 and self.pipeline_parallel == 1:
            raise ValueError(
                f"parallel.virtual_stages is {self.virtual_stages} with parallel.pipeline_parallel 1: interleaving needs at least 2 stages"
            )
