"""launch/slurm with stand-ins for Slurm's commands: what a job does with every exit status, and what a rank gets.

tests/slurm runs the same scripts on a real Slurm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCRIPTS = sorted((ROOT / "launch" / "slurm").glob("*.s*"))
JOBS = [path for path in SCRIPTS if path.suffix == ".sbatch"]
STUBS = {
    "scontrol": """\
echo "scontrol $*" >> "$LOG"
case $* in
    *"show job"*) [ -n "$STATE" ] && echo "JobId=7 JobState=$STATE Reason=None" ;;
    *"show hostnames"*) echo first; echo second ;;
    requeue*) exit "${REQUEUE:-0}" ;;
esac
""",
    "sinfo": """\
case $* in
    *--nodes=*) printf "$NODES" ;;
    *) printf "$NODES$OTHERS" ;;
esac
""",
    "sleep": 'exec /bin/sleep "${SLEEP:-0}"\n',
    "python": """\
echo "python $*" >> "$LOG"
case $* in
    *--print-config*) printf "train:\\n  run_dir: $RUN\\n" ;;
    *) eval "$PROGRAM" ;;
esac
""",
    "srun": 'echo "srun $*" >> "$LOG"; while [ "$1" != bash ]; do shift; done; shift 2; exec "$@"\n',
}


class Shell:
    """Runs bash with the stand-ins; `environment` says what they answer."""

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        self.log.touch()
        (folder / "bin").mkdir()
        for name, text in STUBS.items():
            self.stub(folder / "bin" / name, text)
        self.bin = folder / "bin"
        (folder / "site.sh").write_text("POET_PYTHON=(python)\n")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "POET_"))}
        self.environment = {
            **kept,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "LOG": str(self.log),
            "POET_SITE": str(folder / "site.sh"),
            "STATE": "RUNNING",
            "NODES": "first allocated\\nsecond allocated\\n",
            "OTHERS": "third idle\\n",
            "RUN": str(folder / "run"),
            "PROGRAM": "exit 0",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_PARTITION": "batch",
            "SLURM_GPUS_PER_NODE": "h100:4",
            "SLURM_CPUS_ON_NODE": "32",
        }

    @staticmethod
    def stub(path: Path, text: str) -> None:
        """Write a program."""
        path.write_text("#!/bin/bash\n" + text)
        path.chmod(0o755)

    def run(self, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Result of a command in the clone."""
        environment = {**self.environment, **changes}
        return subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)

    def job(self, script: str, *words: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Result of a job script."""
        return self.run("bash", f"launch/slurm/{script}.sbatch", *words, **changes)

    @property
    def requeued(self) -> bool:
        """Whether the job asked Slurm to start it again."""
        return "scontrol requeue 7" in self.log.read_text()


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(path: Path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False).stderr == ""


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_job_script_says_what_is_wrong_outside_a_clone_and_outside_slurm(path: Path, shell: Shell, tmp_path: Path):
    done = subprocess.run(["bash", path], env=shell.environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {tmp_path} is not a clone of poet_megatron: submit from the clone, or with sbatch --chdir=CLONE\n",
    )
    arguments = {"export": [str(tmp_path)], "sweep": [str(tmp_path / "points"), "runs", "--config", "x"], "merge": ["--output", "x"]}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "points").write_text("one\n")
    done = shell.job(path.stem, *arguments.get(path.stem, ["x"]), SLURM_JOB_ID="", SLURM_ARRAY_TASK_ID="0")
    assert (done.returncode, done.stderr) == (2, "error: this is a job script: submit it with sbatch (its first lines say how)\n")


@pytest.mark.parametrize(
    ("status", "state", "requeued"),
    [
        *((status, "RUNNING", False) for status in (0, 2, 3)),
        *((status, "RUNNING", True) for status in (1, 4, 5, 75, 137)),
        *((status, "CANCELLED", False) for status in (0, 1, 2, 3, 4, 5, 75, 137)),
        (75, "COMPLETING", False),
        (75, "", False),
    ],
)
def test_what_a_pretraining_does_with_a_status(status: int, state: str, requeued: bool, shell: Shell):
    done = shell.job("pretrain", "--config", "c.yaml", PROGRAM=f"exit {status}", STATE=state)
    assert shell.requeued == requeued
    assert done.returncode == (0 if requeued else status), done.stderr  # after requeueing it waits for its end
    assert ("not requeued" in done.stderr) == (not requeued and status != 0)


def test_ranks_get_one_task_per_gpu_and_their_part_of_the_processors(shell: Shell):
    shell.job(
        "pretrain", "--config", "c.yaml", SLURM_RESTART_COUNT="3", SLURM_NTASKS="2", PROGRAM='env | grep -E "MASTER|SLURM_N|POET_R" >> $LOG'
    )
    log = shell.log.read_text()
    assert "--nodes=2 --ntasks-per-node=4 --ntasks=8 --cpus-per-task=8" in log
    assert "python -m poet_megatron pretrain --config c.yaml" in log
    assert "MASTER_ADDR=first" in log and f"MASTER_PORT={20000 + 7 * 8 + 3}" in log
    assert "POET_RANKS_PER_NODE=4" in log and "SLURM_NTASKS=2" not in log


def test_ports_of_neighbouring_jobs_and_starts_differ_and_are_not_ephemeral(shell: Shell):
    script = """. launch/slurm/lib.sh
        for SLURM_JOB_ID in {1000..1009} 4294967295; do
            for SLURM_RESTART_COUNT in {0..7}; do poet_rendezvous; echo $MASTER_PORT; done
        done"""
    ports = [int(word) for word in shell.run("bash", "-c", script).stdout.split()]
    assert len(set(ports)) == len(ports) == 88
    assert all(20000 <= port < 32768 for port in ports)


def test_too_few_nodes_are_a_clear_end(shell: Shell, tmp_path: Path):
    for step in (5, 10):
        (tmp_path / "run" / "checkpoints" / f"step-000000{step:02}").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-00000015.partial").mkdir()
    dead = {"NODES": "first allocated\\nsecond down*\\n", "OTHERS": "", "PROGRAM": "exit 1"}
    done = shell.job("pretrain", "--config", "c.yaml", **dead)
    assert done.returncode == 1 and not shell.requeued
    assert "no longer usable: second (down*)" in done.stderr
    assert "partition batch has 1 usable node(s) and this job needs 2: not requeued" in done.stderr
    assert f"continues from {tmp_path}/run/checkpoints/step-00000010\n" in done.stderr
    shell.job("pretrain", "--min-nodes", "1", "--config", "c.yaml", **dead)
    assert shell.requeued


@pytest.mark.parametrize("state", ["drained", "draining", "allocated*", "idle~", "fail", "maint"])
def test_nodes_that_cannot_be_used_do_not_count(state: str, shell: Shell):
    nodes = {"NODES": f"first idle\\nsecond {state}\\n", "OTHERS": "", "PROGRAM": "exit 1"}
    assert shell.job("pretrain", "--config", "c.yaml", **nodes).returncode == 1
    assert not shell.requeued


def test_a_job_that_saved_is_requeued_whatever_the_nodes_are(shell: Shell):
    shell.job("pretrain", "--config", "c.yaml", PROGRAM="exit 75", NODES="first down\\n", OTHERS="")
    assert shell.requeued


def test_a_failed_requeue_is_said(shell: Shell):
    done = shell.job("pretrain", "--config", "c.yaml", PROGRAM="exit 75", REQUEUE="1")
    assert done.returncode == 75 and "scontrol requeue failed" in done.stderr
    assert shell.log.read_text().count("scontrol requeue") == 6  # tried for a minute


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_signals_reach_ranks_again_and_again_and_their_status_survives(name: str, shell: Shell, tmp_path: Path):
    """The first signal comes while the rank is deaf, as during its start; three come while the script waits."""
    ready, go = tmp_path / "ready", tmp_path / "go"
    program = (
        f"trap '' USR1; touch {ready}; until [ -e {go} ]; do /bin/sleep 0.01; done; trap 'exit 75' USR1; while :; do /bin/sleep 0.01; done"
    )
    environment = {**shell.environment, "PROGRAM": program, "SLEEP": "0.05"}
    command = ["bash", "launch/slurm/pretrain.sbatch", "--config", "c.yaml"]
    with subprocess.Popen(command, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as job:
        try:
            deadline = time.monotonic() + 60
            while not ready.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            for _ in range(3):
                job.send_signal(getattr(signal, f"SIG{name}"))
                time.sleep(0.05)
            go.touch()
            _, said = job.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert said.count(f"SIG{name}: time limit, preemption or scancel") == 1
    assert "status 75: saved" in said and shell.requeued


def test_a_sweep_takes_its_line(shell: Shell, tmp_path: Path):
    points = tmp_path / "points.txt"
    points.write_text("low --optim.lr=1e-3 --poet.block_size=32\n\nhigh --optim.lr=2e-3 --poet.block_size=32\n")
    words = (str(points), "runs/sweep", "--min-nodes", "1", "--config", "c.yaml")
    shell.job("sweep", *words, SLURM_ARRAY_TASK_ID="1")
    command = "pretrain --config c.yaml --train.run_dir runs/sweep/high --optim.lr=2e-3 --poet.block_size=32"
    assert f"python -m poet_megatron {command}\n" in shell.log.read_text()
    done = shell.job("sweep", *words, SLURM_ARRAY_TASK_ID="2")
    assert (done.returncode, done.stderr) == (2, f"error: task 2 has no line in {points}, which has 2\n")


def test_a_tokenization_is_requeued_when_it_was_asked_to_stop_but_not_after_an_error(shell: Shell):
    words = ("--input", "a b*", "--output", "parts")
    array = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_CPUS_PER_TASK": "4"}
    assert shell.job("tokenize", *words, **array).returncode == 0
    assert "prepare tokenize --workers 4 --input a b* --output parts --shard 3/8\n" in shell.log.read_text()
    assert shell.job("tokenize", *words, **array, PROGRAM="exit 1").returncode == 1
    assert (
        shell.job("tokenize", *words, **array, PROGRAM="kill -USR1 $PPID; exec /bin/sleep 60", SLURM_RESTART_COUNT="20").returncode == 143
    )
    assert not shell.requeued
    shell.job("tokenize", *words, **array, PROGRAM="kill -USR1 $PPID; exec /bin/sleep 60")
    assert shell.requeued


def test_a_merge_that_was_interrupted_overwrites_what_it_left_and_data_are_verified(shell: Shell):
    shell.job("merge", "--parts", "p", "--output", "data")
    shell.job("merge", "--parts", "p", "--output", "data", SLURM_RESTART_COUNT="1")
    lines = [line for line in shell.log.read_text().splitlines() if line.startswith("python")]
    verify = "python -m poet_megatron prepare verify data"
    merge = "python -m poet_megatron prepare merge --parts p --output data"
    assert lines == [merge, verify, f"{merge} --force", verify]


def test_an_export_keeps_the_evaluation_only_if_it_succeeded(shell: Shell, tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    assert shell.job("export", str(tmp_path), PROGRAM="echo half; exit 1").returncode == 1
    assert not (tmp_path / "evaluation.json").exists()
    done = shell.job("export", str(tmp_path), "--dtype", "bf16", PROGRAM="echo result")
    assert (tmp_path / "evaluation.json").read_text() == "result\n"
    assert done.stdout.splitlines()[0] == "result"
    assert f"export --run {tmp_path} --dtype bf16" in shell.log.read_text()


RANK = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2", "MASTER_ADDR": "first", "MASTER_PORT": "20001"}


def test_a_rank_gets_its_environment_and_ignores_usr1(shell: Shell):
    code = """import os, signal
names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'LOCAL_WORLD_SIZE')
print(*(os.environ[name] for name in names), signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN)"""
    done = shell.run("bash", "launch/slurm/rank.sh", "python3", "-c", code, **RANK)
    assert done.stdout == "5 8 1 4 True\n", done.stderr


def test_a_rank_is_bound_to_the_numa_node_of_its_gpu(shell: Shell):
    shell.stub(shell.bin / "nvidia-smi", 'echo "nvidia-smi $*" >> "$LOG"; echo 00000000:9B:00.0\n')
    shell.stub(shell.bin / "numactl", 'echo "numactl $*" >> "$LOG"; exit "${NUMACTL:-0}"\n')
    shell.stub(shell.bin / "cat", 'echo "cat $*" >> "$LOG"; echo "$NUMA"\n')
    bound = "numactl --cpunodebind=1 --preferred=1 echo trained"
    shell.run("bash", "launch/slurm/rank.sh", "echo", "trained", **RANK, CUDA_VISIBLE_DEVICES="2,6", NUMA="1")
    log = shell.log.read_text()
    assert "nvidia-smi --id=6 " in log and "cat /sys/bus/pci/devices/0000:9b:00.0/numa_node" in log and bound in log
    for reason in ({"NUMA": "-1"}, {"NUMA": "1", "NUMACTL": "1"}):  # no NUMA; not allowed to bind
        shell.log.write_text("")
        assert shell.run("bash", "launch/slurm/rank.sh", "echo", "trained", **RANK, **reason).stdout == "trained\n"
        assert bound not in shell.log.read_text()
