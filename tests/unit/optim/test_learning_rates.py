"""The learning rates that a run reports do not depend on which parameters this rank's shard of the optimizer holds."""

from __future__ import annotations

import pytest
import torch

from poet_megatron.optim.build import build_scheduler, learning_rates
from poet_megatron.optim.config import OptimConfig

CONFIG = OptimConfig(lr=1e-2, poet_lr=1e-3, warmup_steps=4)


class Shard:
    """What the distributed optimizer shows of its groups: all of them, some without an element of this rank."""

    def __init__(self, base: list[torch.Tensor], skews: list[torch.Tensor], norms: list[torch.Tensor]) -> None:
        common = {"max_lr": CONFIG.lr, "min_lr": 0.0, "lr_mult": 1.0, "wd_mult": 1.0}
        skew_settings = {"max_lr": CONFIG.poet_lr, "start_wd": 0.0, "end_wd": 0.0}
        self.param_groups = [
            {**common, "params": base},
            {**common, **skew_settings, "params": skews},
            {**common, "wd_mult": 0.0, "params": norms},
        ]


@pytest.mark.parametrize("held", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_a_shard_without_elements_of_a_group_reports_its_rate(held: tuple[int, int, int]):
    shard = Shard(*([torch.ones(2)] * count for count in held))
    scheduler = build_scheduler(shard, CONFIG, 100)  # type: ignore[arg-type]
    scheduler.step(2)
    assert learning_rates(shard.param_groups) == pytest.approx({"base": CONFIG.lr / 2, "poet": CONFIG.poet_lr / 2})


def test_dense_training_has_one_rate():
    shard = Shard([], [], [])
    del shard.param_groups[1]
    build_scheduler(shard, CONFIG, 100).step(4)  # type: ignore[arg-type]
    assert learning_rates(shard.param_groups) == {"base": CONFIG.lr}
