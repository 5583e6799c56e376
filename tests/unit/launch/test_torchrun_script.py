"""launch/torchrun/pretrain.sh with a stand-in for Python: exit statuses, restarts, numbers of ranks, messages; and launch/env.sh.

tests/integration/test_torchrun_training.py runs the script with the real torchrun.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "launch" / "torchrun" / "pretrain.sh"

# "Python": checks no settings, is a torchrun that starts ranks and fails if one does, and is a rank that does what plan/RANK says in the
# line of this start: `exit N`, or `save` to end with 75 once it is asked to.
FAKE_PYTHON = """\
#!/bin/bash
set -u
plan=$FAKE_PLAN
case $* in
    *--print-config*) exit "${FAKE_CHECK:-0}" ;;
    "-m torch.distributed.run "*)
        echo "$*" >> "$plan/launches"
        for word; do case $word in --nproc-per-node=*) ranks=${word#*=} ;; esac; done
        while [ "$1" != --no-python ]; do shift; done
        shift
        pids=()
        for ((rank = 0; rank < ranks; rank++)); do
            RANK=$rank setsid "$@" &
            pids+=($!)
        done
        trap 'for pid in "${pids[@]}"; do kill -s TERM -- "-$pid"; done; exit 1' TERM
        failed=0
        for pid in "${pids[@]}"; do
            while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
            wait "$pid" || failed=1
        done
        exit $failed ;;
    "-m poet_megatron pretrain "*)
        start=$(wc -l < "$plan/launches")
        read -r what status < <(sed -n "${start}p" "$plan/$RANK")
        if [ "$what" = save ]; then
            handler='import signal, sys, time; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))'
            exec python3 -c "$handler; open('$plan/ready-$RANK', 'w'); time.sleep(60)"
        fi
        exit "$status" ;;
