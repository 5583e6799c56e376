"""A Slurm of our own on this machine: munged, slurmctld and one slurmd per node, in a folder, on free ports, gone afterwards.

    python tests/slurm/cluster.py DIR      start one, print the line that makes sbatch use it, stop it on Ctrl-C or SIGTERM

Needs root (character devices as GPUs, names in /etc/hosts) and Debian's slurmctld, slurmd, slurm-client and munge. All nodes are this
machine, so there are neither cgroups nor real GPUs; what the controller does (allocation, signals, preemption, requeue) is the real thing.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

NODES, GPUS = 8, 8
NODE = f"CPUs=128 RealMemory=512000 Gres=gpu:h100:{GPUS}"
GRACE_SECONDS = 90
"""What a preempted job has left, and a cancelled one: generous, for a loaded machine."""
DEADLINE_SECONDS = 60.0
COMMAND_SECONDS, STOP_SECONDS = 120, 10
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "squeue", "scancel", "shellcheck")
HOSTS = Path("/etc/hosts")
HOSTS_MARK = "# poet-megatron tests, pid"
NVIDIA_MAJOR = 195

CONF = """\
ClusterName=virtual
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait={grace}
MessageTimeout=60
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=batch Nodes=ALL Default=YES MaxTime=2-00:00:00 PriorityTier=5 PreemptMode=OFF
PartitionName=pair Nodes=gpu4,gpu5 MaxTime=2-00:00:00 PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=gpu7 MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
PartitionName=high Nodes=gpu7 MaxTime=UNLIMITED PriorityTier=10
"""


def missing_programs() -> list[str]:
    """Programs of Slurm that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]


class Cluster:
    """A running cluster; partitions batch (all nodes), pair (gpu4, gpu5), low (gpu7, preemptable) and high (gpu7)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.conf = self.folder / "slurm.conf"
        self.nodes = [f"gpu{number}" for number in range(NODES)]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of commands that talk to this cluster."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "POET_"))}
        return {**kept, "SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}

    def run(self, *words: str, check: bool = True) -> str:
        """Output of a Slurm command."""
        command = ["timeout", str(COMMAND_SECONDS), *words]  # some wait for ever for a controller that is gone
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self) -> None:
        """Start everything and wait until every node is idle."""
        for name in ("state", "spool", "log", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._write_settings()
        _add_hosts(self.nodes)
        names = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "log/munged", "seed-file": "seed"}
        (self.folder / "munge.key").write_bytes(os.urandom(1024))
        (self.folder / "munge.key").chmod(0o600)
        self.run("munged", "--force", *(f"--{option}={self.folder / name}" for option, name in names.items()))
        self.run("slurmctld", "-c", "-f", str(self.conf))
        for node in self.nodes:
            self.start_node(node)
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(self.run("sinfo", "-h", "-N", "-t", "idle", "-p", "batch", "-o", "%N", check=False).split()) < NODES:
            assert time.monotonic() < deadline, self.run("sinfo", "-N", "-l", check=False)
            time.sleep(0.1)

    def start_node(self, node: str) -> None:
        """Start the slurmd of a node, and let it take jobs again if it was marked down."""
        (self.folder / "spool" / node).mkdir(exist_ok=True)
        self.run("slurmd", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> int:
        """Kill the slurmd of a node and its steps with SIGKILL, and mark it down as the controller does after a while; number of steps."""
        daemon = self._pid(f"slurmd.{node}.pid")
        steps = [found.pid for found in psutil.process_iter(["cmdline"]) if self._is_step_of(node, found)]
        for pid in [*([daemon] if daemon else []), *steps]:
            _kill_tree(pid)
        self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=died")
        return len(steps)

    def _is_step_of(self, node: str, process: psutil.Process) -> bool:
        """Whether a process is a slurmstepd of `node`: it has the node's name in the environment that slurmd gave it."""
        with contextlib.suppress(psutil.Error):
            words = process.info["cmdline"] or [""]
            return "slurmstepd" in words[0] and any(task.environ().get("SLURMD_NODENAME") == node for task in process.children())
        return False

    def kill_jobs(self) -> None:
        """End all jobs at once: scancel alone would give them KillWait."""
        self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        self.run("scancel", "--user=root", check=False)

    def stop(self) -> None:
        """Cancel all jobs, stop all daemons and take the names out of /etc/hosts."""
        self.kill_jobs()
        daemons = [found for found in psutil.process_iter(["cmdline"]) if self._is_ours(found)]
        for found in psutil.process_iter(["cmdline"]):
            if "slurmstepd" in (found.info["cmdline"] or [""])[0] and _uses(found, self.conf):
                _kill_tree(found.pid)
        for found in daemons:
            with contextlib.suppress(psutil.Error):
                found.terminate()
        for found in psutil.wait_procs(daemons, timeout=STOP_SECONDS)[1]:
            with contextlib.suppress(psutil.Error):
                found.kill()
        _remove_hosts(os.getpid())

    def _is_ours(self, process: psutil.Process) -> bool:
        """Whether a process is a daemon of this cluster, by its command line: a test may have taken the folder away."""
        words = process.info["cmdline"] or [""]
        return Path(words[0]).name in ("munged", "slurmctld", "slurmd") and f"{self.folder}/" in " ".join(words)

    def _pid(self, name: str) -> int | None:
        try:
            return int((self.folder / name).read_text())
        except (OSError, ValueError):
            return None

    def _write_settings(self) -> None:
        ports = _free_ports(NODES + 1)
        text = CONF.format(port=ports[0], folder=self.folder, grace=GRACE_SECONDS)
        for node, port in zip(self.nodes, ports[1:], strict=True):
            text += f"NodeName={node} NodeHostname=localhost NodeAddr=127.0.0.1 Port={port} {NODE}\n"
        self.conf.write_text(text)
        for number in range(GPUS):  # Slurm sets CUDA_VISIBLE_DEVICES for character devices only
            with contextlib.suppress(FileExistsError):
                os.mknod(self.folder / "dev" / f"nvidia{number}", stat.S_IFCHR | 0o600, os.makedev(NVIDIA_MAJOR, number))
        devices = f"{self.folder}/dev/nvidia[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text(f"NodeName=gpu[0-{NODES - 1}] Name=gpu Type=h100 File={devices}\n")
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n")


@contextlib.contextmanager
def running_cluster(folder: Path) -> Iterator[Cluster]:
    """A cluster in `folder`, stopped at the end whatever happens."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def _add_hosts(nodes: list[str]) -> None:
    """Make the nodes' names resolve, in a line that says who needs it; lines of processes that are gone go."""
    for pid in {int(found) for found in re.findall(f"{HOSTS_MARK} (\\d+)", HOSTS.read_text()) if not psutil.pid_exists(int(found))}:
        _remove_hosts(pid)
    with HOSTS.open("a") as file:
        file.write(f"127.0.0.1 {' '.join(nodes)} {HOSTS_MARK} {os.getpid()}\n")


def _remove_hosts(pid: int) -> None:
    """Written in place: in a container /etc/hosts may be a mount, which cannot be replaced."""
    lines = HOSTS.read_text().splitlines(keepends=True)
    HOSTS.write_text("".join(line for line in lines if not line.rstrip().endswith(f"{HOSTS_MARK} {pid}")))


def _uses(process: psutil.Process, conf: Path) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(found.environ().get("SLURM_CONF") == str(conf) for found in (process, *process.children(recursive=True)))
    return False


def _kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for found in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.Error):
                found.kill()


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running_cluster(Path(sys.argv[1])) as started:
        print(f"export SLURM_CONF={started.conf}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
