"""The console line and the time left."""

from __future__ import annotations

import math

import pytest

from poet_megatron.monitor.console import format_line, format_rate
from poet_megatron.monitor.eta import EtaEstimator, format_duration

FULL = {
    "step": 120, "train/loss": 7.12345, "train/ppl": 1240.5, "optim/lr": 1e-2, "optim/poet_lr": 1e-3, "optim/grad_norm": 0.5319,
    "perf/tokens_per_s": 12345.0, "perf/tokens_per_s_per_gpu": 6172.5, "perf/mfu": 0.412, "mem/peak_gib": 12.345,
    "poet/ortho_error": 1.2e-3, "poet/steps_to_merge": 280, "poet/merge_index": 0,
}  # fmt: skip


def test_full_line():
    line = format_line(FULL, 300000, world_size=2, eta_seconds=43391)
    assert line == (
        "step    120/300000 | loss  7.1235 | ppl   1240.50 | lr 1.00e-02/1.00e-03 | gnorm   0.5319 |  12.35k tok/s (  6.17k/GPU)"
        " | mfu 41.2% | mem  12.35 GiB | ortho 1.2e-03 | merge in  280 | eta 12:03:11"
    )


def test_lines_align_as_numbers_change():
    later = FULL | {
        "step": 299999, "train/loss": 3.1, "train/ppl": 22.2, "optim/lr": 1e-4, "optim/poet_lr": 1e-5, "optim/grad_norm": 12.0,
        "perf/tokens_per_s": 1.5e6, "perf/tokens_per_s_per_gpu": 312.0, "perf/mfu": 0.052, "mem/peak_gib": 1.0, "poet/steps_to_merge": 1,
    }  # fmt: skip
    wild = FULL | {"train/loss": math.nan, "train/ppl": math.inf, "optim/grad_norm": 12345.0}
    first, *others = (format_line(metrics, 300000, 2, 3600 * 10) for metrics in (FULL, later, wild))
    bars = [i for i, c in enumerate(first) if c == "|"]
    assert len(bars) == 10
    for other in others:
        assert [i for i, c in enumerate(other) if c == "|"] == bars


def test_missing_metrics_leave_no_column():
    line = format_line({"step": 1, "train/loss": 2.0, "optim/lr": 0.5}, 10)
    assert line == "step  1/10 | loss  2.0000 | lr 5.00e-01 | eta  -:--:--"


def test_per_gpu_only_with_several_ranks():
    assert "/GPU" not in format_line(FULL, 300000, world_size=1)
    assert "3.09k/GPU" in format_line({"step": 1, "perf/tokens_per_s": 12345.0}, 10, world_size=4)


def test_evaluation_is_appended():
    assert format_line({"step": 1, "eval/loss": 3.5, "eval/ppl": 33.115}, 10).endswith(" | eval loss 3.5000 ppl 33.12")


@pytest.mark.parametrize(("value", "text"), [(987.0, "  987.0"), (99_990, " 99.99k"), (123_400, " 123.4k"), (2.5e9, "  2.50G")])
def test_format_rate(value, text):
    assert format_rate(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.6, "0:01:00"),
        (3661, "1:01:01"),
        (86399, "23:59:59"),
        (183845, "2d 3:04:05"),
        (None, "-:--:--"),
        (math.inf, "-:--:--"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_eta_of_a_steady_run_is_exact():
    eta = EtaEstimator(100)
    assert eta.update(10, now=50.0) is None
    assert eta.update(20, now=70.0) == pytest.approx(80 * 2.0)
    assert eta.update(30, now=90.0) == pytest.approx(70 * 2.0)
    assert eta.update(100, now=230.0) == 0


def test_eta_smooths_an_outlier_and_follows_a_lasting_change():
    eta = EtaEstimator(1000, smoothing=0.2)
    eta.update(0, 0.0)
    eta.update(1, 1.0)
    eta.update(2, 12.0)  # one slow step of 11 s
    assert eta.seconds_per_step == pytest.approx(1 + 0.2 * 10)
    now = 12.0
    for step in range(3, 60):
        now += 5.0
        eta.update(step, now)
    assert eta.seconds_per_step == pytest.approx(5.0, rel=1e-3)


def test_eta_does_not_depend_on_the_log_interval():
    fine, coarse = EtaEstimator(100), EtaEstimator(100)
    for estimator in (fine, coarse):
        estimator.update(0, 0.0)
        estimator.update(1, 1.0)
    for step in range(2, 12):
        fine.update(step, 1.0 + 3.0 * (step - 1))
    coarse.update(11, 31.0)
    assert fine.seconds_per_step == pytest.approx(coarse.seconds_per_step)


def test_eta_refuses_bad_smoothing():
    with pytest.raises(ValueError, match="smoothing is 0"):
        EtaEstimator(10, smoothing=0)
