"""The state of one GPU as the driver tells it, through nvidia-ml-py or nvidia-smi."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

IDLE, POWER_CAP = 0x1, 0x4
REASONS = {
    0x2: "a fixed application clock",
    POWER_CAP: "the power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost with a slower GPU",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "the display clock",
}
"""Bits of NVML's clocks event reasons (formerly throttle reasons)."""


@dataclass(frozen=True)
class GpuState:
    """One reading. None is what the driver does not tell about this GPU.

    Attributes:
        source: where it comes from.
        sm_mhz: clock of the multiprocessors.
        max_sm_mhz: the highest that this GPU can have.
        reasons: bits of REASONS that hold the clock down.
        power_w: drawn now.
        power_limit_w: the cap in force.
        power_default_w: the cap as shipped.
        temperature_c: of the chip.
        ecc_on: whether memory errors are counted and corrected.
        uncorrectable: memory errors that could not be corrected, since the driver was loaded.
        uncorrectable_ever: the same, over the life of the GPU.
        pending: a memory page or row waits to be replaced at the next reset.
        remap_failed: a row could not be replaced.
    """

    source: str
    sm_mhz: float | None = None
    max_sm_mhz: float | None = None
    reasons: int | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    power_default_w: float | None = None
    temperature_c: float | None = None
    ecc_on: bool | None = None
    uncorrectable: int | None = None
    uncorrectable_ever: int | None = None
    pending: bool | None = None
    remap_failed: bool | None = None


class NotReadable(Exception):
    """There is no way to ask the driver; the message says why."""


def read(uuid: str) -> GpuState:
    """State of the GPU `uuid`, through nvidia-ml-py if it is installed and works, else through nvidia-smi.

    Raises:
        NotReadable: neither is there, or neither knows the GPU.
    """
    from poet_megatron.health import nvidia_smi, nvml

    reasons = []
    try:
        return nvml.read(uuid)
    except NotReadable as error:
        reasons.append(str(error))
    if shutil.which(nvidia_smi.COMMAND) is None:
        reasons.append(f"{nvidia_smi.COMMAND} is not on PATH")
    else:
        try:
            return nvidia_smi.read(uuid)
        except NotReadable as error:
            reasons.append(str(error))
    raise NotReadable("; ".join(reasons))
