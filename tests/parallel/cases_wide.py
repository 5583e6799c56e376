"""One layer of the 1.3B recipe with blocks of 256, on one rank or split over eight: two steps with a merge between them.

python cases_wide.py results.json
"""

from __future__ import annotations

import functools
import json
import os
import resource
import sys
import time
from pathlib import Path

from benchmarks.layout_cases import ONE_RANK, Case, Layout, train
from benchmarks.layouts import prepare_data
from benchmarks.worlds import run_world

WIDE = {
    "model.num_layers": "1",
    "model.hidden_size": "2048",
    "model.ffn_hidden_size": "5376",
    "model.num_attention_heads": "32",
    "model.num_query_groups": "32",
    "model.seq_length": "64",
    "poet.shard_groups": "8",
    "poet.block_size": "256",
    "train.micro_batch_size": "1",
    "train.global_batch_size": "2",
}
TP8 = {"parallel.tensor_parallel": "8", "parallel.sequence_parallel": "true"}
CASES = {"TP1": Case(Layout(ONE_RANK, 1), "bs", WIDE), "TP8": Case(Layout("TP8 + SP", 8, TP8), "bs", WIDE)}
TIMEOUT = 1500.0


def run(case: Case, data: Path, output: Path) -> None:
    """Train on this rank; rank 0 writes what it saw, with its time and peak memory."""
    started = time.monotonic()
    result = train(case.run(data), 2, merges=(1,)).to_dict()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if os.environ["RANK"] == "0":
        output.write_text(json.dumps({**result, "seconds": time.monotonic() - started, "peak_bytes": peak}))


def main(output: Path) -> None:
    """One world after the other."""
    data = prepare_data(output.parent)
    found = {}
    for name, case in CASES.items():
        own = output.with_name(f"{name}.json")
        run_world(case.layout.ranks, functools.partial(run, case, data, own), TIMEOUT)
        found[name] = json.loads(own.read_text())
    output.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
