"""The state of a GPU through the command nvidia-smi."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence

from poet_megatron.health.gpu_state import GpuState, NotReadable

COMMAND = "nvidia-smi"
TIMEOUT_SECONDS = 30
FIELDS = {
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "reasons": "clocks_event_reasons.active",
    "power_w": "power.draw",
    "power_limit_w": "enforced.power.limit",
    "power_default_w": "power.default_limit",
    "temperature_c": "temperature.gpu",
    "ecc_on": "ecc.mode.current",
    "uncorrectable": "ecc.errors.uncorrected.volatile.total",
    "uncorrectable_ever": "ecc.errors.uncorrected.aggregate.total",
    "pending": "retired_pages.pending",
}
OLDER_NAMES = {"clocks_event_reasons.active": "clocks_throttle_reasons.active"}
ROWS = {"pending": "remapped_rows.pending", "remap_failed": "remapped_rows.failure"}
YES, NO = ("yes", "enabled", "1"), ("no", "disabled", "0")
WHOLE = ("reasons", "uncorrectable", "uncorrectable_ever")
FLAGS = ("ecc_on", "pending", "remap_failed")


def read(uuid: str) -> GpuState:
    """State of the GPU `uuid`.

    Raises:
        NotReadable: the command fails, does not answer, or does not know the GPU.
    """
    values = _query("--query-gpu", uuid, FIELDS)
    try:
        rows = _query("--query-remapped-rows", uuid, ROWS)
    except NotReadable:  # a driver or GPU without row remapping
        rows = {}
    values |= {name: text for name, text in rows.items() if _parse(name, text) is not None}
    return GpuState(COMMAND, **{name: _parse(name, text) for name, text in values.items()})  # type: ignore[arg-type]


def _query(option: str, uuid: str, fields: dict[str, str]) -> dict[str, str]:
    """{our name: text} of the fields that this version of the command knows: one that it does not know fails the whole query."""
    asked = dict(fields)
    while asked:
        status, text = _run([f"{option}={','.join(asked.values())}", f"--id={uuid}", "--format=csv,noheader,nounits"])
        if status == 0:
            cells = [cell.strip() for cell in text.strip().split(",")]
            if len(cells) != len(asked):
                raise NotReadable(f"{COMMAND} answered {text.strip()[:200]!r}")
            return dict(zip(asked, cells, strict=True))
        unknown = re.search(r'Field "([\w.]+)" is not a valid field', text)
        name = next((name for name, field in asked.items() if unknown and field == unknown[1]), None)
        if name is None:
            raise NotReadable(f"{COMMAND} failed with status {status}: {' '.join(text.split())[:200]}")
        older = OLDER_NAMES.get(asked.pop(name))
        asked |= {name: older} if older else {}
    return {}


def _run(words: Sequence[str]) -> tuple[int, str]:
    try:
        done = subprocess.run(
            [COMMAND, *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise NotReadable(f"{COMMAND} did not answer within {TIMEOUT_SECONDS} s: the driver or a GPU hangs") from None
    except OSError as error:
        raise NotReadable(f"{COMMAND} does not run: {error}") from None
    return done.returncode, done.stdout if done.returncode == 0 else done.stdout + done.stderr


def _parse(name: str, text: str) -> float | int | bool | None:
    """A cell; None for "[N/A]", "[Not Supported]", "[Unknown Error]" and whatever else is no value of its kind."""
    if name in FLAGS:
        return True if text.lower() in YES else False if text.lower() in NO else None
    try:
        return int(text, 0) if name in WHOLE else float(text)
    except ValueError:
        return None
