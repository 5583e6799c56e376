import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.indexed import read_indexed
from data_prep.prepare import prepare
from poet_megatron.data.prepared import PreparedData
from poet_megatron.data.sample_index import order_fingerprint
from poet_megatron.data.train_data import TrainBatches, build_train_dataset
from poet_megatron.errors import UserError

SEQ, BATCH = 8, 8


def write_data(folder, count=150):
    source = folder / "source.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i * i} about spectra and rotations {i % 7}"}) + "\n" for i in range(count)))
    prepare([str(source)], folder / "out", vocab_size=320, valid_fraction=0.1)
    return PreparedData.open(folder / "out", 320, SEQ)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("prepared"))


def dataset_of(data, samples, seed=1, **settings):
    return build_train_dataset(data, seq_length=SEQ, samples=samples, seed=seed, **settings)


def batches_of(dataset, dp_rank=0, dp_size=1, micro=2):
    return TrainBatches(dataset, micro_batch_size=micro, dp_rank=dp_rank, dp_size=dp_size, global_batch_size=BATCH)


def rows(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch["tokens"]]


def epoch(data):
    return (data.train_tokens - 1) // SEQ


def test_batches_have_the_promised_tensors(data):
    for batch in batches_of(dataset_of(data, 16), micro=4).micro_batches(1):
        assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
            "tokens": ((4, SEQ), torch.int64),
            "labels": ((4, SEQ), torch.int64),
            "position_ids": ((4, SEQ), torch.int64),
            "loss_mask": ((4, SEQ), torch.float32),
        }
        assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])
        assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(4, SEQ))
        assert batch["loss_mask"].eq(1).all()  # end-of-sequence tokens included: they are predicted, too


