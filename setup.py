"""Build entry point: the compiled parts. The metadata lives in pyproject.toml, the building in build_support/."""

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).resolve().parent))

from build_support.command import BuildNative, extensions  # noqa: E402
from build_support.settings import BuildSettings, SettingError  # noqa: E402

try:
    setup(ext_modules=extensions(BuildSettings.from_environment(os.environ)), cmdclass={"build_ext": BuildNative})
except SettingError as error:
    sys.exit(f"error: {error}")
