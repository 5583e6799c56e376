"""Settings of what a run does about losses that go wrong, ranks that stand still or fall behind, and restarts that lead nowhere."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, one_of

ON_NONFINITE = ("stop", "skip", "rollback")
ON_SPIKE = ("ignore", "warn", "stop", "skip", "rollback")
SPIKE_WINDOW_MIN = 8


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Faults while training: what is noticed, and what is done about it (docs/faults.md)."""

    on_nonfinite: str = "stop"
    """A loss or gradient that is not finite: stop before the update, skip the batch, or rollback to the last checkpoint."""
    on_spike: str = "warn"
    """A loss far above the recent ones: ignore; warn; stop, skip or rollback as for guard.on_nonfinite."""
    spike_threshold: float = 10.0
    """Robust standard deviations (at least 1% of the loss each) that a spike lies above the median of recent losses."""
    spike_window: int = 64
    """Recent losses that a new one is compared with; nothing is a spike before half as many steps have been taken."""
    max_interventions: int = 5
    """Skips and rollbacks after which the run stops, counted until guard.spike_window steps in a row went well."""
    watchdog: bool = True
    """End the run, with every rank's stack and the name of the rank to blame, if it stands still for guard.hang_minutes."""
    hang_minutes: float = 0.0
    """Minutes without progress that are a hang, less than parallel.timeout_minutes; 0 means 80% of that."""
    straggler_interval: int = 100
    """Steps between measurements of each rank's own time (without waiting for others); 0 never measures."""
    straggler_ratio: float = 1.3
    """A rank that needs this many times the median, twice in a row, is reported as a straggler."""
    max_idle_restarts: int = 3
    """Restarts of a batch job that may find the checkpoint of the start before; then it stops. 0 allows any number."""

    def __post_init__(self) -> None:
        one_of("guard.on_nonfinite", self.on_nonfinite, ON_NONFINITE)
        one_of("guard.on_spike", self.on_spike, ON_SPIKE)
        at_least("guard.spike_threshold", self.spike_threshold, 1)
        at_least("guard.spike_window", self.spike_window, SPIKE_WINDOW_MIN)
        at_least("guard.straggler_ratio", self.straggler_ratio, 1)
        for name in ("max_interventions", "hang_minutes", "straggler_interval", "max_idle_restarts"):
            at_least(f"guard.{name}", getattr(self, name), 0)
