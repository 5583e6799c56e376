"""Stopping and continuing a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from poet_megatron.errors import EXIT_SAVED, UserError
from poet_megatron.train.run import pretrain

VARIANTS = {
    "bs": {},
    "fs": {"poet.variant": "fs", "poet.block_size": "0.5", "poet.orthogonal_map": "cayley"},
    "adamw": {"method": "adamw"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resume_at_15_of_30_is_bitwise_the_uninterrupted_run(tiny_run, losses, variant):
    """fp32 on CPU, merges at 10 and 20: losses, weights and optimizer state after resuming are the same bits."""
    whole = tiny_run("whole", VARIANTS[variant])
    assert pretrain(whole) == 0
    first = tiny_run("parts", {**VARIANTS[variant], "train.stop_at_step": "15"})
    assert pretrain(first) == 0
    assert max(losses(first.train.run_dir)) == 15
    assert pretrain(tiny_run("parts", VARIANTS[variant])) == 0
    assert losses(whole.train.run_dir) == losses(first.train.run_dir)
    assert _tensor_files(whole.train.run_dir, 30) == _tensor_files(first.train.run_dir, 30)


def _tensor_files(run_dir: str, step: int) -> dict[str, bytes]:
    folder = Path(run_dir) / "checkpoints" / f"step-{step:08d}"
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


def test_bf16_resume_repeats_the_losses(tiny_run, losses):
    """bf16 with fp32 masters of skews and of W0: a checkpoint holds all that the next step depends on."""
    settings = {"train.precision": "bf16", "train.steps": "14", "checkpoint.interval": "7", "poet.merge_interval": "5"}
    whole = tiny_run("whole", settings)
    pretrain(whole)
    first = tiny_run("parts", {**settings, "train.stop_at_step": "7"})
    pretrain(first)
    pretrain(tiny_run("parts", settings))
    assert losses(whole.train.run_dir) == losses(first.train.run_dir)


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny_run, losses, caplog):
    run = tiny_run("run", {"checkpoint.interval": "10"})
    pretrain(run)
    expected = losses(run.train.run_dir)
    newest = Path(run.train.run_dir) / "checkpoints" / "step-00000030"
    victim = next(newest.glob("*.distcp"))
    victim.write_bytes(victim.read_bytes()[:-100])
    pretrain(run)
    assert "damaged" in caplog.text
    assert "step-00000030" in caplog.text
    assert losses(run.train.run_dir) == expected


def test_keep_last_k_and_no_leftovers(tiny_run):
    run = tiny_run("run", {"checkpoint.interval": "5", "checkpoint.keep_last": "3", "train.steps": "20"})
    pretrain(run)
    names = sorted(path.name for path in (Path(run.train.run_dir) / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000015", "step-00000020"]


def test_interrupted_save_is_ignored_and_cleared(tiny_run):
    run = tiny_run("run", {"train.stop_at_step": "5", "checkpoint.interval": "5"})
    pretrain(run)
    checkpoints = Path(run.train.run_dir) / "checkpoints"
    shutil.copytree(checkpoints / "step-00000005", checkpoints / "step-00000009.partial")
    pretrain(tiny_run("run", {"train.steps": "30", "train.stop_at_step": "10", "checkpoint.interval": "5"}))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-00000005", "step-00000010"]


def test_a_signal_saves_and_says_how_to_continue(tiny_run, capsys):
    run = tiny_run("run", {"train.steps": "2000", "checkpoint.interval": "0"})
    metrics = Path(run.train.run_dir) / "metrics.jsonl"

    def interrupt() -> None:
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 5:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert pretrain(run) == EXIT_SAVED
    thread.join()
    output = capsys.readouterr().out
    assert "stopped by SIGINT at step" in output
    assert "the same command continues" in output
    (saved,) = (Path(run.train.run_dir) / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) >= 4


def test_resuming_with_a_changed_model_names_the_change(tiny_run):
    pretrain(tiny_run("run", {"train.stop_at_step": "3"}))
    with pytest.raises(UserError, match=r"model\.num_layers: 2 -> 3.*another train\.run_dir"):
        pretrain(tiny_run("run", {"model.num_layers": "3"}))
    with pytest.raises(UserError, match=r"poet\.block_size: 24 -> 16"):
        pretrain(tiny_run("run", {"poet.block_size": "16"}))


def test_resume_never_and_must(tiny_run):
    with pytest.raises(UserError, match="no intact checkpoint"):
        pretrain(tiny_run("run", {"checkpoint.resume": "must"}))
    pretrain(tiny_run("run", {"train.stop_at_step": "3"}))
    with pytest.raises(UserError, match=r"checkpoint\.resume is never"):
        pretrain(tiny_run("run", {"checkpoint.resume": "never"}))


def test_a_run_directory_in_use_is_refused(tiny_run):
    from poet_megatron.monitor.run_dir import RunDirectory

    run = tiny_run("run")
    with RunDirectory(run.train.run_dir), pytest.raises(UserError, match="in use by pid"):
        pretrain(run)


def test_a_lost_final_evaluation_is_made_up_for(tiny_run):
    """Killed between the last checkpoint and the evaluation that follows it: the same command evaluates, once."""
    run = tiny_run("run", {"train.steps": "4"})
    pretrain(run)
    metrics = Path(run.train.run_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    assert "eval/ppl_reference_protocol" in lines[-1]
    metrics.write_text("\n".join(lines[:-1]) + "\n")
    pretrain(run)
    pretrain(run)
    again = metrics.read_text().splitlines()
    without_time = [{k: v for k, v in json.loads(text[-1]).items() if k != "time"} for text in (lines, again)]
    assert without_time[0] == without_time[1]
    assert len(again) == len(lines)


def test_another_map_cannot_be_resumed(tiny_run):
    """The same skews would mean another rotation."""
    pretrain(tiny_run("run", {"train.stop_at_step": "3"}))
    with pytest.raises(UserError, match=r"poet\.orthogonal_map: 'cayley-neumann' -> 'exp'"):
        pretrain(tiny_run("run", {"poet.orthogonal_map": "exp"}))


def test_learning_rate_may_change_on_resume(tiny_run, caplog):
    pretrain(tiny_run("run", {"train.stop_at_step": "3"}))
    assert pretrain(tiny_run("run", {"optim.lr": "1e-3", "train.stop_at_step": "4"})) == 0
    assert "optim.lr: 0.005 -> 0.001" in caplog.text
