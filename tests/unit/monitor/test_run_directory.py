"""The run directory: paths, lock, run.json."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from poet_megatron.errors import UserError
from poet_megatron.monitor.run_dir import RunDirectory, git_revision

HOLDER = """
import sys, time
from poet_megatron.monitor.run_dir import RunDirectory
RunDirectory(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_creates_the_directory_with_parents(tmp_path):
    with RunDirectory(tmp_path / "a" / "b") as run:
        assert run.path.is_dir() and run.checkpoints_path == tmp_path / "a" / "b" / "checkpoints"


def test_constructing_touches_nothing(tmp_path):
    RunDirectory(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_empty_path():
    with pytest.raises(UserError, match="train.run_dir is empty"):
        RunDirectory("")


def test_path_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="train.run_dir .*file.* cannot be written"):
        RunDirectory(tmp_path / "file").acquire()


def test_second_process_is_told_who_holds_it_and_a_kill_frees_it(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by pid {child.pid} on host {socket.gethostname()} since 20"):
            RunDirectory(tmp_path).acquire()
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    with RunDirectory(tmp_path):
        pass


def test_failed_acquire_leaves_the_holder_written_down(tmp_path):
    with RunDirectory(tmp_path) as holder:
        for _ in range(2):
            with pytest.raises(UserError, match=f"pid {os.getpid()} "):
                RunDirectory(tmp_path).acquire()
        assert json.loads(holder.lock_path.read_text())["pid"] == os.getpid()


def test_release_lets_the_next_one_in(tmp_path):
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.acquire()
    first.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_run_info_gains_an_entry_per_start(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.write_run_info(["first"])
        run.write_run_info(["second", "--x"])
    entries = json.loads(run.info_path.read_text())
    assert [entry["command"] for entry in entries] == [["first"], ["second", "--x"]]
    versions = entries[0]["versions"]
    assert set(versions) >= {"torch", "megatron-core", "transformers", "numpy", "sentencepiece", "python"}
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert entries[0]["hostname"] == socket.gethostname() and entries[0]["started"].endswith("+00:00")


def test_damaged_run_info_is_set_aside(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.info_path.write_text("[{")
        run.write_run_info(["again"])
    assert len(json.loads(run.info_path.read_text())) == 1
    assert (tmp_path / "run.json.damaged").read_text() == "[{"


def test_config_is_written_whole(tmp_path):
    with RunDirectory(tmp_path) as run:
        run.write_config("a: 1\n")
        run.write_config("b: 2\n")
    assert run.config_path.read_text() == "b: 2\n"
    assert not list(tmp_path.glob("*.partial"))


def git(folder, *words):
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=n", "-c", "user.email=e@x", *words], check=True, capture_output=True)


def test_git_revision(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    assert git_revision(package) == (None, None)
    git(tmp_path, "init")
    (tmp_path / "other.txt").write_text("of another project\n")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-m", "zero")
    (package / "code.py").write_text("x = 1\n")
    assert git_revision(package) == (None, None)  # in a repository, but not of it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    revision, dirty = git_revision(package)
    assert len(revision) == 40 and dirty is False
    (package / "code.py").write_text("x = 2\n")
    assert git_revision(package) == (revision, True)
