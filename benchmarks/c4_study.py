"""POET against AdamW on real C4 text at about 5M parameters: one epoch, several learning rates, both orthogonal maps.

    python -m benchmarks.c4_study --c4 ../shared/data/c4 --work runs/c4_study --output benchmarks/results

Every run is a `poet-megatron pretrain` process on one thread, two at a time. Runs that are complete are not repeated and interrupted ones
continue, so the same command resumes the study; without --c4 files there is nothing to do.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import Machine, command_line

VOCAB_SIZE = 4096
SEQ_LENGTH = 256
BATCH = 8
TOKENS = 1_100_000  # of one epoch; no token is seen twice
MERGE_INTERVAL = 40
BASE_LR = 5e-3
ADAMW_LRS = (1e-3, 3e-3, 1e-2, 3e-4)  # the paper tuned its AdamW: its best here was the edge of the first three
PAPER_LRS = {"poet_bs64": 4e-3, "poet_bs128": 2e-3, "poet_fs2": 1e-3}
FACTORS = (0.5, 1.0, 2.0)
MAPS = ("cayley", "cayley-neumann")
CLIP_WARMUP = 1  # steps after a merge with lower clipping: the paper's 10 of 400, at our merge interval
NOT_FINITE = 3  # exit status of a run stopped by a NaN or infinite loss


@dataclass(frozen=True)
class Case:
    """One run of the study: a recipe, an orthogonal map ("" for AdamW) and the learning rate that is varied."""

    recipe: str
    orthogonal_map: str
    lr: float

    @property
    def name(self) -> str:
        """Name of its run directory."""
        return "-".join(part for part in (self.recipe, self.orthogonal_map, f"{self.lr:g}") if part)

    def settings(self) -> list[str]:
        """Command-line settings that differ from the recipe."""
        if self.recipe == "adamw":
            return [f"--optim.lr={self.lr:g}"]
        return [
            f"--optim.lr={BASE_LR:g}",
            f"--optim.poet_lr={self.lr:g}",
            f"--poet.orthogonal_map={self.orthogonal_map}",
            f"--poet.merge_interval={MERGE_INTERVAL}",
            f"--poet.merge_clip_warmup={CLIP_WARMUP}",
            "--poet.compute=weight",  # the faster one at this size; the same function
        ]


def cases() -> Iterator[Case]:
    """Every run; the middle learning rates first, so that an unfinished study still compares all methods."""
    for index in (1, 0, 2):
        yield Case("adamw", "", ADAMW_LRS[index])
        for recipe, lr in PAPER_LRS.items():
            for orthogonal_map in MAPS:
                yield Case(recipe, orthogonal_map, lr * FACTORS[index])
    for lr in ADAMW_LRS[3:]:
        yield Case("adamw", "", lr)


def prepare(c4: Path, work: Path) -> tuple[Path, int]:
    """Prepare C4 with a tokenizer of its own; returns the folder and its training tokens."""
    from data_prep.prepare import prepare as prepare_data

    output = work / "data"
    manifest = prepare_data([str(c4 / "train.jsonl")], output, valid_inputs=[str(c4 / "validation.jsonl")], vocab_size=VOCAB_SIZE)
    return output, manifest.splits["train"].tokens


def run_case(case: Case, data: Path, work: Path, steps: int) -> dict[str, object]:
    """Train one case to its end (or find it complete) and return its result."""
    run_dir = work / case.name
    command = [sys.executable, "-m", "poet_megatron", "pretrain", "--config", f"configs/llama_5m_{case.recipe}.yaml"]
    command += [f"--data.path={data}", f"--train.run_dir={run_dir}", f"--train.steps={steps}", f"--train.global_batch_size={BATCH}"]
    command += [
        f"--train.micro_batch_size={BATCH}",
        "--train.eval_interval=0",
        "--train.eval_tokens=49152",
        "--checkpoint.interval=270",
        "--checkpoint.keep_last=1",
    ]
    command += ["--monitor.log_interval=10", *case.settings()]
    run_dir.mkdir(parents=True, exist_ok=True)
    done = run_dir / "result.json"
    if done.exists() and (result := json.loads(done.read_text()))["command"] == " ".join(command[1:]):
        return result
    started = time.monotonic()
    with (run_dir / "console.log").open("a") as log:
        status = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    result = {**asdict(case), "name": case.name, "command": " ".join(command[1:]), "exit_status": status, **_outcome(run_dir, steps)}
    result["minutes"] = round((time.monotonic() - started) / 60, 2)
    if status in (0, NOT_FINITE):  # complete, or diverged: both are results
        done.write_text(json.dumps(result))
    return result


def _outcome(run_dir: Path, steps: int) -> dict[str, object]:
    """Last validation perplexity, loss over the last tenth, largest defect and |Q|_2, speed, from metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    training = [entry for entry in entries if "train/loss" in entry]
    final = [entry["eval/ppl"] for entry in entries if "eval/ppl" in entry and entry["step"] == steps]
    tail = [entry["train/loss"] for entry in training if entry["step"] > 0.9 * steps and entry["train/loss"] is not None]
    speeds = sorted(entry["perf/tokens_per_s"] for entry in training)
    return {
        "eval_ppl": final[-1] if final else None,
        "train_loss_last_tenth": sum(tail) / len(tail) if tail else None,
        "last_step": training[-1]["step"] if training else 0,
        "max_ortho_error": max((entry.get("poet/ortho_error") or 0.0 for entry in training), default=0.0),
        "max_skew_norm": max((entry.get("poet/skew_norm") or 0.0 for entry in training), default=0.0),
        "median_tokens_per_s_one_thread": speeds[len(speeds) // 2] if speeds else None,
    }


def report(results: list[dict[str, object]], facts: dict[str, object]) -> str:
    """The study as a Markdown page."""
    lines = ["# C4 at about 5M parameters", "", f"`{facts['command']}`", ""]
    lines += [f"{key}: {value}  " for key, value in facts.items() if key != "command"]
    lines += [
        "",
        "| method | map | lr | validation ppl | train loss, last tenth | max e_orth | max \\|Q\\|_2 | end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    order = {"adamw": 0, **{name: index + 1 for index, name in enumerate(PAPER_LRS)}}
    for result in sorted(results, key=lambda r: (order[str(r["recipe"])], str(r["orthogonal_map"]), float(str(r["lr"])))):
        ppl, loss = result["eval_ppl"], result["train_loss_last_tenth"]
        shown = f"{ppl:.2f}" if isinstance(ppl, float) else "-"
        end = "complete" if result["exit_status"] == 0 else f"stopped at step {result['last_step']}"
        lines.append(
            f"| {result['recipe']} | {result['orthogonal_map'] or '-'} | {result['lr']:g} | {shown} | "
            f"{f'{loss:.4f}' if isinstance(loss, float) else '-'} | "
            f"{result['max_ortho_error']:.1e} | {result['max_skew_norm']:.2f} | {end} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the study and write c4_study.json and c4_study.md after every finished run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--c4", type=Path, default=Path("../shared/data/c4"), help="folder with train.jsonl and validation.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/c4_study"), help="folder of data and runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="folder of c4_study.json and .md")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    if not (args.c4 / "train.jsonl").exists():
        print(f"{args.c4} holds no train.jsonl: give C4's own JSON lines with --c4", file=sys.stderr)
        return 2
    data, tokens = prepare(args.c4, args.work)
    steps = min(tokens - 1, TOKENS) // (BATCH * SEQ_LENGTH)
    facts: dict[str, object] = {
        "command": command_line("benchmarks.c4_study"),
        "training tokens": steps * BATCH * SEQ_LENGTH,
        "steps": steps,
        "tokens per step": BATCH * SEQ_LENGTH,
        "merge interval": MERGE_INTERVAL,
        "base lr of POET": BASE_LR,
        "machine": Machine.current().to_text().replace("\n", "; "),
    }
    results: list[dict[str, object]] = []
    todo = list(cases())
    args.output.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(args.workers) as pool:
        for result in pool.map(lambda case: run_case(case, data, args.work, steps), todo):
            results.append(result)
            facts["minutes of all runs / workers"] = round(sum(float(str(r["minutes"])) for r in results) / args.workers, 1)
            (args.output / "c4_study.json").write_text(json.dumps({"facts": facts, "runs": results}, indent=1) + "\n")
            (args.output / "c4_study.md").write_text(report(results, facts))
            print(f"{len(results)}/{len(todo)} {result['name']}: validation ppl {result['eval_ppl']}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