esac
"""


@pytest.fixture
def world(tmp_path: Path) -> dict[str, str]:
    """Environment with the stand-in, and without this machine's GPUs."""
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "plan").mkdir()
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("NCCL_", "TORCH_", "CUDA_", "OMP_", "HF_"))}
    return {**keep, "PYTHON": str(python), "FAKE_PLAN": str(tmp_path / "plan"), "TMPDIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def run(world: dict[str, str], tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the script: run([what rank 0 does in each start], [rank 1], ..., NAME="value")."""

    def start(*plans: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
        for rank, lines in enumerate(plans):
            (tmp_path / "plan" / str(rank)).write_text("".join(f"{line}\n" for line in lines))
        settings = {**world, "RANKS": str(len(plans)), **environment}
        command = [str(SCRIPT), "recipe.yaml", "--train.steps", "5"]
        return subprocess.run(command, env=settings, capture_output=True, text=True, timeout=60, cwd=tmp_path)

    return start


def launches(tmp_path: Path) -> list[str]:
    path = tmp_path / "plan" / "launches"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize(
    ("statuses", "status"),
    [((0, 0), 0), ((75, 75), 75), ((2, 2), 2), ((3, 3), 3), ((4, 4), 4), ((5, 5), 5), ((0, 137), 137), ((1, 0), 1), ((75, 1), 1)],
)
def test_the_status_is_that_of_the_ranks(run, tmp_path, statuses, status):
    """torchrun says 0 or 1 of all of these."""
    assert run(*([f"exit {code}"] for code in statuses)).returncode == status
    (words,) = launches(tmp_path)
    assert "--standalone --nproc-per-node=2 --max-restarts=0" in words
    assert words.endswith("-m poet_megatron pretrain --config recipe.yaml --train.steps 5")
    assert not list(tmp_path.glob("tmp.*"))  # the folder of the statuses


@pytest.mark.parametrize("statuses", [(9, 143), (143, 9)])
def test_a_rank_that_torchrun_ended_is_not_to_blame(run, statuses):
    """torchrun ends the other ranks by TERM (143) after a failure."""
    assert run(*([f"exit {code}"] for code in statuses)).returncode == 9


def test_restarts_after_crashes_only(run, tmp_path):
    done = run(["exit 1", "exit 137", "exit 0"], ["exit 0"] * 3, RESTARTS="3")
    assert done.returncode == 0
    assert len(launches(tmp_path)) == 3
    assert "start 3, 2 ranks" in done.stderr


def test_restarts_are_counted(run, tmp_path):
    assert run(["exit 1"] * 9, RESTARTS="2").returncode == 1
    assert len(launches(tmp_path)) == 3


@pytest.mark.parametrize("status", [2, 3, 75])
def test_no_restart_where_it_would_not_help(run, tmp_path, status):
    assert run([f"exit {status}"] * 9, RESTARTS="5").returncode == status
    assert len(launches(tmp_path)) == 1


def test_a_mistake_in_the_settings_starts_nothing(run, tmp_path):
    assert run(["exit 0"], FAKE_CHECK="2").returncode == 2
    assert launches(tmp_path) == []


def hear_signals() -> None:
    """Undo what `nohup` does to the processes below it: a shell cannot trap what was ignored when it began."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_signal_makes_the_ranks_save(world, tmp_path, number):
    for rank in range(2):
        (tmp_path / "plan" / str(rank)).write_text("save\n" * 9)
    settings = {**world, "RANKS": "2", "RESTARTS": "5"}
    command = [str(SCRIPT), "recipe.yaml"]
    with subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True, preexec_fn=hear_signals) as process:
        wait_for(lambda: all((tmp_path / "plan" / f"ready-{rank}").exists() for rank in range(2)))
        process.send_signal(number)
        error = process.communicate(timeout=30)[1]
    assert process.returncode == 75
    assert f"{number.name}: the ranks finish their step, save and leave" in error
    assert len(launches(tmp_path)) == 1


def nvidia_smi(tmp_path: Path, gpus: int) -> str:
    """PATH with an nvidia-smi that lists so many GPUs."""
    folder = tmp_path / "bin"
    folder.mkdir()
    lines = "".join(f"echo 'GPU {number}: NVIDIA H100 (UUID: GPU-{number})'\n" for number in range(gpus))
    (folder / "nvidia-smi").write_text(f"#!/bin/bash\n{lines}")
    (folder / "nvidia-smi").chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("settings", "ranks"),
    [
        ({}, 3),
        ({"GPUS": "2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1"}, 1),
    ],
)
def test_one_rank_per_visible_gpu(world, tmp_path, settings, ranks):
    for rank in range(3):
        (tmp_path / "plan" / str(rank)).write_text("exit 0\n")
    del world["CUDA_VISIBLE_DEVICES"]
    environment = {**world, "PATH": nvidia_smi(tmp_path, 3), **settings}
    done = subprocess.run([str(SCRIPT), "recipe.yaml"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"--nproc-per-node={ranks} " in launches(tmp_path)[0]


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([], {"RANKS": "2"}, "usage: launch/torchrun/pretrain.sh CONFIG"),
        (["--config", "x.yaml"], {"RANKS": "2"}, "usage: launch/torchrun/pretrain.sh CONFIG"),
        (["x.yaml"], {}, "no GPU is visible here .*; RANKS=2 before the command trains on the CPU"),
        (["x.yaml"], {"CUDA_VISIBLE_DEVICES": "-1"}, "no GPU is visible here"),
        (["x.yaml"], {"GPUS": "2"}, "2 ranks need as many GPUs, and 0 are visible here"),
        (["x.yaml"], {"RANKS": "two"}, "the number of ranks is 'two'; GPUS and RANKS are whole numbers"),
        (["x.yaml"], {"RANKS": "2", "RESTARTS": "-1"}, "RESTARTS is '-1'; it is a whole number"),
        (["x.yaml"], {"RANKS": "2", "PYTHON": "no-such-python"}, "there is no no-such-python: activate the environment"),
    ],
)
def test_mistakes(world, tmp_path, words, settings, message):
    done = subprocess.run([str(SCRIPT), *words], env={**world, **settings}, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.match(f"error: {message}", done.stderr), done.stderr
    assert launches(tmp_path) == []


def sourced(*names: str, **environment: str) -> list[str]:
    """Values of variables after `. launch/env.sh`, in a strict shell."""
    code = f"set -eu; . {ROOT}/launch/env.sh; for name in {' '.join(names)}; do printf '%s\\n' \"${{!name-unset}}\"; done"
    clean = {"PATH": os.environ["PATH"], **environment}
    return subprocess.run(["bash", "-c", code], env=clean, capture_output=True, text=True, check=True).stdout.splitlines()


def test_environment_has_defaults_and_leaves_what_is_set():
    names = ("NCCL_DEBUG", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM")
    assert sourced(*names) == ["WARN", "expandable_segments:True", "3", "1", "false"]
    mine = {"NCCL_DEBUG": "INFO", "PYTORCH_CUDA_ALLOC_CONF": "", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "HF_HUB_OFFLINE": "0"}
    assert sourced(*names, **mine) == ["INFO", "", "1", "0", "false"]
    assert sourced("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", PYTORCH_ALLOC_CONF="x:y") == ["unset", "x:y"]


@pytest.mark.parametrize(("ranks", "threads"), [("8", "8"), ("64", "3"), ("1000", "1")])
def test_environment_shares_the_processors_among_the_ranks(tmp_path, ranks, threads):
    (tmp_path / "nproc").write_text("#!/bin/bash\necho 192\n")
    (tmp_path / "nproc").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    assert sourced("OMP_NUM_THREADS", POET_RANKS_PER_NODE=ranks, PATH=path) == [threads]


def test_environment_leaves_layouts_and_sites_alone():
    """What depends on the layout is poet_megatron's; what depends on the cluster is site.sh's."""
    names = ("CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "NCCL_NVLS_ENABLE", "NVIDIA_TF32_OVERRIDE")
    assert sourced(*names) == ["unset"] * len(names)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [*sorted((ROOT / "launch" / "torchrun").glob("*.sh")), ROOT / "launch" / "env.sh"]
    done = subprocess.run(["shellcheck", "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
