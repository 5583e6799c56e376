"""Settings of AdamW, its learning rates and its schedule."""

from __future__ import annotations

from dataclasses import dataclass

from poet_megatron.config.checks import at_least, one_of

SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW in two parameter groups: the base parameters and the skews of POET (POET, appendix E)."""

    lr: float = 1e-3
    """Peak learning rate of the base parameters: embedding, norms, lm_head, and every weight under method adamw."""
    poet_lr: float = 1e-3
    """Peak learning rate of the skew parameters."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the base parameters; norms and biases are never decayed."""
    poet_weight_decay: float = 0.01
    """Decoupled weight decay of the skews (the paper: 0.01, its authors' code: 0)."""
    beta1: float = 0.9
    """Decay of Adam's first moment."""
    beta2: float = 0.999
    """Decay of Adam's second moment."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_grad: float = 0.1
    """Global gradient norm above which gradients are scaled down; 0 disables clipping."""
    schedule: str = "cosine"
    """cosine: down to min_lr_ratio at the last step; constant."""
    min_lr_ratio: float = 0.01
    """Final learning rate as a fraction of the peak."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""

    def __post_init__(self) -> None:
        one_of("optim.schedule", self.schedule, SCHEDULES)
        for name in ("lr", "poet_lr", "weight_decay", "poet_weight_decay", "eps", "clip_grad", "warmup_steps"):
            at_least(f"optim.{name}", getattr(self, name), 0)
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"optim.min_lr_ratio is {self.min_lr_ratio}; it must lie in [0, 1]")
