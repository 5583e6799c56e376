"""`doctor --distributed` in real gloo worlds of 2 to 4 ranks, with nodes by name: healthy, and with planted faults that it must name.

GPUs are mocks: what torch would see is planted, and a script on PATH answers as nvidia-smi does.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from benchmarks.worlds import exit_statuses
from poet_megatron.cli.main import main
from poet_megatron.health import clocks, control, devices, filesystem, network, pairs, time_skew, versions

ROOT = Path(__file__).parents[2]
LIMIT = 120.0  # after it a world is killed, and its statuses are -9
TIMEOUT = 5  # of a step that a fault is planted in, and of a roll call: there is nothing to do in it for the healthy ranks
Plant = dict[int, Callable[[], None]]


class Checked:
    """The report of a world that has ended."""

    def __init__(
        self, folder: Path, nodes: str, plant: Plant | None = None, timeout: float = 60, folders: list[Path] | None = None
    ) -> None:
        self._output = folder / "report.json"
        self._errors = folder
        work = functools.partial(self._rank, nodes, plant or {}, timeout, folders or [folder] * len(nodes))
        self.statuses = exit_statuses(len(nodes), work, LIMIT)
        text = self._output.read_text()
        self.report: dict[str, Any] = json.loads(text) if text else {"findings": []}

    def _rank(self, nodes: str, plant: Plant, timeout: float, folders: list[Path]) -> None:
        """One rank; nodes[rank] is the name of its node."""
        rank = int(os.environ["RANK"])
        os.environ |= {"SLURMD_NODENAME": nodes[rank], "LOCAL_RANK": str(nodes[:rank].count(nodes[rank]))}
        words = ["doctor", "--distributed", "--json", "--folder", str(folders[rank]), "--timeout", str(timeout)]
        with (
            self._output.open("a") as output,
            self.stderr_path(rank).open("w") as errors,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(errors),
        ):
            plant.get(rank, lambda: None)()
            status = main(words)
        sys.exit(status)

    def stderr_path(self, rank: int) -> Path:
        return self._errors / f"stderr-{rank}"

    def found(self, check: str) -> list[dict[str, Any]]:
        return [finding for finding in self.report["findings"] if finding["check"] == check]

    def only(self, check: str, status: str) -> dict[str, Any]:
        (finding,) = [finding for finding in self.found(check) if finding["status"] == status]
        return finding

    def status(self, check: str) -> str:
        (finding,) = self.found(check)
        return finding["status"]


# -- healthy --


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    return Checked(tmp_path_factory.mktemp("healthy"), "aab")


def test_a_healthy_world_has_no_fail(healthy: Checked) -> None:
    assert healthy.statuses == [0, 0, 0] and healthy.report["ok"] is True
    assert healthy.report["nodes"] == {"a": [0, 1], "b": [2]} and healthy.report["backend"] == "gloo"
    fine = (
        "roll call",
        "versions",
        "time",
        "folder",
        "visibility",
        "file lock",
        "connect",
        "sums",
        "all ranks",
        "inside nodes",
        "node pairs",
    )
    assert {check: healthy.status(check) for check in fine} == dict.fromkeys(fine, "ok")
    assert {check: healthy.status(check) for check in ("gpus", "clocks", "gpu memory")} == dict.fromkeys(
        ("gpus", "clocks", "gpu memory"), "skipped"
    )


def test_figures_are_there_for_scripts(healthy: Checked) -> None:
    measured = healthy.report["measured"]
    assert set(measured["folder"]) == {"a", "b"} and set(measured["inside_nodes"]) == {"a"}
    assert [pair["nodes"] for pair in measured["node_pairs"]] == [["a", "b"]] and measured["node_pairs"][0]["bus_GBps"] > 0
    all_ranks = measured["all_ranks"]
    assert all_ranks["bus_GBps"] == pytest.approx(all_ranks["algorithm_GBps"] * 2 * 2 / 3)
    assert [one["rank"] for one in measured["ranks"]] == [0, 1, 2]


def test_nothing_is_left_in_the_folder(healthy: Checked) -> None:
    assert not list(healthy.stderr_path(0).parent.glob(".poet*"))


def test_only_rank_0_prints(healthy: Checked) -> None:
    assert [healthy.stderr_path(rank).read_text() for rank in range(3)] == ["", "", ""]


def test_many_nodes_meet_in_disjoint_pairs(tmp_path: Path) -> None:
    """Four nodes as if they were many: three rounds in which all four are busy."""

    def many() -> None:
        pairs.ONE_AT_A_TIME = 1

    checked = Checked(tmp_path, "abcd", dict.fromkeys(range(4), many))
    assert checked.statuses == [0] * 4 and checked.status("inside nodes") == "skipped"
    met = sorted("".join(pair["nodes"]) for pair in checked.report["measured"]["node_pairs"])
    assert met == ["ab", "ac", "ad", "bc", "bd", "cd"]


# -- faults that leave all ranks running: one world has them all --


def other_version() -> None:
    installed = versions._version
    versions._version = lambda package: "2.0.0" if package == "torch" else installed(package)  # type: ignore[assignment]


def skewed_clock() -> None:
    time_skew_measure = time_skew.measure
    time_skew.measure = functools.partial(time_skew_measure, clock=lambda: time.time() + 7)  # type: ignore[assignment]


def lock_for_everybody() -> None:
    fcntl.flock = lambda *_: None  # type: ignore[assignment]


def lost_contribution() -> None:
    """This rank's numbers get lost on the way."""
    all_reduce = dist.all_reduce

    def losing(tensor: Any, **options: Any) -> Any:
        return all_reduce(tensor.zero_() if tensor.numel() > 1 else tensor, **options)

    dist.all_reduce = losing


