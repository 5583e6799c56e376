"""What engine: deepspeed does not do is refused by the name of the setting, with what to set instead."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from poet_megatron.config.load import load_config
from poet_megatron.engine.zero import import_deepspeed
from poet_megatron.errors import UserError
from poet_megatron.parallel.context import ParallelContext
from poet_megatron.parallel.layout import check_layout

CONTEXT = ParallelContext(rank=0, world_size=1, data_rank=0, data_size=1, device=torch.device("cpu"))
REFUSED = [
    (["--deepspeed.zero_stage=3"], r"deepspeed\.zero_stage is 3; choose 1 or 2.*FSDP.*engine to megatron"),
    (["--deepspeed.zero_stage=0"], r"deepspeed\.zero_stage is 0; choose 1 or 2"),
    (["--parallel.distributed_optimizer=true"], r"parallel\.distributed_optimizer is true with engine deepspeed.*set it to false"),
    (["--parallel.tensor_parallel=2"], r"parallel\.tensor_parallel x parallel\.pipeline_parallel = 2 x 1.*set both to 1"),
    (["--parallel.pipeline_parallel=2"], r"1 x 2.*set both to 1, or engine to megatron"),
    (["--engine=fsdp"], r"engine is 'fsdp', which is not supported: .*W0.*engine deepspeed.*choose one of megatron, deepspeed"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED)
def test_unsupported_settings(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        check_layout(load_config(None, ["--engine=deepspeed", *words]), 2)


def test_both_stages_load():
    for stage in (1, 2):
        assert load_config(None, ["--engine=deepspeed", f"--deepspeed.zero_stage={stage}"]).deepspeed.zero_stage == stage


def test_a_missing_package_names_the_extra(monkeypatch):
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(UserError, match=r"not installed: pip install '\.\[deepspeed\]'.*or set engine to megatron"):
        import_deepspeed(CONTEXT)


@pytest.mark.parametrize("version", ["0.19.7", "0.9.5", "0.20.0", "1.0"])
def test_a_release_that_is_too_old_or_new(monkeypatch, version: str):
    """Older ones would ignore gradient_allreduce_op and average gradients, without a word."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.raises(UserError, match=rf"DeepSpeed {version} is installed; it must be 0\.19\.8 or a later 0\.19"):
        import_deepspeed(CONTEXT)
