"""Runs of test_checkpoint_layouts.py: saved in one parallel layout, continued in another. One torchrun of 4 processes makes them all.

A case uses 1, 2 or 4 of the processes; cases of fewer ranks run side by side. Every case goes through `pretrain`, as a user's run does.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from poet_megatron.checkpoint.io import PARTS, load_checkpoint, save_checkpoint
from poet_megatron.checkpoint.store import CheckpointStore
from poet_megatron.config.load import load_config
from poet_megatron.train.run import pretrain

PROCESSES, BATCH = 4, 8
SAVED, LAST = 6, 16  # merges at 4 (before the checkpoint), 8, 12 and 16
SETTINGS = {
    "model.num_layers": 2,
    "model.hidden_size": 64,
    "model.ffn_hidden_size": 96,
    "model.num_attention_heads": 4,
    "model.seq_length": 32,
    "model.vocab_size": 320,
    "poet.block_size": 10,  # shard groups are 16 and 24 features wide: blocks of 10, and ragged ones of 6 and 4
    "poet.merge_interval": 4,
    "poet.shard_groups": 4,
    "optim.lr": 5e-3,
    "optim.poet_lr": 5e-3,
    "optim.clip_grad": 1.0,
    "optim.eps": 1e-5,  # with 1e-8, Adam's first step after a merge moves by the sign of gradients that are rounding errors
    "train.steps": 100,
    "train.global_batch_size": BATCH,
    "train.precision": "fp32",
    "train.eval_tokens": 64,
    "monitor.log_interval": 1,
    "checkpoint.keep_last": 10,
    "parallel.timeout_minutes": 2.0,
}


@dataclass(frozen=True)
class Layout:
    """A number of ranks and how they share a run; data parallelism takes what is left."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    other: dict[str, object] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, object]:
        micro_batch = BATCH * self.tensor * self.pipeline // self.ranks // self.pipeline  # as many micro-batches as stages
        own = {"parallel.tensor_parallel": self.tensor, "parallel.pipeline_parallel": self.pipeline, "train.micro_batch_size": micro_batch}
        return own | self.other


SEQUENCE = {"parallel.sequence_parallel": True}
SHARDED = {"parallel.distributed_optimizer": True, "parallel.overlap_grad_reduce": True}
LAYOUTS = {
    "1": Layout(1),
    "tp2": Layout(2, tensor=2),
    "pp2": Layout(2, pipeline=2),
    "pp2-interleaved": Layout(2, pipeline=2, other={"parallel.virtual_stages": 2}),
    "dp2-sharded": Layout(2, other=SHARDED),
    "deepspeed-dp2": Layout(2, other={"engine": "deepspeed"}),
    "tp4-sp": Layout(4, tensor=4, other=SEQUENCE),
    "tp2-sp-dp2": Layout(4, tensor=2, other=SEQUENCE),
    "tp2-dp2-sharded": Layout(4, tensor=2, other=SHARDED),
    "tp2-pp2": Layout(4, tensor=2, pipeline=2),
    "dp4": Layout(4),
    "dp4-sharded": Layout(4, other=SHARDED),
}
VARIANTS: dict[str, dict[str, object]] = {
    "fp32": {},
    "deep": {"model.num_layers": 4},
    "bf16": {"train.precision": "bf16"},
    "shared": {"poet.share_input_rotation": True, "poet.block_size_out": 0},
    "adamw": {"method": "adamw"},
}


@dataclass(frozen=True)
class Case:
    """A run saved in layout `source` and continued in `target` (None: the run that is saved, and goes on in `source`)."""

    variant: str
    source: str
    target: str | None = None

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.source}" + (f"-to-{self.target}" if self.target else "")

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.target or self.source]


def _loads(variant: str, sources: list[str], targets: list[str]) -> list[Case]:
    return [Case(variant, source, target) for source in sources for target in targets]


LOADS = [
    *_loads("fp32", ["tp2-sp-dp2", "pp2", "tp4-sp", "dp2-sharded", "deepspeed-dp2"], ["1", "tp2", "dp4", "tp2-pp2"]),
    *_loads("fp32", ["tp2-sp-dp2"], ["tp2-sp-dp2", "dp4-sharded", "deepspeed-dp2"]),
    *_loads("deep", ["pp2-interleaved"], ["1", "tp2-pp2"]),
    *_loads("deep", ["1"], ["pp2-interleaved"]),
    *_loads("bf16", ["tp2-dp2-sharded"], ["1", "dp4-sharded", "tp2-pp2"]),
    *_loads("bf16", ["1"], ["dp2-sharded"]),
    *_loads("shared", ["tp2-sp-dp2"], ["1", "pp2"]),
    *_loads("adamw", ["tp2-dp2-sharded"], ["1"]),
]
REFERENCES = [Case(variant, "1") for variant in VARIANTS]
SAVES = [*REFERENCES, *{Case(case.variant, case.source): None for case in LOADS if case.source != "1"}]


