"""setuptools' build backend, with torch as a build requirement only where its headers are needed and not there.

An isolated build does not see the environment it installs into, but its headers can be used (`toolchain.library_folders`), so nothing is
fetched twice where torch is installed already.
"""

from __future__ import annotations

import os
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks of PEP 517 and PEP 660)

from build_support import toolchain
from build_support.settings import LOWEST_TORCH, BuildSettings, SettingError

HEADERS_FROM = f"torch=={LOWEST_TORCH[0]}.{LOWEST_TORCH[1]}.*"
"""Headers of the lowest supported version serve every later one."""


def native_requirements() -> list[str]:
    """What compiling needs beyond pyproject.toml: nothing without a compiler, or where torch is installed."""
    try:
        settings = BuildSettings.from_environment(os.environ)
        if settings.native == "0" or toolchain.find_torch() is not None:
            return []
        toolchain.find_compiler(os.environ)
    except SettingError as error:
        raise SystemExit(f"error: {error}") from error
    except toolchain.MissingToolError:
        return []
    return [HEADERS_FROM]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Requirements of setuptools and of the compiled parts."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Requirements of setuptools and of the compiled parts."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_requirements()]
