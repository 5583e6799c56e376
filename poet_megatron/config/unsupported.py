"""What other trainers have and this one has not, with the reason and what to use instead: consulted for unknown keys and values."""

from __future__ import annotations

import re

UNSUPPORTED = {
    r"fsdp\d?|zero_?(stage_?)?3": (
        "it would split W0, which a merge rewrites as a whole matrix and which is frozen and small anyway; "
        "use parallel.distributed_optimizer, or engine deepspeed with deepspeed.zero_stage 1 or 2"
    ),
    r"context_parallel|cp": (
        "attention sees whole sequences; for long ones use parallel.tensor_parallel with parallel.sequence_parallel, "
        "or parallel.recompute full"
    ),
    r"experts?|moe|ep": "models are dense Llamas, without experts; use parallel.tensor_parallel and parallel.pipeline_parallel",
    r"fp8": "rotations are computed in the dtype of training; use train.precision bf16",
    r"transformer_engine|te": (
        "layers are torch's and POET's own; Transformer Engine's fused AdamW is used by itself where it is installed: leave the key out"
    ),
}


def why_unsupported(name: str) -> str | None:
    """Why there is nothing of this name (of a setting, an engine, a precision), and what to use instead; None if nothing is known of it."""
    words = re.sub(r"[^a-z0-9]+", "_", name.lower())
    return next((reason for pattern, reason in UNSUPPORTED.items() if re.search(rf"(?:^|_)(?:{pattern})(?:_|$)", words)), None)