def test_every_token_is_a_label_once_per_epoch(data):
    dataset = dataset_of(data, epoch(data))
    assert len(dataset) == epoch(data)
    stored = read_indexed(data.train_prefix)
    stream = np.concatenate([stored.document(i) for i in dataset.document_index])
    seen = sorted(tuple(dataset[i]["labels"].tolist()) for i in range(len(dataset)))
    assert sorted(dataset.document_index) == list(range(len(stored)))
    assert seen == sorted(tuple(stream[i + 1 : i + 1 + SEQ].tolist()) for i in range(0, epoch(data) * SEQ, SEQ))
    assert not np.array_equal(dataset.document_index, np.arange(len(stored)))


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_a_step_has_the_same_sequences_for_every_layout(data, dp_size):
    dataset = dataset_of(data, 5 * BATCH)
    for step in (0, 4):
        expected = [tuple(dataset[i]["tokens"].tolist()) for i in range(step * BATCH, (step + 1) * BATCH)]
        ranks = [batches_of(dataset, rank, dp_size) for rank in range(dp_size)]
        assert [len(list(rank.micro_batches(step))) for rank in ranks] == [BATCH // 2 // dp_size] * dp_size
        assert ranks[0].num_microbatches == BATCH // 2 // dp_size
        assert list(itertools.chain.from_iterable(rows(rank.micro_batches(step)) for rank in ranks)) == expected


def test_resume_gives_the_next_batches(data):
    first = batches_of(dataset_of(data, 6 * BATCH))
    for _ in range(3):
        list(first.micro_batches())
        first.advance()
    state = json.loads(json.dumps(first.state_dict()))
    assert state["consumed_samples"] == 3 * BATCH
    resumed = [batches_of(dataset_of(data, 6 * BATCH), rank, 2) for rank in range(2)]
    for rank in resumed:
        rank.load_state_dict(state)
    assert [rank.step for rank in resumed] == [3, 3]
    assert (
        rows(resumed[0].micro_batches()) + rows(resumed[1].micro_batches()) == rows(first.micro_batches(3)) != rows(first.micro_batches(2))
    )
    assert rows(first.micro_batches()) == rows(first.micro_batches())


def test_another_order_is_refused_on_resume(data):
    state = batches_of(dataset_of(data, 2 * BATCH)).state_dict()
    shorter = build_train_dataset(data, seq_length=4, samples=16, seed=1)
    for other in (dataset_of(data, 2 * BATCH, seed=2), shorter, dataset_of(data, 3 * epoch(data))):
        with pytest.raises(UserError, match="another data order"):
            batches_of(other).load_state_dict(state)
    batches_of(dataset_of(data, 3 * BATCH)).load_state_dict(state)
    with pytest.raises(UserError, match="after 5 sequences, which is no multiple of train.global_batch_size 8"):
        batches_of(dataset_of(data, 2 * BATCH)).load_state_dict({**state, "consumed_samples": 5})


def test_more_than_an_epoch(data):
    samples = 3 * data.train_tokens // SEQ + 1
    dataset = dataset_of(data, samples)
    assert len(dataset) >= samples
    assert sorted(dataset.document_index) == sorted(4 * list(range(len(read_indexed(data.train_prefix)))))


def test_the_end_of_the_data_and_bad_sizes(data):
    batches = batches_of(dataset_of(data, 2 * BATCH))
    assert batches.steps == 2
    with pytest.raises(UserError, match="step 3 has no training data: the dataset was built for 2 steps"):
        batches.micro_batches(2)
    with pytest.raises(UserError, match="train.global_batch_size is 8; it must be a multiple of .* = 3 x 1"):
        batches_of(batches.dataset, micro=3)
    with pytest.raises(ValueError, match=r"dp_rank is 2; it must be in 0..1"):
        batches_of(batches.dataset, 2, 2)


def test_new_data_in_the_same_folder_gets_a_new_index(tmp_path):
    before = dataset_of(write_data(tmp_path), 2 * BATCH)
    text = (tmp_path / "source.jsonl").read_text()
    (tmp_path / "source.jsonl").write_text(text.replace("rotations", "permutations and blocks"))
    prepare([str(tmp_path / "source.jsonl")], tmp_path / "out", vocab_size=320, valid_fraction=0.1, force=True)
    data = PreparedData.open(tmp_path / "out", 320, SEQ)
    after = dataset_of(data, 2 * BATCH)
    assert len(after) == epoch(data) != len(before)
    assert order_fingerprint(after) != order_fingerprint(before)


def test_index_is_cached_where_asked_and_complete(data, tmp_path):
    first = dataset_of(data, BATCH, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert order_fingerprint(dataset_of(data, BATCH, cache=tmp_path)) == order_fingerprint(first)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_damaged_and_unwritable_caches(data, tmp_path):
    dataset_of(data, BATCH, cache=tmp_path)
    index = next(tmp_path.glob("*/*shuffle_index.npy"))
    np.save(index, np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.raises(UserError, match="shuffle_index.npy is damaged"):
        dataset_of(data, BATCH, cache=tmp_path)
    index.unlink()
    with pytest.raises(UserError, match="is not complete here .2 of 3 files"):
        dataset_of(data, BATCH, cache=tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the sample index in .*: set data.cache to a writable folder"):
        dataset_of(data, BATCH, cache=tmp_path / "file")


RANK = """
import sys
import torch.distributed as dist
from poet_megatron.data.prepared import PreparedData
from poet_megatron.data.train_data import TrainBatches, build_train_dataset
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
data = PreparedData.open(f"{folder}/out", 320, 8)
dataset = build_train_dataset(data, seq_length=8, samples=16, seed=1, cache=f"{folder}/cache")
batches = TrainBatches(dataset, micro_batch_size=2, dp_rank=rank, dp_size=2, global_batch_size=8)
print([row.tolist() for batch in batches.micro_batches(1) for row in batch["tokens"]])
try:
    build_train_dataset(data, seq_length=8, samples=16, seed=1, cache=f"{folder}/source.jsonl")
except ValueError as error:
    print(error)
dist.destroy_process_group()
"""


def test_two_processes_share_one_index(tmp_path):
    data = write_data(tmp_path)
    root = str(Path(__file__).parents[3])
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    ranks = [subprocess.Popen([*command, str(rank), str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=root) for rank in range(2)]
    printed = [rank.communicate(timeout=120)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    expected = batches_of(dataset_of(data, 16)).micro_batches(1)
    assert [tuple(row) for lines in printed for row in json.loads(lines[0])] == rows(expected)
    assert printed[0][1:] == [line.removeprefix("rank 0 could not build the sample index: UserError: ") for line in printed[1][1:]]
    assert [len(lines) for lines in printed] == [2, 2] and "cannot write the sample index" in printed[0][1]
