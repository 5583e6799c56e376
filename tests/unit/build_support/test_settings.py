"""Environment variables of a build: what they mean, and the message when they mean nothing."""

from __future__ import annotations

import os

import pytest

from build_support.settings import LOWEST_TORCH, BuildSettings, SettingError, parse_archs
from poet_megatron.ops import native


def test_defaults_compile_for_the_processors_of_this_process() -> None:
    settings = BuildSettings.from_environment({})
    assert (settings.native, settings.cuda, settings.archs) == ("auto", "auto", ("80", "90", "100"))
    assert settings.jobs == len(os.sched_getaffinity(0))
    assert BuildSettings.from_environment({"POET_CUDA": "", "MAX_JOBS": "", "POET_CUDA_ARCHS": ""}) == settings


def test_values_are_taken() -> None:
    environment = {"POET_NATIVE": "1", "POET_CUDA": "0", "POET_CUDA_ARCHS": "90a", "MAX_JOBS": "3"}
    assert BuildSettings.from_environment(environment) == BuildSettings("1", "0", ("90a",), 3)


@pytest.mark.parametrize(
    ("text", "archs"),
    [("80;90;100", ("80", "90", "100")), ("8.0, 9.0a", ("80", "90a")), ("sm_80 sm_100a sm_80", ("80", "100a")), ("10.0", ("100",))],
)
def test_spellings_of_architectures(text: str, archs: tuple[str, ...]) -> None:
    assert parse_archs(text) == archs


def test_machine_code_for_each_architecture_and_ptx_of_the_last() -> None:
    assert BuildSettings(archs=("80", "90a")).gencode == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90a,code=compute_90a"),
    ]


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"POET_CUDA": "yes"}, ["POET_CUDA='yes'", "0, 1, auto"]),
        ({"POET_NATIVE": "2"}, ["POET_NATIVE='2'", "0, 1, auto"]),
        ({"POET_CUDA_ARCHS": "80;ampere"}, ["POET_CUDA_ARCHS='80;ampere'", "ampere", ">= 80"]),
        ({"POET_CUDA_ARCHS": "75"}, ["75", ">= 80"]),
        ({"POET_CUDA_ARCHS": ";"}, ["nothing"]),
        ({"MAX_JOBS": "0"}, ["MAX_JOBS='0'", ">= 1"]),
        ({"MAX_JOBS": "many"}, ["MAX_JOBS='many'"]),
    ],
)
def test_nonsense_is_named(environment: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingError) as caught:
        BuildSettings.from_environment(environment)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_build_and_the_loader_agree_on_the_lowest_torch() -> None:
    assert LOWEST_TORCH == native.LOWEST_TORCH
