"""Training by the reference protocol, against lists of documents that are cut and filled up by hand."""

from collections import Counter

import pytest
import torch
from known_corpora import SEQ, as_tuple, expected_sample, make_documents, write_corpus

from poet_megatron.data.documents import DocumentSequences
from poet_megatron.data.eval_data import reference_protocol_batches
from poet_megatron.errors import UserError

DOCUMENTS = make_documents(23)  # 2 to 11 tokens; sequences have 6


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", DOCUMENTS)


def sequences_of(corpus, samples, seed=1, seq_length=SEQ):
    return DocumentSequences(corpus.data, seq_length=seq_length, samples=samples, seed=seed)


def test_two_epochs_have_every_document_once_each(corpus):
    found = [as_tuple(sample) for sample in sequences_of(corpus, 2 * len(DOCUMENTS))]
    expected = Counter(expected_sample(document) for document in DOCUMENTS)
    assert len(found) == 2 * len(DOCUMENTS) and max(expected.values()) == 1
    first, second = found[: len(DOCUMENTS)], found[len(DOCUMENTS) :]
    assert Counter(first) == Counter(second) == expected
    assert first != second
    assert first != [expected_sample(document) for document in DOCUMENTS]


def test_samples_are_those_of_the_evaluation_by_this_protocol(corpus):
    """The same documents in evaluation, in their own order: tensors and dtypes."""
    sequences = sequences_of(corpus, len(DOCUMENTS))
    batches = list(reference_protocol_batches(corpus.data.train_prefix, SEQ, 1, device=torch.device("cpu")))
    for place in range(len(DOCUMENTS)):
        sample, batch = sequences[place], batches[sequences.document_at(place)]
        assert sample.keys() == batch.keys()
        for key, value in sample.items():
            assert value.dtype == batch[key].dtype
            assert torch.equal(value, batch[key][0])


def test_the_order_depends_on_the_seed_and_not_on_the_length_of_the_run(corpus):
    long, short, other = sequences_of(corpus, 90), sequences_of(corpus, 30), sequences_of(corpus, 30, seed=2)
    orders = [[sequences.document_at(place) for place in range(30)] for sequences in (long, short, other)]
    assert orders[0] == orders[1] != orders[2]
    assert long.fingerprint == short.fingerprint != other.fingerprint
    assert len(long) == len(list(long)) == long.num_samples == 90


def test_the_fingerprint_knows_content_and_length_of_sequences(corpus, tmp_path):
    changed = write_corpus(tmp_path / "changed", [*DOCUMENTS[:-1], DOCUMENTS[0]])
    marks = [sequences_of(corpus, 5), sequences_of(changed, 5), sequences_of(corpus, 5, seq_length=7)]
    assert len({sequences.fingerprint for sequences in marks}) == 3


def test_documents_at_the_edge_of_the_sequence(tmp_path):
    """As long as a sequence: whole. One longer: loses the token before its last. A single token: predicts nothing."""
    documents = [[10, 11, 12, 13, 14, 2], [20, 21, 22, 23, 24, 25, 2], [2]]
    sequences = sequences_of(write_corpus(tmp_path / "edge", documents), 3)
    found = {sequences.document_at(place): as_tuple(sequences[place]) for place in range(3)}
    assert found[0] == ((10, 11, 12, 13, 14, 0), (11, 12, 13, 14, 2, 0), (1.0,) * 5 + (0.0,))
    assert found[1] == ((20, 21, 22, 23, 24, 0), (21, 22, 23, 24, 2, 0), (1.0,) * 5 + (0.0,))
    assert found[2] == ((0,) * 6, (0,) * 6, (0.0,) * 6)


def test_bad_places_and_a_corpus_without_documents(corpus, tmp_path):
    sequences = sequences_of(corpus, 5)
    for place in (-1, 5):
        with pytest.raises(IndexError, match=f"sequence {place} is not in 0..4"):
            sequences[place]
    with pytest.raises(UserError, match=r"train.bin has no documents: prepare more text"):
        sequences_of(write_corpus(tmp_path / "none", []), 5)
