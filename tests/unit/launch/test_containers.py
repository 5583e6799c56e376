"""The container files: one place for versions, bounds of pyproject.toml, and a check that says what is missing on this machine.

No image is built here; launch/containers says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from build_support.settings import LOWEST_TORCH, parse_archs

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "launch" / "containers"
PINNED = {"torch": "TORCH_VERSION", "megatron-core": "MEGATRON_CORE_VERSION", "deepspeed": "DEEPSPEED_VERSION"}
SCRIPTS = ("install.sh", "build.sh", "check.sh")


@pytest.fixture(scope="module")
def check() -> ModuleType:
    """launch/containers/check.py."""
    spec = importlib.util.spec_from_file_location("container_check", FOLDER / "check.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def versions(check: ModuleType) -> dict[str, str]:
    return check.read_versions()


def code(name: str) -> str:
    """A file without its comments."""
    return "\n".join(line for line in (FOLDER / name).read_text().splitlines() if not line.lstrip().startswith("#"))


def test_a_shell_reads_the_same_versions(versions):
    names = list(versions)
    command = f". {FOLDER}/versions.env; for name in {' '.join(names)}; do printf '%s\\n' \"${{!name}}\"; done"
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == list(versions.values())
    assert len(names) == 9


@pytest.mark.parametrize("name", ["Dockerfile", "poet_megatron.def", *SCRIPTS, "check.py"])
def test_versions_are_nowhere_else(name, versions):
    text = code(name)
    for key, value in versions.items():
        assert value not in text, f"{name} repeats {key}"
    assert not re.search(r"==\s*[0-9]", text)
    assert not re.search(r"\b(?:cuda|cudnn|torch)-?[0-9]+\.[0-9]", text)


def test_every_version_is_used(versions):
    text = code("install.sh") + code("build.sh") + code("check.py")
    exported = {"POET_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST"}  # by `set -a` in install.sh, for setup.py and for Apex
    assert "set -a" in text
    for key in set(versions) - exported:
        assert key in text, key


def test_versions_satisfy_pyproject_and_are_those_that_were_tested(versions):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *project["optional-dependencies"]["deepspeed"]]
    bounds = {requirement.name: requirement.specifier for requirement in map(Requirement, texts)}
    tested = dict(line.split("==") for line in (ROOT / "constraints" / "cpu.txt").read_text().splitlines() if "==" in line)
    for package, key in PINNED.items():
        assert versions[key] in bounds[package], f"{package} {versions[key]} is not {bounds[package]}"
        assert versions[key] == tested[package]
    assert Version(versions["TORCH_VERSION"]).release[:2] >= LOWEST_TORCH  # else the image would have no compiled ops


def test_the_base_image_fits_the_versions(versions):
    image = versions["BASE_IMAGE"]
    assert re.fullmatch(r"[a-z]+/[a-z]+:[\w.-]+-devel", image), "no registry host, and compilers inside"
    assert f":{versions['TORCH_VERSION']}-cuda{versions['CUDA_VERSION']}-" in image


def test_both_lists_of_gpus_are_the_same(versions):
    assert parse_archs(versions["POET_CUDA_ARCHS"]) == parse_archs(versions["TORCH_CUDA_ARCH_LIST"])


@pytest.mark.parametrize("name", ["Dockerfile", "poet_megatron.def"])
def test_what_the_containers_copy_exists_and_is_enough(name):
    text = (FOLDER / name).read_text()
    assert text.startswith("# NOT BUILT YET")
    if name == "Dockerfile":
        copied = [word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[:-1]]
    else:
        copied = re.findall(r"^    (\S+) /opt/poet_megatron/\1$", text, re.MULTILINE)
    assert all((ROOT / path).exists() for path in copied), copied
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    code_folders = {Path(path).parts[0] for path in tracked if path.endswith((".py", ".cpp", ".cu", ".yaml")) and "/" in path} - {"docs"}
    assert code_folders <= set(copied) and {"pyproject.toml", "setup.py", "launch", "constraints", "LICENSE", "README.md"} <= set(copied)
    assert "bash" in text and "launch/containers/install.sh" in text


def test_apex_comes_from_git(versions):
    text = code("install.sh")
    assert 'git+https://github.com/NVIDIA/apex@$APEX_REF"' in text
    assert not re.search(r"pip install[^\n]*\bapex\b(?!@)", text)


@pytest.mark.parametrize(("torch_version", "cuda"), [("2.9.0", "13.0"), ("2.13.0", "12.6"), ("2.13.1", "13.0")])
def test_a_base_image_with_another_torch_is_refused(tmp_path, torch_version, cuda):
    """install.sh with a stand-in for Python, before it changes anything."""
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/bash\ncase $* in *version.cuda*) echo {cuda} ;; *) echo {torch_version}+cu1 ;; esac\n")
    fake.chmod(0o755)
    (tmp_path / "apt-get").write_text(f"#!/bin/bash\ntouch {tmp_path}/changed\n")
    (tmp_path / "apt-get").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(FOLDER / "install.sh")], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"has torch {torch_version}+cu1 for CUDA {cuda}; versions.env says" in done.stderr
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize("engine", ["docker", "podman", "apptainer"])
def test_build_passes_the_base_image_on(tmp_path, versions, engine):
    fake = tmp_path / engine
    fake.write_text('#!/bin/bash\nprintf "%s\\n" "$PWD" "$@"\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [str(FOLDER / "build.sh"), engine, "--force"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=True)
    folder, build, option, base, *rest = done.stdout.splitlines()
    assert (build, option, base) == ("build", "--build-arg", f"BASE_IMAGE={versions['BASE_IMAGE']}")
    assert "--force" in rest
    assert rest[-1] == str(FOLDER / "poet_megatron.def") if engine == "apptainer" else str(ROOT)
    assert folder == (str(ROOT) if engine == "apptainer" else str(tmp_path))
    mirror = subprocess.run(command, env={**environment, "BASE_IMAGE": "mirror/torch:x"}, capture_output=True, text=True, cwd=tmp_path)
    assert "BASE_IMAGE=mirror/torch:x" in mirror.stdout.splitlines()


def test_build_without_an_engine():
    done = subprocess.run([str(FOLDER / "build.sh")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "usage: launch/containers/build.sh docker|podman|apptainer [OPTION ...]\n")


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a CPU build of torch")
def test_the_check_is_honest_on_a_cpu():
    """Versions, CPU ops and the training step are there; everything of a GPU is named as missing, and the status says so."""
    done = subprocess.run([sys.executable, str(FOLDER / "check.py"), "--json"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    found = {result["name"]: result for result in json.loads(done.stdout)}
    for name in (*PINNED, "poet-megatron", "training step, cpu"):
        assert found[name]["status"] == "ok", found[name]
    for name in ("CUDA of torch", "NCCL", "Apex, amp_C", "Apex, fused_layer_norm_cuda"):
        assert found[name]["status"] == "FAIL", found[name]
    assert "none, a CPU build; versions.env says" in found["CUDA of torch"]["detail"]
    assert found["GPU"]["status"] == "skip"


def test_another_version_is_a_failure(check):
    assert check.same("torch", "2.13.0+cu130", "2.13.0", "mend it").status == "ok"
    assert check.same("torch", "2.13.1", "2.13.0", "mend it") == ("FAIL", "torch", "2.13.1; versions.env says 2.13.0: mend it")
    assert check.same("torch", None, "2.13.0", "mend it").detail == "missing; versions.env says 2.13.0: mend it"


def test_apex_is_looked_for_by_its_modules(check, monkeypatch):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: SimpleNamespace() if name == "amp_C" else None)
    assert [result.status for result in check.apex({"APEX_REF": "25.09"})] == ["ok", "FAIL", "FAIL"]
    assert [result.status for result in check.apex({"APEX_REF": ""})] == ["ok", "skip", "skip"]


def test_a_check_that_raises_fails_and_the_others_go_on(check, monkeypatch):
    def broken(versions):
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(check, "CHECKS", (broken, lambda versions: iter([check.Result("ok", "next", "")])))
    assert check.run_checks({}) == [
        ("FAIL", "broken", "ImportError: libcudart.so.13: cannot open shared object file"),
        ("ok", "next", ""),
    ]


def test_a_wrong_layer_fails_the_training_step(check, monkeypatch):
    from poet_megatron.layers.linear import PoetLinear

    forward = PoetLinear.forward
    monkeypatch.setattr(PoetLinear, "forward", lambda self, x: 1.01 * forward(self, x))
    assert next(check.training_step({})).status == "FAIL"


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", "-x", *(str(FOLDER / name) for name in SCRIPTS)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == ""
