"""What `launch.slurm` makes of Slurm's answers, and the settings that a site file exports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from poet_megatron.errors import UserError
from poet_megatron.launch.check import format_duration
from poet_megatron.launch.site import site_environment
from poet_megatron.launch.slurm import Slurm, parse_duration

PARTITIONS = """\
PartitionName=gpu AllowGroups=ALL Default=NO MaxNodes=4 MaxTime=2-00:00:00 MinNodes=0 State=UP TotalNodes=3
PartitionName=cpu AllowGroups=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 State=UP TotalNodes=1
"""
NODES = """\
n1 idle gpu:h100:8(S:0-1)
n2 drained gpu:h100:8(S:0-1)
n3 mixed gpu:4,shard:16
n4 idle* gpu:h100:2,gpu:a100:1
n1 idle gpu:h100:8(S:0-1)
"""


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(0o755)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    program(tmp_path, "scontrol", f'[ "$3" = partition ] && printf "{PARTITIONS}" || echo "MaxArraySize            = 500"\n')
    program(tmp_path, "sinfo", f'printf "{NODES}"\n')
    return Slurm({**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS": "3", "SLURM_CONF": "here"}, tmp_path)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800),
        ("30:10", 1810),
        ("2:30:10", 9010),
        ("1-2", 93600),
        ("1-2:30", 95400),
        ("1-02:30:10", 95410),
        ("infinite", None),
        ("UNLIMITED", None),
    ],
)
def test_durations_are_those_of_slurm(text: str, seconds: int | None):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1d", "1-", "1:2:3:4", "-5", "2 hours"])
def test_other_durations_are_refused(text: str):
    with pytest.raises(UserError, match="is not D-HH:MM:SS, as in 1-12:00:00"):
        parse_duration(text)


def test_durations_are_written_as_they_are_read():
    assert format_duration(95410) == "1-02:30:10"
    assert parse_duration(format_duration(59)) == 59


def test_a_partition_is_read_with_its_limits_and_nodes(slurm: Slurm):
    found = slurm.partition("gpu")
    assert (found.max_seconds, found.max_nodes) == (172800, 4)
    assert [(node.name, node.gpus, node.usable) for node in found.nodes] == [
        ("n1", 8, True),
        ("n2", 8, False),
        ("n3", 4, True),
        ("n4", 3, False),
    ]
    assert [node.name for node in found.with_gpus(4)] == ["n1", "n2", "n3"]
    assert slurm.max_array_size() == 500


def test_the_default_partition_and_one_that_is_not_there(slurm: Slurm):
    found = slurm.partition(None)
    assert (found.name, found.max_seconds, found.max_nodes) == ("cpu", None, None)
    with pytest.raises(UserError, match="there is no partition big; the cluster has gpu, cpu"):
        slurm.partition("big")


def test_submission(slurm: Slurm, tmp_path: Path):
    program(tmp_path, "sbatch", 'echo "$PWD $SLURM_NTASKS $SLURM_CONF $*" > args; echo "123;cluster"\n')
    assert slurm.submit(["--nodes=2", "a script"]) == 123
    assert (tmp_path / "args").read_text() == f"{tmp_path}  here --parsable --nodes=2 a script\n"  # SLURM_NTASKS is of another job


def test_what_sbatch_says_is_in_the_error(slurm: Slurm, tmp_path: Path):
    program(tmp_path, "sbatch", 'echo "sbatch: error: invalid account" >&2; exit 1\n')
    with pytest.raises(UserError, match="sbatch refused the job: sbatch: error: invalid account"):
        slurm.submit(["x"])
    with pytest.raises(UserError, match="sbatch would refuse this job: sbatch: error: invalid account"):
        slurm.test(["x"])


def test_jobs_that_are_alive(slurm: Slurm, tmp_path: Path):
    program(tmp_path, "squeue", '[ "$3" = --jobs=5 ] && printf "RUNNING\\nRUNNING\\n"; [ "$3" = --jobs=6 ] && exit 1; exit 0\n')
    assert slurm.alive([4, 5, 6]) == {5: "RUNNING"}


def test_without_slurm(tmp_path: Path):
    slurm = Slurm({"PATH": str(tmp_path)}, tmp_path)
    assert not slurm.available
    with pytest.raises(UserError, match="sbatch is not installed here: run this on a login node of the cluster, or add --dry-run"):
        slurm.submit([])


def test_site_settings(tmp_path: Path):
    site = tmp_path / "site.sh"
    site.write_text('echo noise\nexport SBATCH_ACCOUNT="a b"\nPOET_PYTHON=(x)\nsite_setup() { exit 1; }\n')
    found = site_environment(site, {"PATH": os.environ["PATH"], "KEPT": "1\n2"})
    assert (found["SBATCH_ACCOUNT"], found["KEPT"]) == ("a b", "1\n2") and "POET_PYTHON" not in found
    site.write_text("if\n")
    with pytest.raises(UserError, match=r"cannot be sourced: .*syntax error.*; check it with bash -n"):
        site_environment(site, os.environ)
    with pytest.raises(UserError, match="POET_SITE is .*/none, which does not exist"):
        site_environment(tmp_path / "none", os.environ)
