"""What `launch` refuses before anything is queued, and how it says so."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from conftest import VOCAB_SIZE

from poet_megatron.config.load import load_config
from poet_megatron.errors import UserError
from poet_megatron.launch import check
from poet_megatron.launch.jobs import Text
from poet_megatron.launch.slurm import Node, Partition

EIGHT = Partition("batch", tuple(Node(f"n{number}", 8, number > 0) for number in range(8)), 86400, None)


def settings(**changes: object):
    return load_config(None, [f"--{key.replace('__', '.')}={value}" for key, value in changes.items()])


def refused(message: str):
    return pytest.raises(UserError, match=re.escape(message))


def test_layouts_that_work():
    run = settings(train__micro_batch_size=8, train__global_batch_size=512, parallel__tensor_parallel=2)
    found = check.check_layouts(run, (1, 2), 8)
    assert found == "16 GPUs = 2 x 1 x 8 (tensor x pipeline x data parallel), 8 micro-batch(es) of 8 per rank and step"


def test_a_batch_that_some_number_of_nodes_does_not_divide():
    run = settings(train__micro_batch_size=8, train__global_batch_size=512)
    with refused("3 nodes x 8 GPUs: train.global_batch_size is 512; it must be a multiple of") as error:
        check.check_layouts(run, (2, 4), 8)
    assert str(error.value).endswith("numbers of nodes that work: 1, 2, 4, 8 (all from 2 to 4 have to: Slurm may choose any)")


def test_gpus_that_the_model_cannot_be_split_over():
    run = settings(parallel__tensor_parallel=8, parallel__pipeline_parallel=2, model__num_layers=8, train__global_batch_size=512)
    with refused(
        "1 node x 8 GPUs: 8 processes cannot be split into groups of parallel.tensor_parallel x parallel.pipeline_parallel = 8 x 2"
    ):
        check.check_layouts(run, (1, 1), 8)


def test_a_layout_that_no_number_of_nodes_makes_possible():
    run = settings(parallel__tensor_parallel=3)
    with refused("; no number of nodes up to 64 works"):
        check.check_layouts(run, (1, 1), 8)


def test_nine_nodes_of_eight():
    with refused("--nodes is 9; partition batch has 8 nodes with 8 GPUs: ask for at most 8, or name another partition with --partition"):
        check.check_cluster(EIGHT, (9, 9), 8, "1:00:00")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ((1, 1), 9, "10"), "--gpus-per-node is 9; nodes of partition batch have at most 8 GPUs: ask for 8"),
        ({"max_nodes": 2}, ((1, 3), 8, "10"), "--nodes is 3; partition batch allows 2 per job"),
        ({}, ((1, 1), 8, "1-00:00:01"), "--time is 1-00:00:01; partition batch allows 1-00:00:00: ask for less"),
        ({}, ((1, 1), 8, "infinite"), "--time is infinite; partition batch allows 1-00:00:00"),
        ({}, ((1, 1), 8, "1d"), "time '1d' is not D-HH:MM:SS"),
    ],
)
def test_more_than_the_partition_has(changes: dict, arguments: tuple, message: str):
    with refused(message):
        check.check_cluster(dataclasses.replace(EIGHT, **changes), *arguments)


def test_a_partition_that_is_enough():
    found = check.check_cluster(EIGHT, (1, 8), 8, "1-0")
    assert found == "partition batch: 8 nodes with 8 GPUs, 7 of them usable now; time limit 1-00:00:00"
    assert "; the job waits until 8 are; time limit none" in check.check_cluster(
        dataclasses.replace(EIGHT, max_seconds=None), (8, 8), 8, "9-0"
    )


def test_arrays():
    assert check.check_array(4, "--sweep", 4) == "--sweep: 4 tasks"
    with refused("--sweep makes an array of 5 tasks; this cluster allows 4: split it"):
        check.check_array(5, "--sweep", 4)
    with refused("--tokenize-tasks is 0; it must be at least 1"):
        check.check_array(0, "--tokenize-tasks", 4)


def test_data(tiny_run, tiny_data: Path):
    assert check.check_data(tiny_run()).startswith(f"{tiny_data}: ")
    with refused("model.vocab_size is 321, but"):
        check.check_data(tiny_run(changes={"model.vocab_size": "321"}))
    with refused("data.path /nowhere holds no prepared data: add --input FILES, which makes it first, or name another folder"):
        check.check_data(tiny_run(changes={"data.path": "/nowhere"}))
    with refused("data.path is empty"):
        check.check_data(tiny_run(changes={"data.path": ""}))
    with refused("/nowhere/manifest.json does not exist"):
        check.check_data(tiny_run(changes={"data.blend": f"1 {tiny_data} 2 /nowhere"}))


@pytest.fixture
def text(corpus: Path, tiny_data: Path, tmp_path: Path) -> Text:
    return Text(
        inputs=(str(corpus),),
        valid_inputs=(),
        tokenizer=str(tiny_data / "tokenizer.model"),
        vocab_size=0,
        tasks=1,
        valid_fraction=None,
        output=tmp_path / "data",
    )


def test_text_that_can_become_data(text: Text, tiny_run):
    found = check.check_text(tiny_run(), text)
    assert found.startswith("1 files, 0.1 MB, become ") and found.endswith(f"with a vocabulary of {VOCAB_SIZE}")


def test_text_that_cannot(text: Text, tiny_run, tiny_data: Path):
    run = tiny_run()
    with refused("input /nowhere/*.gz matches no file"):
        check.check_text(run, dataclasses.replace(text, inputs=("/nowhere/*.gz",)))
    with refused("input /none.gz matches no file"):
        check.check_text(run, dataclasses.replace(text, valid_inputs=("/none.gz",)))
    with refused("--vocab-size is 999, but model.vocab_size is 320: set model.vocab_size to 999"):
        check.check_text(run, dataclasses.replace(text, tokenizer="", vocab_size=999))
    with refused("has a vocabulary of 320, but model.vocab_size is 321: set model.vocab_size to 320"):
        check.check_text(tiny_run(changes={"model.vocab_size": "321"}), text)


def test_data_of_the_same_files_are_not_made_again(text: Text, tiny_data: Path, corpus: Path, tmp_path: Path):
    assert not check.made_already(text)
    assert check.made_already(dataclasses.replace(text, output=tiny_data))
    (tmp_path / corpus.name).write_text(corpus.read_text() + "{}\n")
    with refused(f"data.path {tiny_data} holds data made of other files: leave out --input to train on it, or set another data.path"):
        check.made_already(dataclasses.replace(text, output=tiny_data, inputs=(str(tmp_path / corpus.name),)))


def test_scripts_are_those_of_the_clone_or_of_the_folder_named(tmp_path: Path):
    root = Path(__file__).parents[3]
    assert check.find_root(None, root / "poet_megatron") == root
    assert check.find_root(root / "launch" / "slurm", tmp_path) == root
    with refused(
        f"{tmp_path} has no launch/slurm: the scripts are in the clone, not in an installed package; name a clone with --scripts DIR"
    ):
        check.find_root(None, tmp_path / "poet_megatron")


def test_all_checks_run_even_if_one_fails():
    def fails() -> str:
        raise UserError("no")

    found = check.run_checks([("a", fails), ("b", lambda: "yes")])
    assert [finding.line() for finding in found] == ["REFUSED a         no", "ok      b         yes"]