def figures_of_pairs() -> None:
    """All-reduces take as long as the test says: ten times longer between b and c."""
    network.seconds_of_all_reduce = lambda group, device, members: 1.0 if tuple(members) == (2, 3) else 0.1  # type: ignore[assignment]


def gpus(uuid: str) -> Callable[[], None]:
    """Torch sees this GPU, and work on it is not done."""

    def plant() -> None:
        devices.read = lambda local_rank: devices.Devices("12.8", 2, "NVIDIA H100", uuid, 80 * 2**30)  # type: ignore[assignment]
        clocks.load = lambda device: contextlib.nullcontext()  # type: ignore[assignment, return-value]
        clocks.WARM_UP_SECONDS = 0.0

    return plant


NVIDIA_SMI = """\
#!/bin/sh
# A mock of nvidia-smi on a healthy GPU, but for GPU-3.
case "$1 $2" in
    "--query-remapped-rows="*GPU-3) echo "Yes, No" ;;
    "--query-remapped-rows="*) echo "No, No" ;;
    *GPU-3) echo "1200, 1980, 0x0000000000000048, 410.20, 700.00, 700.00, 91, Enabled, 0, 0, [N/A]" ;;
    *) echo "1755, 1980, 0x0000000000000004, 689.51, 700.00, 700.00, 61, Enabled, 0, 0, [N/A]" ;;
esac
"""


def together(*plants: Callable[[], None]) -> Callable[[], None]:
    def plant() -> None:
        for one in plants:
            one()

    return plant


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Checked:
    """Nodes a (ranks 0, 1), b (2) and c (3)."""
    folder = tmp_path_factory.mktemp("faulty")
    command = folder / "nvidia-smi"
    command.write_text(NVIDIA_SMI)
    command.chmod(command.stat().st_mode | stat.S_IXUSR)

    def mocks() -> None:
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        sys.modules["pynvml"] = None  # type: ignore[assignment]
        figures_of_pairs()

    def variable() -> None:
        os.environ["NCCL_IB_HCA"] = "mlx5_7"

    plant = {
        0: together(mocks, gpus("GPU-0")),
        1: together(mocks, gpus("GPU-0"), lost_contribution),
        2: together(mocks, gpus("GPU-2"), lock_for_everybody, variable),
        3: together(mocks, gpus("GPU-3"), other_version, skewed_clock),
    }
    return Checked(folder, "aabc", plant)


def test_every_rank_exits_with_1(faulty: Checked) -> None:
    assert faulty.statuses == [1, 1, 1, 1] and faulty.report["ok"] is False