def missing(case: Case) -> str:
    """Why a case cannot run here, or nothing."""
    if "deepspeed-dp2" in (case.source, case.target) and importlib.util.find_spec("deepspeed") is None:
        return "deepspeed is not installed (pip install '.[deepspeed]')"
    return ""


def run_dir(folder: Path, case: Case) -> Path:
    """Run directory of a case."""
    return folder / "runs" / case.name


def copies(folder: Path, case: Case) -> Path:
    """Where a case that loads a checkpoint saves it again at once, before it trains."""
    return folder / "copies" / case.name


def settings(folder: Path, data: Path, case: Case) -> list[str]:
    """Command line of a case."""
    stop, interval = (LAST, 0) if case.target else (LAST, SAVED) if case in REFERENCES else (SAVED, 0)
    own = {"data.path": data, "train.run_dir": run_dir(folder, case), "train.stop_at_step": stop, "checkpoint.interval": interval}
    return [f"--{key}={value}" for key, value in {**SETTINGS, **VARIANTS[case.variant], **case.layout.settings, **own}.items()]


def run_case(folder: Path, data: Path, case: Case) -> None:
    """Train as one of the ranks of a case."""
    if case.target and dist_rank() == 0:
        source = run_dir(folder, Case(case.variant, case.source)) / "checkpoints" / f"step-{SAVED:08d}"
        shutil.copytree(source, run_dir(folder, case) / "checkpoints" / source.name)

    def load(path, engine, common):  # type: ignore[no-untyped-def]
        state = load_checkpoint(path, engine, common)
        save_checkpoint(CheckpointStore(copies(folder, case)), engine, state, {name: common[name] for name in PARTS})
        return state

    with ExitStack() as patches:
        patches.enter_context(mock.patch("poet_megatron.train.run.load_checkpoint", load))
        patches.enter_context(mock.patch("poet_megatron.train.report.rotation_health", return_value=(0.0, 0.0)))  # a quarter of the time
        if case.target:  # nobody looks at its last state
            patches.enter_context(mock.patch("poet_megatron.train.loop.save_checkpoint"))
        assert pretrain(load_config(None, settings(folder, data, case))) == 0


def dist_rank() -> int:
    return int(os.environ["RANK"])


@contextmanager
def as_rank(rank: int, size: int, store: Path) -> Iterator[None]:
    """Be rank `rank` of a world of `size` processes of its own."""
    own = {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    meet = {"store": dist.FileStore(str(store), size), "rank": rank, "world_size": size}

    start = dist.init_process_group
    with mock.patch.dict(os.environ, own), mock.patch.object(dist, "init_process_group", lambda *args, **kw: start(*args, **kw | meet)):
        yield


def run_all(rank: int, folder: Path, data: Path, cases: list[Case]) -> dict[str, dict]:
    """Run this process's part of every case; a case of n ranks takes processes 0..n-1, n..2n-1, ... in turn."""
    results, used = {}, dict.fromkeys((1, 2, 4), 0)
    for case in sorted(cases, key=lambda case: -case.layout.ranks):
        size = case.layout.ranks
        first = used[size] % (PROCESSES // size) * size
        used[size] += 1
        if not first <= rank < first + size:
            continue
        started, error = time.time(), ""
        try:
            with as_rank(rank - first, size, folder / f"{case.name}.store"):
                run_case(folder, data, case)
        except Exception:
            error = traceback.format_exc()
        results[case.name] = {"error": error, "seconds": time.time() - started}
    return results


def main(folder: Path, data: Path) -> None:
    """Save in every layout, then continue in every other one."""
    torch.set_num_threads(1)
    rank, results = dist_rank(), {}
    for phase, cases in enumerate((SAVES, LOADS)):
        results |= run_all(rank, folder, data, [case for case in cases if not missing(case)])
        (folder / f"phase-{phase}-rank-{rank}").touch()
        while len(list(folder.glob(f"phase-{phase}-rank-*"))) < PROCESSES:
            time.sleep(0.1)
    (folder / f"results-{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
