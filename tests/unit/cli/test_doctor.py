"""The doctor command says what is used and why, to people and to scripts."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from poet_megatron.cli import doctor
from poet_megatron.cli.doctor_distributed import granted, launch_of, relevant
from poet_megatron.cli.main import main
from poet_megatron.errors import UserError
from poet_megatron.ops import native


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    native.load.cache_clear()
    yield
    native.load.cache_clear()


def test_report_names_versions_processor_and_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for words in (f"torch {torch.__version__}", "compiler", "nvcc", *native.OPS):
        assert words in text
    assert text.count("\ncpu ") == 2 and "\ncuda " in text, "processor, and one reason for each device"


def test_json_is_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["op"] for row in report["ops"]] == list(native.OPS)
    assert set(report["devices"]) == {"cpu", "cuda"}
    assert report["packages"]["torch"] and report["installed_in"] == str(native.FOLDER)


def test_the_reference_is_explained(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("POET_NATIVE", "0")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "POET_NATIVE=0" in text and "reference  reference" in text
    assert "native    " not in text and "to have the compiled ops" not in text


def test_a_machine_with_nothing_built_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path, capsys) -> None:
    monkeypatch.delenv("POET_NATIVE", raising=False)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "host_module", lambda: None)
    monkeypatch.setattr(doctor, "_tool", lambda candidates: None)
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "compiler     none" in text and "nothing was compiled" in text
    assert "to have the compiled ops for cpu tensors: install g++" in text


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("reference", "native", "POET_NATIVE=0", "POET_CPU_ISA", "--json", "docs/install.md"))


# -- doctor --distributed --

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "4"}


def test_the_launch_is_read_as_torchrun_sets_it() -> None:
    found = launch_of(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (found.rank, found.size, found.local_rank, found.local_size) == (5, 8, 1, 4)
    assert (found.address, found.port, found.agent_store, found.attempt) == ("node0", 29500, True, "2")
    assert found.node == socket.gethostname() and found.expected_nodes == ()


def test_the_launch_is_read_as_slurm_and_rank_sh_set_it() -> None:
    slurm = {
        "SLURMD_NODENAME": "node1",
        "SLURM_JOB_NODELIST": "node[0-3]",
        "SLURM_STEP_NODELIST": "node[0-1]",
        "SLURM_NTASKS_PER_NODE": "4",
    }
    found = launch_of({name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"} | slurm)
    assert found.node == "node1" and found.expected_nodes == ("node0", "node1") and found.local_size == 4 and not found.agent_store


def test_without_a_launcher_it_is_a_world_of_one() -> None:
    found = launch_of({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"})  # a job script's own shell is no step
    assert (found.rank, found.size, found.address, found.port) == (0, 1, "127.0.0.1", 0)


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 tasks, but RANK and WORLD_SIZE are not set.*rank.sh"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 in a world of WORLD_SIZE=8; ranks count from 0 to 7"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        (TORCHRUN | {"MASTER_PORT": "0"}, "MASTER_PORT is '0'; it must be a number, at least 1"),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; it must be a number, at least 1"),
    ],
)
def test_a_launch_that_makes_no_sense_is_a_mistake_of_the_user(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        launch_of(environ)


def test_variables_that_matter_to_a_run_are_compared() -> None:
    environ = {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "PYTORCH_CUDA_ALLOC_CONF": "x", "HOME": "/root", "MY_NCCL_X": "1"}
    assert list(relevant(environ)) == ["NCCL_DEBUG", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF"]


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "CUDA_VISIBLE_DEVICES=0,1"),
        ({"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, ""),
        ({}, ""),
    ],
)
def test_gpus_that_the_environment_promises(environ: dict[str, str], says: str) -> None:
    assert granted(environ) == says


def test_options_of_the_distributed_report_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--distributed", "--timeout", "0"], "--timeout is 0; it must be a positive number of seconds"),
        (["--distributed", "--timeout", "inf"], "--timeout is inf; it must be a positive number"),
        (["--folder", "runs"], "--folder goes with --distributed"),
    ):
        assert main(["doctor", *words]) == 2
        assert message in capsys.readouterr().err


def test_a_world_of_one_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # which the command would set for good
    monkeypatch.setenv("SLURMD_NODENAME", "lonely")
    assert main(["doctor", "--distributed", "--folder", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("1 rank on 1 node (lonely: 0), gloo") and "0 FAIL" in text.splitlines()[-1]
    assert f"{tmp_path} on " in text and "all-reduces over 1 rank are exact" in text and not list(tmp_path.iterdir())


def test_help_teaches_to_check_an_allocation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(words in text for words in ("--distributed", "torchrun", "srun", "doctor.sbatch", "--folder", "FAIL", "docs/health.md"))
