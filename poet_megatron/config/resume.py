"""Which settings a checkpoint fixes."""

from __future__ import annotations

from poet_megatron.config.dump import diff_configs
from poet_megatron.config.run import RunConfig

FIXED = (
    "method",
    "model.",
    "poet.variant",
    "poet.block_size",
    "poet.orthogonal_map",
    "poet.neumann_",
    "poet.shard_groups",
    "poet.share_input_rotation",
    "train.seed",
    "train.precision",
    "poet.master_weights",
    "train.global_batch_size",
)
"""Beginnings of the keys of settings that must not change when a run resumes; those of `poet` only if that is the method."""
SHARD_GROUPS = "poet.shard_groups"


def forbidden_changes(saved: RunConfig, run: RunConfig) -> list[str]:
    """Differences of a run from the settings of its checkpoint that make it another model; poet.shard_groups 0 is whatever was saved."""
    fixed = tuple(key for key in FIXED if run.method == "poet" or not key.startswith("poet."))
    open_groups = run.poet.shard_groups == 0
    return [line for line in diff_configs(saved, run) if line.startswith(fixed) and not (open_groups and line.startswith(SHARD_GROUPS))]
