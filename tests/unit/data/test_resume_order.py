"""Position in the data: the same sequences after a restart, at any data-parallel size, by any protocol, with and without loading ahead."""

import itertools
import json
import threading
from collections import Counter

import pytest
import torch
from known_corpora import SEQ, as_tuple, expected_sample, make_documents, write_corpus

from poet_megatron.data.prefetch import THREAD_NAME
from poet_megatron.data.train_data import TrainBatches, build_train_sequences
from poet_megatron.errors import UserError

BATCH, STEPS = 8, 9
SIZES = [(44, 100, 3.0), (14, 200, 1.0)]
CASES = [(protocol, corpora) for protocol in ("packed", "documents") for corpora in (1, 2)]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return [write_corpus(folder / str(start), make_documents(size, start), weight) for size, start, weight in SIZES]


@pytest.fixture(autouse=True)
def no_threads_stay():
    yield
    for thread in threading.enumerate():
        if thread.name == THREAD_NAME:
            thread.join(10)  # one that has just handed over an error may be on its way out
    assert THREAD_NAME not in {thread.name for thread in threading.enumerate()}


def build(corpora, protocol, count, steps=STEPS, seed=1):
    return build_train_sequences(corpora[:count], protocol, seq_length=SEQ, samples=steps * BATCH, seed=seed)


def ranks_of(sequences, dp_size, micro=1, prefetch=0, batch=BATCH):
    return [
        TrainBatches(
            sequences,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp_size,
            global_batch_size=batch,
            device=torch.device("cpu"),
            prefetch=prefetch,
        )
        for rank in range(dp_size)
    ]


def step_of(ranks):
    """The sequences of the next step, all ranks' in turn, and the step counted as taken."""
    found = []
    for rank in ranks:
        for batch in rank.micro_batches():
            found += [as_tuple({key: value[row] for key, value in batch.items()}) for row in range(rank.micro_batch_size)]
        rank.advance()
    return found


@pytest.mark.parametrize(("protocol", "count"), CASES)
def test_a_restart_anywhere_continues_the_order_at_any_data_parallel_size(corpora, protocol, count):
    """Oracle: the sequences by their numbers. Every pair of sizes, micro-batch sizes and depths, stopped after 0, 1, 4 and all steps."""
    sequences = build(corpora, protocol, count)
    order = [as_tuple(sequences[number]) for number in range(STEPS * BATCH)]
    layouts = itertools.product([(1, 1), (1, 4), (2, 2), (4, 1), (8, 1)], (0, 1, 5))
    for number, ((dp_size, micro), prefetch) in enumerate(layouts):
        first, stop = ranks_of(sequences, dp_size, micro, prefetch), (0, 1, 4, STEPS)[number % 4]
        assert [sequence for _ in range(stop) for sequence in step_of(first)] == order[: stop * BATCH]
        (state,) = {json.dumps(rank.state_dict()) for rank in first}
        for (dp_after, micro_after), ahead in itertools.product([(1, 2), (2, 4), (4, 2)], (0, 3)):
            resumed = ranks_of(build(corpora, protocol, count), dp_after, micro_after, ahead)
            for rank in resumed:
                rank.load_state_dict(json.loads(state))
            assert resumed[0].step == stop
            assert [sequence for _ in range(stop, STEPS) for sequence in step_of(resumed)] == order[stop * BATCH :]


def test_two_epochs_of_steps_cover_every_document_twice_on_four_ranks(corpora):
    """44 + 14 documents are no multiple of the batch: 14 steps of 8 and 4 sequences more are 2 epochs of 58; weights as the sizes."""
    pair = [type(corpus)(corpus.data, size) for corpus, (size, _, _) in zip(corpora, SIZES, strict=True)]
    sequences = build(pair, "documents", 2, steps=15)
    ranks = ranks_of(sequences, 4, 2, prefetch=2)
    found = [sequence for _ in range(15) for sequence in step_of(ranks)]
    for size, start, _ in SIZES:
        own = [sequence for sequence in found if start <= sequence[0][0] < start + 100]
        expected = Counter(expected_sample(document) for document in make_documents(size, start))
        assert Counter(own[:size]) == Counter(own[size : 2 * size]) == expected


