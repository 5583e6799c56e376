"""Python, but a training step waits for a file: what a test does meanwhile happens in the middle of that step, on any machine.

    python hold.py STEP FILE -m poet_megatron pretrain ...

Training goes into step STEP and stays there until FILE exists, then does the step. Everything else is the command it stands for.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

from poet_megatron.cli.main import main
from poet_megatron.train.step import train_step

POLL_SECONDS = 0.05


def held(step: int, file: Path) -> Any:
    """train_step that waits in one of the steps."""

    def wait_and_train(engine: Any, *args: Any) -> Any:
        while engine.scheduler.num_steps == step - 1 and not file.exists():
            time.sleep(POLL_SECONDS)
        return train_step(engine, *args)

    return wait_and_train


if __name__ == "__main__":
    number, path, option, package, *words = sys.argv[1:]
    assert (option, package) == ("-m", "poet_megatron")
    with mock.patch("poet_megatron.train.loop.train_step", held(int(number), Path(path))):
        sys.exit(main(words))
