"""The state of a GPU through nvidia-ml-py (module pynvml), which is optional."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from poet_megatron.health.gpu_state import GpuState, NotReadable

SOURCE = "nvidia-ml-py"


def read(uuid: str) -> GpuState:
    """State of the GPU `uuid`.

    Raises:
        NotReadable: nvidia-ml-py is not installed, does not find the driver, or the driver does not know the GPU.
    """
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        raise NotReadable("nvidia-ml-py is not installed") from None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        raise NotReadable(f"nvidia-ml-py: {error}") from None
    try:
        return _state(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError as error:
        raise NotReadable(f"nvidia-ml-py: {uuid}: {error}") from None
    finally:
        nvml.nvmlShutdown()


def _state(nvml: Any, handle: Any) -> GpuState:
    def ask(name: str, *constants: str, scale: float = 1) -> Any:
        """Call nvml.<name>(handle, constants...); None where this driver, GPU or version of the package has no answer."""
        return _answer(nvml, lambda: getattr(nvml, name)(handle, *(getattr(nvml, constant) for constant in constants)), scale)

    reasons = ask("nvmlDeviceGetCurrentClocksEventReasons")
    rows = ask("nvmlDeviceGetRemappedRows")
    retired = ask("nvmlDeviceGetRetiredPagesPendingStatus")
    return GpuState(
        SOURCE,
        ask("nvmlDeviceGetClockInfo", "NVML_CLOCK_SM"),
        ask("nvmlDeviceGetMaxClockInfo", "NVML_CLOCK_SM"),
        ask("nvmlDeviceGetCurrentClocksThrottleReasons") if reasons is None else reasons,
        ask("nvmlDeviceGetPowerUsage", scale=1e-3),
        ask("nvmlDeviceGetEnforcedPowerLimit", scale=1e-3),
        ask("nvmlDeviceGetPowerManagementDefaultLimit", scale=1e-3),
        ask("nvmlDeviceGetTemperature", "NVML_TEMPERATURE_GPU"),
        _flag(ask("nvmlDeviceGetCurrentEccMode")),
        ask("nvmlDeviceGetTotalEccErrors", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_VOLATILE_ECC"),
        ask("nvmlDeviceGetTotalEccErrors", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED", "NVML_AGGREGATE_ECC"),
        _flag(rows[2] if rows is not None else retired),
        _flag(rows[3]) if rows is not None else None,
    )


def _answer(nvml: Any, call: Callable[[], Any], scale: float) -> Any:
    try:
        answer = call()
    except (nvml.NVMLError, AttributeError):
        return None
    return answer if scale == 1 else answer * scale


def _flag(answer: Any) -> bool | None:
    return None if answer is None else bool(answer)
