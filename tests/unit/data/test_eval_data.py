import numpy as np
import pytest
import torch

from data_prep.indexed import IndexedWriter
from poet_megatron.data.eval_data import packed_eval_batches, reference_protocol_batches
from poet_megatron.errors import UserError

EOS = 2
DOCUMENTS = [[10, 11, 12, EOS], [EOS], list(range(20, 33)) + [EOS], [40, 41, 42, 43, 44, EOS], [50, EOS]]
STREAM = sum(DOCUMENTS, [])
SEQ = 6


@pytest.fixture
def prefix(tmp_path):
    with IndexedWriter(tmp_path / "valid", np.uint16) as writer:
        for ids in DOCUMENTS:
            writer.add(ids)
    return tmp_path / "valid"


def samples(function, prefix, batch_size=2, dp_size=1, **settings):
    """Sequences of all ranks, in order, without the ones that fill up; checks that every rank does the same number of passes."""
    ranks = [function(prefix, SEQ, batch_size, rank, dp_size, **settings) for rank in range(dp_size)]
    lists = [list(rank) for rank in ranks]
    assert {len(batches) for batches in lists} == {len(rank) for rank in ranks} == {len(ranks[0])}
    found = []
    for group in zip(*lists, strict=True):
        for batch in group:
            assert {key: value.dtype for key, value in batch.items()} == {
                "tokens": torch.int64,
                "labels": torch.int64,
                "loss_mask": torch.float32,
                "position_ids": torch.int64,
            }
            assert all(value.shape == (batch_size, SEQ) for value in batch.values())
            assert torch.equal(batch["position_ids"], torch.arange(SEQ).expand(batch_size, SEQ))
            found += [{key: value[i].tolist() for key, value in batch.items()} for i in range(batch_size)]
    return [sample for sample in found if any(sample["loss_mask"])]


def labels(sample):
    return [label for label, mask in zip(sample["labels"], sample["loss_mask"], strict=True) if mask]


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (2, 1), (3, 1), (2, 2), (1, 4), (2, 4)])
def test_packed_windows_cover_every_token_once(prefix, batch_size, dp_size):
    found = samples(packed_eval_batches, prefix, batch_size, dp_size)
    assert sum((labels(sample) for sample in found), []) == STREAM
    inputs = sum((sample["tokens"][: len(labels(sample))] for sample in found), [])
    assert inputs == [EOS, *STREAM[:-1]]


def test_packed_windows_up_to_a_limit(prefix):
    found = samples(packed_eval_batches, prefix, max_tokens=8)
    assert sum((labels(sample) for sample in found), []) == STREAM[:8]
    assert [sum(sample["loss_mask"]) for sample in found] == [6, 2]
    assert sum(len(labels(sample)) for sample in samples(packed_eval_batches, prefix, max_tokens=10**6)) == len(STREAM)


@pytest.mark.parametrize(("batch_size", "dp_size"), [(1, 1), (3, 1), (2, 2), (1, 4)])
def test_reference_protocol(prefix, batch_size, dp_size):
    found = samples(reference_protocol_batches, prefix, batch_size, dp_size)
    expected = [[11, 12, EOS], [21, 22, 23, 24, EOS], [41, 42, 43, 44, EOS], [EOS]]  # a lone eos predicts nothing
    assert [labels(sample) for sample in found] == expected
    assert [sample["tokens"][0] for sample in found] == [10, 20, 40, 50]
    for sample in found:
        size = len(labels(sample))
        assert sample["tokens"][1:size] == sample["labels"][: size - 1]
        assert sample["loss_mask"] == [1.0] * size + [0.0] * (SEQ - size)


def test_reference_protocol_stops_after_the_document_that_reaches_the_limit(prefix):
    counts = {1: 1, 4: 1, 5: 1, 6: 2, 11: 2, 12: 3, 10**6: 4}  # documents with labels; their lengths are 4, 1, 6, 6, 2
    for limit, count in counts.items():
        assert len(samples(reference_protocol_batches, prefix, max_tokens=limit)) == count


def test_bad_sizes(prefix):
    with pytest.raises(UserError, match="train.eval_batch_size is 0; it must be at least 1"):
        packed_eval_batches(prefix, SEQ, 0)
    with pytest.raises(ValueError, match=r"dp_rank is 1; it must be in 0..0"):
        reference_protocol_batches(prefix, SEQ, 1, 1, 1)
