"""Commands of a build run when their inputs change, and say what went wrong."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from build_support.steps import Step, StepError, run_steps


def copying(source: Path, output: Path, *header: Path) -> Step:
    """Appends a line to a log beside the output, so that a test can count the runs."""
    command = f"echo run >> {output.parent / 'log'}; cat {source} > {output}"
    return Step(("sh", "-c", command), output, (source, *header))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    source, header = tmp_path / "a.cpp", tmp_path / "a.h"
    for path in (source, header):
        path.write_text("1")
        os.utime(path, (time.time() - 100,) * 2)
    return source, header, tmp_path / "out" / "a.o"


def runs(output: Path) -> int:
    return len((output.parent / "log").read_text().split())


def test_a_step_runs_again_for_a_new_source_header_or_command(files: tuple[Path, Path, Path]) -> None:
    source, header, output = files
    step = copying(source, output, header)
    step.run()
    step.run()
    assert runs(output) == 1
    for count, changed in enumerate((source, header), start=2):
        os.utime(changed, (time.time() + 100,) * 2)
        step.run()
        assert runs(output) == count
        os.utime(changed, (time.time() - 100,) * 2)
        os.utime(output)
    Step((*step.command[:2], step.command[2] + "; true"), output, step.inputs).run()
    assert runs(output) == 4


def test_a_failure_leaves_no_output_and_shows_the_first_error(files: tuple[Path, Path, Path]) -> None:
    source, _, output = files
    copying(source, output).run()
    shout = f"echo note; echo 'a.cpp:3: error: no such thing'; echo more; echo x > {output}; exit 3"
    with pytest.raises(StepError, match=r"a\.cpp \(status 3\): a\.cpp:3: error: no such thing$"):
        Step(("sh", "-c", shout), output, (source,)).run()
    assert not output.exists()


def test_a_command_that_does_not_exist(files: tuple[Path, Path, Path]) -> None:
    with pytest.raises(StepError, match="no-such-compiler"):
        Step(("no-such-compiler",), files[2], (files[0],)).run()


def test_one_failure_does_not_stop_the_others(files: tuple[Path, Path, Path], tmp_path: Path) -> None:
    good, bad = copying(files[0], files[2]), Step(("false",), tmp_path / "out" / "b.o", (files[0],))
    found = run_steps([bad, good], 2)
    assert found[good.output] is None and isinstance(found[bad.output], StepError)
