"""Whether a step may update the parameters, judged by its loss and gradients before the update; the same answer on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from poet_megatron.errors import EXIT_NOT_FINITE, UserError
from poet_megatron.guard.config import GuardConfig

UPDATE, SKIP, ROLLBACK = "update", "skip", "rollback"
MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""
LEAST_DEVIATION = 0.01
"""Of the median: where losses hardly differ from each other, a small step up is no spike."""


class NonFiniteError(UserError):
    """A loss or gradient was NaN or infinite; no parameter was updated with it."""

    exit_status = EXIT_NOT_FINITE


class LossSpikeError(UserError):
    """The loss jumped; no parameter was updated with it."""

    exit_status = EXIT_NOT_FINITE


@dataclass(frozen=True)
class Verdict:
    """What to do with a step.

    Attributes:
        action: update, skip or rollback.
        reason: what was noticed; empty for an ordinary step.
    """

    action: str = UPDATE
    reason: str = ""


class LossGuard:
    """Applies guard.on_nonfinite and guard.on_spike; keeps the recent losses, which a checkpoint takes along.

    A spike is a loss above median + guard.spike_threshold x max(1.4826 MAD, 1% of the median) of the last guard.spike_window losses that
    led to an update.

    Attributes:
        skipped: steps of the run that made no update.
    """

    def __init__(self, config: GuardConfig | None = None) -> None:
        self.config = config or GuardConfig(on_spike="ignore")
        self.skipped = 0
        self._losses: list[float] = []
        self._interventions = 0
        self._good_steps = 0

    def judge(self, loss: float, not_finite: str = "") -> Verdict:
        """Verdict on a step that has not updated anything yet.

        Args:
            loss: mean over the global batch.
            not_finite: what of it is not finite; empty if all is.

        Raises:
            NonFiniteError: it says so, and the policy is to stop, or there were too many interventions.
            LossSpikeError: the same for a spike.
        """
        if not_finite:
            return self._intervene(self.config.on_nonfinite, f"not finite: {not_finite}", NonFiniteError)
        reason = self._spike(loss)
        if reason and self.config.on_spike != "warn":
            return self._intervene(self.config.on_spike, reason, LossSpikeError)
        self._losses = [*self._losses, loss][-self.config.spike_window :]
        self._good_steps += 1
        if self._good_steps >= self.config.spike_window:
            self._interventions = 0
        return Verdict(UPDATE, reason)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint; plain numbers."""
        return {
            "losses": list(self._losses),
            "interventions": self._interventions,
            "good_steps": self._good_steps,
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`; an empty one begins anew."""
        self._losses = list(state.get("losses", []))
        self._interventions, self._good_steps = state.get("interventions", 0), state.get("good_steps", 0)
        self.skipped = state.get("skipped", 0)

    def rolled_back(self, state: Mapping[str, Any]) -> None:
        """Compare with the losses of a checkpoint from now on; what was skipped and done so far still counts."""
        self._losses = list(state.get("losses", []))

    def _spike(self, loss: float) -> str:
        """Description of a spike, or nothing."""
        if self.config.on_spike == "ignore" or 2 * len(self._losses) < self.config.spike_window:
            return ""
        middle, bound = spike_bound(self._losses, self.config.spike_threshold)
        if loss <= bound:
            return ""
        return f"the loss {loss:.4f} is a spike (median {middle:.4f} of the last {len(self._losses)}, bound {bound:.4f})"

    def _intervene(self, policy: str, reason: str, error: type[UserError]) -> Verdict:
        if policy == "stop":
            raise error(f"{reason}. {_advice(error)}")
        self._good_steps = 0
        self._interventions += 1
        if self._interventions > self.config.max_interventions:
            raise error(
                f"{reason}, after {self.config.max_interventions} skips and rollbacks without {self.config.spike_window} good steps "
                f"in between (guard.max_interventions). {_advice(error)}"
            )
        self.skipped += 1
        return Verdict(policy, reason)


def spike_bound(losses: Sequence[float], threshold: float) -> tuple[float, float]:
    """(median, loss above which there is a spike) of recent losses; see LossGuard."""
    middle = median(losses)
    deviation = MAD_TO_DEVIATION * median(abs(loss - middle) for loss in losses)
    return middle, middle + threshold * max(deviation, LEAST_DEVIATION * abs(middle))


def _advice(error: type[UserError]) -> str:
    lower = "Lower optim.lr or optim.poet_lr" + (", or set poet.orthogonal_map to cayley," if error is NonFiniteError else "")
    policy = "guard.on_nonfinite" if error is NonFiniteError else "guard.on_spike"
    return (
        f"Nothing was updated with it. {lower} and run again: the run continues from its last checkpoint. {policy} skip or rollback "
        "passes over such batches"
    )
