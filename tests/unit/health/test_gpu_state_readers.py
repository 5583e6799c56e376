"""Asking the driver: nvidia-ml-py and nvidia-smi, both mocks here (no GPU, no driver). The command is a script on PATH that answers as
drivers of the 550 and 470 series do."""

from __future__ import annotations

import os
import stat
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from poet_megatron.health import gpu_state, nvidia_smi, nvml
from poet_megatron.health.gpu_state import GpuState, NotReadable

UUID = "GPU-4b1c0de3-55aa-0000-1234-56789abcdef0"
VALUES = {
    "clocks.sm": "1755",
    "clocks.max.sm": "1980",
    "clocks_event_reasons.active": "0x0000000000000004",
    "power.draw": "689.51",
    "enforced.power.limit": "700.00",
    "power.default_limit": "700.00",
    "temperature.gpu": "61",
    "ecc.mode.current": "Enabled",
    "ecc.errors.uncorrected.volatile.total": "0",
    "ecc.errors.uncorrected.aggregate.total": "2",
    "retired_pages.pending": "[N/A]",
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
}
SCRIPT = """\
#!{python}
# A mock of nvidia-smi: answers one query for one GPU, as --format=csv,noheader,nounits does.
import sys
values = {values!r}
options = dict(word.partition("=")[::2] for word in sys.argv[1:])
if options.pop("--id", None) != {uuid!r}:
    sys.exit("No devices were found")
assert options.pop("--format") == "csv,noheader,nounits"
((option, fields),) = options.items()
if option == "--query-remapped-rows" and "remapped_rows.pending" not in values:
    print("Option --query-remapped-rows is not recognized. Please run 'nvidia-smi -h'.")
    sys.exit(1)
unknown = [field for field in fields.split(",") if field not in values]
if unknown:
    print(f'Field "{{unknown[0]}}" is not a valid field to query.\\n')
    sys.exit(2)
print(", ".join(values[field] for field in fields.split(",")))
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script named nvidia-smi on PATH, alone."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", str(tmp_path))

    def put(text: str) -> None:
        path = tmp_path / "nvidia-smi"
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def script(values: dict[str, str]) -> str:
    return SCRIPT.format(python=sys.executable, values=values, uuid=UUID)


def test_nvidia_smi_of_a_recent_driver(command: Callable[[str], None]) -> None:
    command(script(VALUES))
    assert gpu_state.read(UUID) == GpuState("nvidia-smi", 1755, 1980, 4, 689.51, 700, 700, 61, True, 0, 2, False, False)


def test_pending_and_failed_rows_are_seen(command: Callable[[str], None]) -> None:
    command(script(VALUES | {"remapped_rows.pending": "Yes", "remapped_rows.failure": "Yes", "ecc.mode.current": "Disabled"}))
    found = gpu_state.read(UUID)
    assert (found.pending, found.remap_failed, found.ecc_on) == (True, True, False)


def test_nvidia_smi_of_an_old_driver_knows_other_names(command: Callable[[str], None]) -> None:
    """No event reasons but throttle reasons, no row remapping but retired pages, no ECC."""
    old = {name: text for name, text in VALUES.items() if not name.startswith("remapped")}
    old["clocks_throttle_reasons.active"] = "0x0000000000000048"
    del old["clocks_event_reasons.active"], old["power.default_limit"]
    unsupported = dict.fromkeys(("ecc.mode.current", "ecc.errors.uncorrected.volatile.total"), "[Not Supported]")
    command(script(old | unsupported | {"retired_pages.pending": "Yes", "power.draw": "[Unknown Error]"}))
    found = gpu_state.read(UUID)
    assert found.reasons == 0x48 and found.pending is True and found.remap_failed is None
    assert found.ecc_on is None and found.uncorrectable is None and found.power_w is None and found.power_default_w is None
    assert found.sm_mhz == 1755 and found.temperature_c == 61


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("#!/bin/sh\necho 'Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error'; exit 255", "Unknown Error"),
        (
            "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.' >&2; exit 9",
            "status 9: NVIDIA-SMI",
        ),
        ("#!/bin/sh\necho 'one, two'", "answered 'one, two'"),
        ("no interpreter", "does not run"),
    ],
)
def test_a_command_that_fails_is_quoted(command: Callable[[str], None], text: str, words: str) -> None:
    command(text)
    with pytest.raises(NotReadable, match=words):
        gpu_state.read(UUID)


def test_a_command_that_hangs_is_given_up(command: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    command(f"#!{sys.executable}\nimport time\ntime.sleep(60)")
    monkeypatch.setattr(nvidia_smi, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(NotReadable, match="did not answer within 0.2 s: the driver or a GPU hangs"):
        gpu_state.read(UUID)


def test_without_any_way_to_ask_both_reasons_are_given(command: Callable[[str], None]) -> None:
    with pytest.raises(NotReadable, match="nvidia-ml-py is not installed; nvidia-smi is not on PATH"):
        gpu_state.read(UUID)


class FakeNvml(types.ModuleType):
    """The names of nvidia-ml-py 13 that we use, answering for one GPU; they were checked against that package and a stub of the driver."""

    class NVMLError(Exception):
        """As in nvidia-ml-py."""

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU, NVML_MEMORY_ERROR_TYPE_UNCORRECTED, NVML_VOLATILE_ECC, NVML_AGGREGATE_ECC = 1, 0, 1, 0, 1

    def __init__(self, **answers: Any) -> None:
        super().__init__("pynvml")
        self.open = 0
        self._answers = {
            "ClockInfo": {(1,): 1755},
            "MaxClockInfo": {(1,): 1980},
            "CurrentClocksEventReasons": 4,
            "PowerUsage": 690_123,
            "EnforcedPowerLimit": 650_000,
            "PowerManagementDefaultLimit": 700_000,
            "Temperature": {(0,): 61},
            "CurrentEccMode": 1,
            "TotalEccErrors": {(1, 0): 3, (1, 1): 5},
            "RemappedRows": (7, 8, 1, 0),
        } | answers

    def nvmlInit(self) -> None:
        if "init" in self._answers:
            raise self.NVMLError(self._answers["init"])
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid != UUID:
            raise self.NVMLError("Not Found")
        return "handle"

    def __getattr__(self, name: str) -> Any:
        answer = self._answers.get(name.removeprefix("nvmlDeviceGet"))
        if answer is None or not name.startswith("nvmlDeviceGet"):
            raise AttributeError(name)

        def call(handle: str, *constants: int) -> Any:
            assert handle == "handle"
            if answer == "Not Supported":
                raise self.NVMLError(answer)
            return answer[constants] if isinstance(answer, dict) else answer

        return call


def read_with(monkeypatch: pytest.MonkeyPatch, fake: FakeNvml, uuid: str = UUID) -> GpuState:
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    try:
        return nvml.read(uuid)
    finally:
        assert fake.open == 0, "shut down again"


def test_nvidia_ml_py_answers_in_our_units(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_with(monkeypatch, FakeNvml())
    assert found.power_w == pytest.approx(690.123) and found.power_limit_w == pytest.approx(650)
    rest = (found.sm_mhz, found.max_sm_mhz, found.reasons, found.temperature_c, found.ecc_on, found.uncorrectable, found.uncorrectable_ever)
    assert rest == (1755, 1980, 4, 61, True, 3, 5) and (found.pending, found.remap_failed) == (True, False)


def test_what_a_gpu_or_an_old_version_does_not_tell_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    older = {"CurrentClocksEventReasons": None, "CurrentClocksThrottleReasons": 0x20, "RetiredPagesPendingStatus": 1}
    found = read_with(monkeypatch, FakeNvml(**older, RemappedRows="Not Supported", TotalEccErrors="Not Supported", CurrentEccMode=None))
    assert found.reasons == 0x20 and found.pending is True and found.remap_failed is None
    assert found.uncorrectable is None and found.ecc_on is None


@pytest.mark.parametrize(
    ("answers", "uuid", "words"), [({}, "GPU-other", "GPU-other: Not Found"), ({"init": "Driver Not Loaded"}, UUID, "Driver Not Loaded")]
)
def test_nvidia_ml_py_that_finds_nothing_says_so(monkeypatch: pytest.MonkeyPatch, answers: dict, uuid: str, words: str) -> None:
    with pytest.raises(NotReadable, match=words):
        read_with(monkeypatch, FakeNvml(**answers), uuid)


def test_the_package_is_asked_before_the_command(command: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    command(script(VALUES))
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert gpu_state.read(UUID).source == "nvidia-ml-py"
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(init="Driver/library version mismatch"))
    assert gpu_state.read(UUID).source == "nvidia-smi"
    (Path(os.environ["PATH"]) / "nvidia-smi").unlink()
    with pytest.raises(NotReadable, match="mismatch; nvidia-smi is not on PATH"):
        gpu_state.read(UUID)
