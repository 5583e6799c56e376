"""Settings of what is reported while training."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """Console line, metrics.jsonl and TensorBoard (the last two always on)."""

    log_interval: int = 10
    """Steps between console lines and metrics."""
    wandb_project: str = ""
    """Weights & Biases project; empty disables it."""
    peak_tflops: float = 0.0
    """Peak TFLOP/s of one device for the MFU column (H100 SXM bf16: 989); 0 leaves it out."""

    def __post_init__(self) -> None:
        at_least("monitor.log_interval", self.log_interval, 1)
        at_least("monitor.peak_tflops", self.peak_tflops, 0)