def test_two_ranks_on_one_gpu_are_named_and_the_network_is_tried_over_gloo(faulty: Checked) -> None:
    found = faulty.only("gpus", "FAIL")
    assert found["ranks"] == [0, 1] and found["nodes"] == ["a"] and "GPU-0" in found["what"]
    assert faulty.report["backend"] == "gloo"


def test_a_rank_with_another_version_is_named(faulty: Checked) -> None:
    found = faulty.only("versions", "FAIL")
    assert found["ranks"] == [3] and found["nodes"] == ["c"] and "torch: 2.0.0 on rank 3 on c" in found["what"]


def test_a_rank_with_another_variable_is_named(faulty: Checked) -> None:
    found = faulty.only("versions", "warn")
    assert found["ranks"] == [2] and "NCCL_IB_HCA: mlx5_7 on rank 2 on b; not set elsewhere" in found["what"]


def test_a_slow_hot_gpu_with_a_bad_row_is_named(faulty: Checked) -> None:
    found = faulty.only("clocks", "warn")
    assert found["ranks"] == [3] and all(words in found["what"] for words in ("1200 MHz", "hardware thermal slowdown", "91 C"))
    assert faulty.only("gpu memory", "FAIL")["ranks"] == [3]


def test_a_skewed_clock_is_named(faulty: Checked) -> None:
    found = faulty.only("time", "warn")
    assert found["nodes"] == ["c"] and "c is 7.0 s ahead" in found["what"]


def test_a_lock_that_is_not_honoured_is_named(faulty: Checked) -> None:
    found = faulty.only("file lock", "warn")
    assert found["nodes"] == ["b"] and "b got a lock that a holds" in found["what"]


def test_a_wrong_sum_is_named_with_the_rank_whose_contribution_is_lost(faulty: Checked) -> None:
    found = faulty.only("sums", "FAIL")
    assert found["ranks"] == [1] and found["nodes"] == ["a"] and "contribution of rank 1 on a is damaged" in found["what"]
    assert faulty.only("inside nodes", "FAIL")["ranks"] == [1]
    wrong = [finding["what"] for finding in faulty.found("node pairs") if finding["status"] == "FAIL"]
    assert [("a and b" in what, "a and c" in what) for what in wrong] == [(True, False), (False, True)], "b and c add up"


def test_a_slow_pair_is_named(faulty: Checked) -> None:
    found = faulty.only("node pairs", "warn")
    assert found["nodes"] == ["b", "c"] and found["ranks"] == [2, 3]


# -- faults that end the checks --


def limited(module: Any, fault: Callable[[], None] = lambda: None) -> Callable[[], None]:
    """From the checks of `module` (filesystem or network) on, a step may take TIMEOUT seconds; `fault` comes just before."""

    def plant() -> None:
        examine_all = module.examine

        def examine_limited(first: Any, *rest: Any) -> None:
            (first.control if isinstance(first, network.Network) else first).timeout = TIMEOUT
            fault()
            examine_all(first, *rest)

        module.examine = examine_limited

    return plant


def test_a_rank_that_does_not_come_is_named_in_time(tmp_path: Path) -> None:
    def asks_rarely() -> None:
        control.LONGEST_PAUSE = 2.5  # rank 0, which serves the store, has to wait for it

    checked = Checked(tmp_path, "aab", {1: asks_rarely, 2: lambda: sys.exit(0)}, TIMEOUT)
    assert checked.statuses == [1, 1, 0]
    assert checked.stderr_path(1).read_text() == ""
    (found,) = checked.report["findings"]
    assert found["check"] == "roll call" and found["ranks"] == [2] and "rank 2 of 3 did not come" in found["what"]
    assert "came: 0-1" in found["what"]


def test_without_rank_0_the_others_say_so(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "ab", {0: lambda: sys.exit(0)}, TIMEOUT)
    assert checked.statuses == [0, 1]
    assert "rank 1 on b cannot reach rank 0 at 127.0.0.1" in checked.stderr_path(1).read_text()