def test_every_packed_token_is_a_label_once_per_epoch_over_two_epochs(tmp_path):
    """Every token of this corpus is another one. Only the first token, and what does not fill the last sequence, is no label."""
    ids = itertools.count(10)
    documents = [[next(ids) for _ in range(2 + number % 9)] for number in range(40)]
    corpus, total = write_corpus(tmp_path / "unique", documents), sum(map(len, documents))
    for epochs in (1, 2):
        samples = (epochs * total - 1) // SEQ
        sequences = build_train_sequences([corpus], "packed", seq_length=SEQ, samples=samples, seed=3)
        assert len(sequences) == samples
        labels = Counter(label for sample in sequences for label in sample["labels"].tolist())
        assert set(labels) <= set(range(10, 10 + total)) and max(labels.values()) <= epochs
        assert 0 < epochs * total - labels.total() <= SEQ


def test_looking_around_does_not_move_the_position(corpora):
    sequences = build(corpora, "documents", 2)
    (plain,), (ahead,) = ranks_of(sequences, 1, 2), ranks_of(sequences, 1, 2, prefetch=3)

    def rows(batches):
        return [row.tolist() for batch in batches for row in batch["tokens"]]

    for step in (0, 5, 5, 2, 8, 0):
        assert rows(ahead.micro_batches(step)) == rows(plain.micro_batches(step))
    abandoned = ahead.micro_batches(3)
    next(abandoned)
    assert rows(ahead.micro_batches()) == rows(plain.micro_batches())
    ahead.close()
    assert rows(ahead.micro_batches()) == rows(plain.micro_batches())
    assert ahead.state_dict() == plain.state_dict()
    with pytest.raises(UserError, match=f"step {STEPS + 1} has no training data"):
        ahead.micro_batches(STEPS)


def test_an_unreadable_sequence_stops_the_step_that_has_it(corpora):
    class Broken(type(build(corpora, "documents", 1))):
        def __getitem__(self, index):
            if index == 2 * BATCH + 5:
                raise OSError("the disk is gone")
            return super().__getitem__(index)

    sequences = Broken(corpora[0].data, seq_length=SEQ, samples=STEPS * BATCH, seed=1)
    ranks = ranks_of(sequences, 2, 1, prefetch=50)
    for _ in range(2):
        step_of(ranks)
    assert len(list(ranks[0].micro_batches())) == 4  # this rank's part of the step is whole
    batches = ranks[1].micro_batches()
    assert next(batches)["tokens"].shape == (1, SEQ)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)
    assert [rank.state_dict()["consumed_samples"] for rank in ranks] == [2 * BATCH] * 2


def test_another_order_or_batch_size_is_refused(corpora):
    (batches,) = ranks_of(build(corpora, "documents", 2), 1)
    for _ in range(4):
        step_of([batches])
    state = batches.state_dict()
    assert state == {"consumed_samples": 32, "order": state["order"], "global_batch_size": BATCH}
    for other in [build(corpora, "packed", 2), build(corpora, "documents", 1), build(corpora, "documents", 2, seed=2)]:
        with pytest.raises(
            UserError, match=r"after 32 sequences of another data order .*data\.path or data\.blend, data\.protocol, train\.seed"
        ):
            ranks_of(other, 1)[0].load_state_dict(state)
    longer = ranks_of(build(corpora, "documents", 2, steps=40), 1)[0]
    longer.load_state_dict(state)  # documents: the order does not depend on the length of the run
    assert longer.step == 4
    (halved,) = ranks_of(build(corpora, "documents", 2), 1, batch=4)
    with pytest.raises(UserError, match="written with train.global_batch_size 8; it is 4 here: resume with the batch size"):
        halved.load_state_dict(state)
    assert halved.consumed_samples == 0
    old = {key: value for key, value in state.items() if key != "global_batch_size"}  # a checkpoint of before it was kept
    halved.load_state_dict(old)
    assert halved.step == 8


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch", [0, 3])
def test_batches_reach_a_gpu_through_pinned_memory(corpora, prefetch):
    sequences, device = build(corpora, "documents", 2), torch.device("cuda", 0)
    batches = TrainBatches(sequences, micro_batch_size=2, dp_rank=0, dp_size=1, global_batch_size=BATCH, device=device, prefetch=prefetch)
    assert all(value.is_pinned() for value in batches._place.load(0).values())
    order = [as_tuple(sequences[number]) for number in range(STEPS * BATCH)]
    found = []
    for _ in range(STEPS):
        for batch in batches.micro_batches():
            assert {value.device for value in batch.values()} == {device}
            found += [as_tuple({key: value[row] for key, value in batch.items()}) for row in range(2)]
        batches.advance()
    assert found == order
    batches.close()
