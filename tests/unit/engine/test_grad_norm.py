"""Engine.update returns the norm of the gradients whether it clips them or not."""

from __future__ import annotations

import pytest
import torch

from poet_megatron.engine.build import build_engine
from poet_megatron.parallel.context import parallel_context

KINDS = {
    "fp32": {},
    "bf16": {"train.precision": "bf16"},
    "distributed optimizer": {"parallel.distributed_optimizer": "true"},
    "distributed optimizer, bf16": {"parallel.distributed_optimizer": "true", "train.precision": "bf16"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_norm_without_clipping(tiny_run, kind: str):
    run = tiny_run("run", KINDS[kind])
    words = torch.randint(0, 320, (2, 32), generator=torch.Generator().manual_seed(0))
    batch = {"tokens": words, "labels": words, "position_ids": torch.arange(32).expand(2, 32), "loss_mask": torch.ones(2, 32)}
    norms = {}
    with parallel_context(run.parallel, run.train.seed) as context:
        for clip_grad in (1e9, 0.0):
            engine = build_engine(run, context)
            engine.accumulate([batch] * engine.micro_batches)
            norms[clip_grad] = engine.update(clip_grad)
    assert norms[1e9] > 0.1
    assert norms[0.0] == norms[1e9]
