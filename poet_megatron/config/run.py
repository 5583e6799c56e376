"""RunConfig: everything a run is, composed from the settings that each component owns."""

from __future__ import annotations

from dataclasses import dataclass, field

from poet_megatron.checkpoint.config import CheckpointConfig
from poet_megatron.config.checks import one_of
from poet_megatron.data.config import DataConfig
from poet_megatron.engine.config import DeepSpeedConfig
from poet_megatron.guard.config import GuardConfig
from poet_megatron.layers.config import PoetConfig
from poet_megatron.model.config import ModelConfig
from poet_megatron.monitor.config import MonitorConfig
from poet_megatron.optim.config import OptimConfig
from poet_megatron.parallel.config import ParallelConfig
from poet_megatron.profiling.config import ProfileConfig
from poet_megatron.train.config import TrainConfig

METHODS = ("poet", "adamw")
ENGINES = ("megatron", "deepspeed")
CONFIG_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A complete run. YAML files and `--section.key value` on the command line set these fields."""

    version: int = CONFIG_VERSION
    """Version of this configuration format."""
    method: str = "poet"
    """poet: linear layers are reparameterized as R W0 P; adamw: dense training in the same loop."""
    engine: str = "megatron"
    """megatron: megatron-core's data parallelism and optimizers; deepspeed: ZeRO (data parallelism only; pip install '.[deepspeed]')."""
    model: ModelConfig = field(default_factory=ModelConfig)
    poet: PoetConfig = field(default_factory=PoetConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("engine", self.engine, ENGINES)
        if self.version > CONFIG_VERSION:
            raise ValueError(f"version is {self.version}; this release reads versions up to {CONFIG_VERSION}: upgrade poet-megatron")
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(f"optim.warmup_steps is {self.optim.warmup_steps}; it must be less than train.steps = {self.train.steps}")
        self.profile.check_length(self.train.steps)
        if self.engine == "deepspeed" and self.parallel.distributed_optimizer:
            raise ValueError(
                "parallel.distributed_optimizer is true with engine deepspeed, which shards the optimizer itself (deepspeed.zero_stage): "
                "set it to false, or engine to megatron"
            )
        if self.guard.hang_minutes >= self.parallel.timeout_minutes:
            raise ValueError(
                f"guard.hang_minutes is {self.guard.hang_minutes}; it must be less than parallel.timeout_minutes = "
                f"{self.parallel.timeout_minutes}, after which collectives fail by themselves: lower it, or raise the other"
            )
        if self.method == "poet":
            self._check_blocks()

    def _check_blocks(self) -> None:
        widths = {"model.hidden_size": self.model.hidden_size, "model.ffn_hidden_size": self.model.ffn_hidden_size}
        for side in ("in", "out"):
            block = self.poet.side_block(side)
            for name, width in widths.items():
                if block > 1 and block > width:
                    raise ValueError(
                        f"block size {int(block)} (side {side}) is larger than {name} = {width}: poet.block_size is at most {width}"
                    )
