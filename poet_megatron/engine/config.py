"""Settings of the engines that have any of their own."""

from __future__ import annotations

from dataclasses import dataclass

ZERO_STAGES = (1, 2)


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """Settings of engine: deepspeed; engine: megatron does not read them."""

    zero_stage: int = 1
    """What is sharded over data-parallel ranks: 1 the optimizer state (with fp32 masters); 2 the reduced gradients as well."""

    def __post_init__(self) -> None:
        if self.zero_stage not in ZERO_STAGES:
            raise ValueError(
                f"deepspeed.zero_stage is {self.zero_stage}; choose 1 or 2. Stage 3, like FSDP, would split the frozen weights, "
                "which a merge rewrites as whole matrices: to split the model, set engine to megatron, with parallel.tensor_parallel or "
                "parallel.pipeline_parallel"
            )
