"""Settings of checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, one_of

RESUME_MODES = ("auto", "never", "must")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are written, how many stay, and whether a run continues from one."""

    interval: int = 1000
    """Steps between checkpoints; 0 writes one at the end only."""
    keep_last: int = 2
    """Checkpoints that stay on disk; older ones are deleted after a newer one is complete."""
    resume: str = "auto"
    """auto: continue if the run directory holds a checkpoint; never: refuse to if it does; must: fail if it holds none."""
    max_failures: int = 3
    """Checkpoints in a row that may fail (a full disk, for example) while training goes on; then the run stops. The last one never may."""

    def __post_init__(self) -> None:
        at_least("checkpoint.interval", self.interval, 0)
        at_least("checkpoint.keep_last", self.keep_last, 1)
        at_least("checkpoint.max_failures", self.max_failures, 1)
        one_of("checkpoint.resume", self.resume, RESUME_MODES)
