"""Cases of test_training_layouts.py that run `poet-megatron pretrain` on forked ranks; each leaves its ranks' output and exit statuses.

    python cases_pretrain.py requests.json results.json

A request is {"name", "ranks", "argv", "fault": null | "gradient" | "loss" | "data", "rank": where the fault is}.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import torch

from benchmarks.worlds import exit_statuses
from poet_megatron.cli.main import main as poet_megatron
from poet_megatron.data.train_data import TrainBatches
from poet_megatron.engine.megatron import MegatronEngine

FAULTY_STEP = 3
TIMEOUT = 240.0


def faulty(fault: str | None):
    """What goes wrong on this rank in step 3: a gradient or a loss that is not finite, or data that cannot be read."""
    calls = 0

    def count(function):
        @functools.wraps(function)
        def counted(*args):
            nonlocal calls
            calls += 1
            return function(*args) if calls != FAULTY_STEP else broken(function, *args)

        return counted

    def broken(function, *args):
        if fault == "data":
            raise OSError("the disk is gone")
        result = function(*args)
        if fault == "loss":
            return [entry * torch.tensor([torch.nan, 1.0]) for entry in result]
        next(iter(args[0].trainable().values())).main_grad.view(-1)[0] = torch.inf
        return result

    if fault is None:
        return nullcontext()
    owner, name = (TrainBatches, "micro_batches") if fault == "data" else (MegatronEngine, "accumulate")
    return mock.patch.object(owner, name, count(getattr(owner, name)))


def rank_main(request: dict, folder: Path) -> None:
    """One rank, its output in files of its own."""
    rank = int(os.environ["RANK"])
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (not those of the parent)
    with faulty(request["fault"] if rank == request["rank"] else None):
        status = poet_megatron(["pretrain", *request["argv"]])
    sys.stdout.flush()
    sys.exit(status)


def run(request: dict, folder: Path) -> dict:
    """Run one request; outputs and statuses by rank, and seconds."""
    folder.mkdir()
    started = time.monotonic()
    statuses = exit_statuses(request["ranks"], functools.partial(rank_main, request, folder), TIMEOUT)
    outputs = {stream: [(folder / f"{stream}-{rank}").read_text() for rank in range(request["ranks"])] for stream in ("stdout", "stderr")}
    return {"statuses": statuses, "seconds": time.monotonic() - started, **outputs}


def main(requests: Path, results: Path) -> None:
    """Run requests in turn."""
    answers = {request["name"]: run(request, results.parent / request["name"]) for request in json.loads(requests.read_text())}
    results.write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
