"""The judgement of losses, against numpy's percentiles and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from poet_megatron.guard.config import GuardConfig
from poet_megatron.guard.losses import ROLLBACK, SKIP, UPDATE, LossGuard, LossSpikeError, NonFiniteError, Verdict, spike_bound


def fed(losses: list[float], **settings) -> LossGuard:
    guard = LossGuard(GuardConfig(spike_window=8, **settings))
    for loss in losses:
        assert guard.judge(loss) == Verdict()
    return guard


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_the_bound_is_made_of_median_and_median_absolute_deviation(count: int):
    losses = np.random.default_rng(count).normal(3.0, 0.2, count)
    middle = np.percentile(losses, 50)
    deviation = np.percentile(np.abs(losses - middle), 50) / 0.6744897501960817  # the normal distribution's third quartile
    found = spike_bound(losses.tolist(), 7.0)
    assert found[0] == pytest.approx(middle)
    assert found[1] == pytest.approx(middle + 7 * max(deviation, 0.01 * middle), rel=1e-5)  # 1.4826 has five digits


def test_nearly_equal_losses_do_not_make_a_spike_of_a_small_step():
    assert spike_bound([2.0] * 8, 10.0) == (2.0, 2.2)
    assert LossGuard(GuardConfig(spike_window=8)).judge(9.0) == Verdict()


@pytest.mark.parametrize(("before", "reason"), [(3, False), (4, True)])
def test_nothing_is_a_spike_before_half_the_window(before: int, reason: bool):
    assert bool(fed([2.0] * before, on_spike="warn").judge(5.0).reason) == reason


def test_old_losses_are_forgotten():
    """After 8 losses of about 2 those of about 5 do not count any more: 3 is a spike."""
    guard = fed([5.0] * 8 + [2.0] * 8)
    assert guard.judge(3.0).reason == "the loss 3.0000 is a spike (median 2.0000 of the last 8, bound 2.2000)"


@pytest.mark.parametrize("policy", ["ignore", "warn"])
def test_policies_that_let_spikes_pass(policy: str):
    verdict = fed([2.0] * 8, on_spike=policy).judge(9.0)
    assert verdict.action == UPDATE and bool(verdict.reason) == (policy == "warn")


def test_a_spike_that_is_skipped_is_not_compared_with():
    guard = fed([2.0] * 8, on_spike="skip", max_interventions=9)
    assert [guard.judge(9.0).action for _ in range(9)] == [SKIP] * 9
    assert guard.skipped == 9 and guard.judge(2.0) == Verdict()


def test_stop_says_why_and_what_to_do():
    with pytest.raises(LossSpikeError, match=r"is a spike .* Nothing was .* Lower optim\.lr .* guard\.on_spike skip") as caught:
        fed([2.0] * 8, on_spike="stop").judge(9.0)
    assert caught.value.exit_status == 3
    with pytest.raises(NonFiniteError, match=r"not finite: loss = nan\. Nothing .*orthogonal_map to cayley") as found:
        LossGuard().judge(math.nan, "loss = nan")
    assert found.value.exit_status == 3


@pytest.mark.parametrize("policy", [SKIP, ROLLBACK])
def test_interventions_are_counted_until_a_window_of_good_steps(policy: str):
    guard = LossGuard(GuardConfig(spike_window=8, on_nonfinite=policy, max_interventions=2))
    for good in (7, 8, 0, 7):  # 8 good steps begin a new count
        assert guard.judge(math.nan, "x").action == policy
        for _ in range(good):
            guard.judge(2.0)
    with pytest.raises(NonFiniteError, match="not finite: x, after 2 skips and rollbacks without 8 good steps in between"):
        guard.judge(math.nan, "x")
    assert guard.skipped == 4


def test_a_guard_that_resumes_judges_as_one_that_went_on():
    losses = np.random.default_rng(1).normal(3.0, 0.3, 300).tolist()
    losses[100] = losses[101] = losses[200] = 50.0
    settings = {"on_spike": "skip", "max_interventions": 2}
    straight, resumed = (LossGuard(GuardConfig(spike_window=8, **settings)) for _ in range(2))
    for number, loss in enumerate(losses):
        assert straight.judge(loss) == resumed.judge(loss)
        if number % 7 == 0 or number in (100, 101):
            state = resumed.state_dict()
            resumed = LossGuard(GuardConfig(spike_window=8, **settings))
            resumed.load_state_dict(state)
    assert resumed.state_dict() == straight.state_dict() and straight.skipped == 3
    fresh = LossGuard()
    fresh.load_state_dict({})  # of a checkpoint from before there was a guard
    assert fresh.state_dict() == LossGuard().state_dict()


def test_after_a_rollback_the_losses_are_the_checkpoints_and_the_counts_go_on():
    guard = fed([2.0] * 8)
    early = guard.state_dict()
    for loss in [1.0] * 8:
        guard.judge(loss)
    guard.skipped = 3
    guard.rolled_back(early)
    assert not guard.judge(2.1).reason and guard.skipped == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_spike": "retry"}, "guard.on_spike is 'retry'; choose one of ignore, warn, stop, skip, rollback"),
        ({"on_nonfinite": "ignore"}, "guard.on_nonfinite is 'ignore'"),
        ({"spike_window": 7}, "guard.spike_window is 7; it must be at least 8"),
        ({"spike_threshold": 0.5}, "guard.spike_threshold is 0.5"),
        ({"straggler_ratio": 0.9}, "guard.straggler_ratio is 0.9; it must be at least 1"),
        ({"max_idle_restarts": -1}, "guard.max_idle_restarts is -1"),
    ],
)
def test_settings_that_make_no_sense(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GuardConfig(**settings)
