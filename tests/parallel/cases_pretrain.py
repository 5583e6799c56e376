"""Cases of test_training_layouts.py that run `poet-megatron pretrain` on forked ranks; each leaves its ranks' output and exit statuses.

    python cases_pretrain.py requests.json results.json

A request is {"name", "ranks", "argv", "fault": null or a name of faults.FAULTS, "rank": where the fault is, "env": more environment
variables, in which {rank} is the rank}.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from faults import FAULTS

from benchmarks.worlds import exit_statuses
from poet_megatron.cli.main import main as poet_megatron

TIMEOUT = 240.0


def rank_main(request: dict, folder: Path) -> None:
    """One rank, its output in files of its own."""
    rank = int(os.environ["RANK"])
    for descriptor, stream in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder / f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 (not those of the parent)
    os.environ |= {name: value.format(rank=rank) for name, value in request.get("env", {}).items()}
    with FAULTS[request["fault"]]() if request["fault"] and rank == request["rank"] else nullcontext():
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
