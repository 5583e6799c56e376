"""Time left in a run, from the smoothed time of a step."""

from __future__ import annotations

import math


def format_duration(seconds: float | None) -> str:
    """`h:mm:ss`, with days in front from 24 hours on (`2d 3:04:05`); `-:--:--` where the time is not known."""
    if seconds is None or not math.isfinite(seconds) or seconds < 0:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


class EtaEstimator:
    """Seconds to the last step, from an exponential average of the seconds per step.

    `update(step, now)` is called at log intervals with any monotonic clock. Time spent outside of steps (evaluation, checkpoints)
    is part of the average, as it is of the run.
    """

    def __init__(self, total_steps: int, smoothing: float = 0.2) -> None:
        if not 0 < smoothing <= 1:
            raise ValueError(f"smoothing is {smoothing}; it must lie in (0, 1], 1 looks at the last interval only")
        self.total_steps = total_steps
        self.smoothing = smoothing
        self.seconds_per_step: float | None = None
        self._last: tuple[int, float] | None = None

    def update(self, step: int, now: float) -> float | None:
        """Seconds left after `step`, seen at time `now`; None until two steps have been seen."""
        if self._last is not None and step > self._last[0]:
            steps = step - self._last[0]
            latest = (now - self._last[1]) / steps
            weight = 1 - (1 - self.smoothing) ** steps
            old = latest if self.seconds_per_step is None else self.seconds_per_step
            self.seconds_per_step = old + weight * (latest - old)
        self._last = (step, now)
        if self.seconds_per_step is None:
            return None
        return max(0, self.total_steps - step) * self.seconds_per_step
