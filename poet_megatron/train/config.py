"""Settings of the training loop."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, divides, one_of

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch and precision of a run."""

    steps: int = 1000
    """Optimizer steps."""
    micro_batch_size: int = 8
    """Sequences per rank and forward pass."""
    global_batch_size: int = 64
    """Sequences per optimizer step over all ranks."""
    precision: str = "bf16"
    """bf16 (with fp32 masters and fp32 gradients) or fp32."""
    seed: int = 1234
    """Seed of weights, permutations, index sets and data order."""
    run_dir: str = ""
    """Run directory: resolved config, metrics, checkpoints, export."""
    stop_at_step: int = 0
    """Stop (and save) after this step although the schedule runs to train.steps; 0 runs to the end."""
    exit_minutes: float = 0.0
    """Save and leave, with status 75, once a start has run for so long; 0 for no limit."""

    eval_interval: int = 0
    """Steps between evaluations on the validation data; 0 evaluates only before step 1 and at the end."""
    eval_tokens: int = 0
    """Validation tokens per evaluation; 0 uses them all."""
    eval_batch_size: int = 0
    """Sequences per rank and evaluation forward pass; 0 means micro_batch_size."""

    def __post_init__(self) -> None:
        for name in ("steps", "micro_batch_size", "global_batch_size"):
            at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("stop_at_step", "eval_interval", "eval_tokens", "eval_batch_size", "seed", "exit_minutes"):
            at_least(f"train.{name}", getattr(self, name), 0)
        one_of("train.precision", self.precision, PRECISIONS)
        divides("train.micro_batch_size", self.micro_batch_size, "train.global_batch_size", self.global_batch_size)