def test_a_rank_that_dies_on_the_way_is_named(tmp_path: Path) -> None:
    living, dying = limited(filesystem), limited(filesystem, lambda: os._exit(9))
    checked = Checked(tmp_path, "abb", {0: living, 1: living, 2: dying})
    assert checked.statuses == [1, 1, 9]
    found = checked.only("ranks", "FAIL")
    assert found["ranks"] == [2] and found["nodes"] == ["b"] and "no answer from rank 2 on b in step folder/create" in found["what"]
    assert checked.status("versions") == "ok", "what was found before is kept"
    assert not list(tmp_path.glob(".poet*"))


def test_a_rank_0_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "ab", {0: limited(filesystem, lambda: os._exit(9)), 1: limited(filesystem)})
    assert checked.statuses == [9, 1]
    assert "no answer from rank 0 on a" in checked.stderr_path(1).read_text()


def test_a_collective_that_hangs_is_given_up(tmp_path: Path) -> None:
    def hang() -> None:
        all_reduce = dist.all_reduce
        dist.all_reduce = lambda tensor, **more: threading.Event().wait() if tensor.numel() > 1 else all_reduce(tensor, **more)

    checked = Checked(tmp_path, "ab", {0: limited(network), 1: limited(network, hang)})
    assert checked.statuses == [1, 1]
    assert f"did not finish within {TIMEOUT} s on ranks 0 on a and 1 on b" in checked.only("sums", "FAIL")["what"]
    assert checked.status("inside nodes") == checked.status("node pairs") == "skipped"
    assert checked.status("file lock") == "ok", "the network comes last"


def test_a_rank_that_cannot_connect_is_named_with_its_error(tmp_path: Path) -> None:
    def no_interface() -> None:
        os.environ["GLOO_SOCKET_IFNAME"] = "nosuch0"

    checked = Checked(tmp_path, "ab", {0: limited(network), 1: limited(network, no_interface)})
    assert checked.statuses == [1, 1]
    first = checked.found("connect")[0]
    assert first["status"] == "FAIL" and first["ranks"] == [1] and "nosuch0" in first["what"] and "GLOO_SOCKET_IFNAME" in first["fix"]


# -- the folder --


def not_for_long() -> None:
    filesystem.SEEN_SECONDS = 1.0


def test_a_folder_that_is_not_shared_is_named(tmp_path: Path) -> None:
    folders = [tmp_path / "local-a", tmp_path / "local-b"]
    for folder in folders:
        folder.mkdir()
    checked = Checked(tmp_path, "ab", dict.fromkeys((0, 1), not_for_long), folders=folders)
    assert checked.statuses == [1, 1]
    found = checked.only("visibility", "FAIL")
    assert found["nodes"] == ["b"] and "local-a is not shared: a file that a wrote" in found["what"] and "--folder" in found["fix"]
    assert not checked.found("file speed") and checked.status("node pairs") == "ok"
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_a_folder_that_one_node_lacks_is_named(tmp_path: Path) -> None:
    checked = Checked(tmp_path, "ab", folders=[tmp_path, tmp_path / "none"])
    found = checked.only("folder", "FAIL")
    assert found["nodes"] == ["b"] and "none is not a folder there on rank 1 on b" in found["what"] and checked.statuses == [1, 1]


def test_a_file_system_that_returns_other_bytes_is_named(tmp_path: Path) -> None:
    def stale() -> None:
        from poet_megatron.health import probes

        write = probes.write_rate
        probes.write_rate = lambda path, size, seed: write(path, size, seed + 1)  # type: ignore[assignment]

    checked = Checked(tmp_path, "ab", {1: stale})
    found = checked.only("file speed", "FAIL")
    assert found["ranks"] == [0] and "large1 differs from what was written" in found["what"] and checked.statuses == [1, 1]


# -- a real launcher --


def test_under_torchrun(tmp_path: Path) -> None:
    """Its agent serves the store, and all that comes on stdout is one JSON object."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    launcher = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "2", "--master-port", port]
    command = [*launcher, "-m", "poet_megatron", "doctor", "--distributed", "--json", "--folder", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert "failed to bind" not in done.stderr, "rank 0 does not try to serve the store as well"
    assert report["ok"] and report["world_size"] == 2 and len(report["nodes"]) == 1
    assert next(one for one in report["findings"] if one["check"] == "inside nodes")["status"] == "ok"
