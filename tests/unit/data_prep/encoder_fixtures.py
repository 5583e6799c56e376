"""Models of the encoder tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from data_prep.tokenizer import train_tokenizer
from tests.unit.data_prep.encoder_samples import corpus

MISTRAL = "POET_MISTRAL_MODEL"
"""Environment variable with the path of tokenizer.model.v1, for where the wheel mistral-common is not installed."""


@pytest.fixture(scope="session")
def small() -> list[str]:
    lines = [line for text in corpus(300_000) for line in text.split("\n")]
    return [line for line in lines if line.strip()]


@pytest.fixture(scope="session")
def own(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """What `poet-megatron prepare train-tokenizer` makes."""
    path = tmp_path_factory.mktemp("own") / "tokenizer.model"
    train_tokenizer(corpus(2_000_000), path, 6000)
    return path.read_bytes()


@pytest.fixture(scope="session")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The same of the other kind."""
    path = tmp_path_factory.mktemp("unigram") / "tokenizer.model"
    train_tokenizer(corpus(2_000_000), path, 6000, model_type="unigram")
    return path.read_bytes()


@pytest.fixture(scope="session")
def mistral() -> bytes:
    named = os.environ.get(MISTRAL)
    spec = importlib.util.find_spec("mistral_common")
    folders = list(spec.submodule_search_locations or []) if spec else []
    paths = [Path(named)] if named else [Path(folder) / "data" / "tokenizer.model.v1" for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        pytest.skip(f"no tokenizer.model.v1: pip install mistral-common, or set {MISTRAL}")
    return path.read_bytes()
