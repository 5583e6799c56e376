"""The line that a run prints at every log interval."""

from __future__ import annotations

import math
from collections.abc import Mapping

from poet_megatron.monitor.eta import format_duration

SEPARATOR = " | "
LARGEST_PLAIN_PPL = 1e6
RATE_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_line(metrics: Mapping[str, float], total_steps: int, world_size: int = 1, eta_seconds: float | None = None) -> str:
    """One line of aligned columns from the metrics of a step; a column whose metric is missing is left out.

    Reads the keys `step`, `train/*`, `optim/*`, `perf/*`, `mem/*`, `poet/*` and, where a step was evaluated, `eval/*`.
    """
    width = len(str(total_steps))
    columns = [f"step {int(metrics['step']):>{width}}/{total_steps}"]
    columns += _loss_columns(metrics) + _optim_columns(metrics) + _perf_columns(metrics, world_size) + _poet_columns(metrics)
    columns.append(f"eta {format_duration(eta_seconds):>8}")
    if "eval/loss" in metrics:
        columns.append(f"eval loss {metrics['eval/loss']:.4f} ppl {_ppl(metrics.get('eval/ppl', math.nan)).strip()}")
    return SEPARATOR.join(columns)


def format_rate(value: float) -> str:
    """Four significant digits with a unit, seven wide: ` 12.35k`, `  987.0`."""
    for unit, suffix in RATE_UNITS:
        if value >= unit:
            scaled = value / unit
            return f"{scaled:6.{2 if scaled < 100 else 1}f}{suffix}"
    return f"{value:7.1f}"


def _loss_columns(metrics: Mapping[str, float]) -> list[str]:
    columns = []
    if "train/loss" in metrics:
        columns.append(f"loss {metrics['train/loss']:7.4f}")
    if "train/ppl" in metrics:
        columns.append(f"ppl {_ppl(metrics['train/ppl'])}")
    return columns


def _optim_columns(metrics: Mapping[str, float]) -> list[str]:
    rates = [f"{metrics[key]:.2e}" for key in ("optim/lr", "optim/poet_lr") if key in metrics]
    columns = [f"lr {'/'.join(rates)}"] if rates else []
    if "optim/grad_norm" in metrics:
        columns.append(f"gnorm {_four_digits(metrics['optim/grad_norm'])}")
    return columns


def _perf_columns(metrics: Mapping[str, float], world_size: int) -> list[str]:
    columns = []
    if "perf/tokens_per_s" in metrics:
        columns.append(f"{format_rate(metrics['perf/tokens_per_s'])} tok/s")
        if world_size > 1:
            per_gpu = metrics.get("perf/tokens_per_s_per_gpu", metrics["perf/tokens_per_s"] / world_size)
            columns[-1] += f" ({format_rate(per_gpu)}/GPU)"
    if "perf/mfu" in metrics:
        columns.append(f"mfu {100 * metrics['perf/mfu']:4.1f}%")
    if "mem/peak_gib" in metrics:
        columns.append(f"mem {metrics['mem/peak_gib']:6.2f} GiB")
    return columns


def _poet_columns(metrics: Mapping[str, float]) -> list[str]:
    columns = []
    if "poet/ortho_error" in metrics:
        columns.append(f"ortho {metrics['poet/ortho_error']:.1e}")
    if "poet/steps_to_merge" in metrics:
        columns.append(f"merge in {int(metrics['poet/steps_to_merge']):4d}")
    return columns


def _ppl(value: float) -> str:
    return f"{value:9.2f}" if value < LARGEST_PLAIN_PPL else f"{value:9.2e}"


def _four_digits(value: float) -> str:
    return f"{value:8.4f}" if value < 100 else f"{value:8.2e}"
