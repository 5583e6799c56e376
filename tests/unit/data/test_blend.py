"""Blends: the setting, the rule (against megatron-core's own class and against one written out), coverage, and what is refused."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from known_corpora import SEQ, as_tuple, expected_sample, make_documents, write_corpus
from megatron.core.datasets.blended_dataset import BlendedDataset

from data_prep.prepare import prepare
from poet_megatron.data.blend import BlendIndex
from poet_megatron.data.config import BlendPart, DataConfig, format_blend, parse_blend
from poet_megatron.data.corpora import open_corpora, resolve_data
from poet_megatron.data.train_data import build_train_sequences, describe, fingerprint
from poet_megatron.errors import UserError

WEIGHTS = [0.7, 0.2, 0.1]


@pytest.fixture
def corpora(tmp_path):
    """Corpora of 21, 6 and 3 documents whose first tokens tell them apart."""
    return [
        write_corpus(tmp_path / f"corpus{number}", make_documents(size, start), weight)
        for number, (size, start, weight) in enumerate([(21, 100, 0.7), (6, 200, 0.2), (3, 300, 0.1)])
    ]


def build(corpora, protocol, samples, seed=1):
    return build_train_sequences(corpora, protocol, seq_length=SEQ, samples=samples, seed=seed)


# ------------------------------------------------------------------------------------------------------------------------ the setting


def test_parse_blend():
    assert parse_blend("") == parse_blend("  ") == ()
    assert parse_blend("0.7 a/b 3 'c d'") == (BlendPart(0.7, "a/b"), BlendPart(3.0, "c d"))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.floats(1e-300, 1e300), st.text(st.characters(codec="utf-8"), min_size=1)), unique_by=lambda pair: pair[1]))
def test_any_folders_and_weights_survive_the_text(pairs):
    parts = tuple(BlendPart(*pair) for pair in pairs)
    assert parse_blend(format_blend(parts)) == parts


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.5 a 0.5", "data.blend is '0.5 a 0.5', 3 words; it must be pairs of a weight and a folder"),
        ("a 0.5 b 0.5", "the weight of 0.5 is 'a'; it must be a number above 0"),
        ("0 a 1 b", "the weight of a is '0'; it must be a number above 0"),
        ("-1 a 1 b", "the weight of a is '-1'"),
        ("nan a", "the weight of a is 'nan'"),
        ("inf a", "the weight of a is 'inf'"),
        ("1 a 2 a", "has a twice: name each folder once, with the sum of its weights"),
        ("1 'a", "no closing quotation"),
    ],
)
def test_bad_blends_are_refused_with_the_settings(text, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(blend=text)


def test_bad_protocol_and_prefetch():
    with pytest.raises(ValueError, match="data.protocol is 'padded'; choose one of packed, documents"):
        DataConfig(protocol="padded")
    with pytest.raises(ValueError, match="data.prefetch is -1; it must be at least 0"):
        DataConfig(prefetch=-1)


def test_resolved_settings_can_be_used_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_data(DataConfig()) == DataConfig()
    assert resolve_data(DataConfig(path="a", cache="c")) == DataConfig(path=f"{tmp_path}/a", cache=f"{tmp_path}/c")
    found = resolve_data(DataConfig(blend="7 a 0.1 'b c'"))
    assert found == DataConfig(path=f"{tmp_path}/a", blend=f"7.0 {tmp_path}/a 0.1 '{tmp_path}/b c'")
    assert resolve_data(found) == found
    assert resolve_data(DataConfig(path="v", blend="1 a")).path == f"{tmp_path}/v"


# --------------------------------------------------------------------------------------------------------------------------- the rule


def dealt(weights, samples):
    """The rule, written out: the corpus that is furthest behind; of equals the first."""
    shares, taken, found = [weight / sum(weights) for weight in weights], [0] * len(weights), []
    for number in range(samples):
        behind = [share * max(number, 1) - have for share, have in zip(shares, taken, strict=True)]
        corpus = behind.index(max(behind))
        found.append((corpus, taken[corpus]))
        taken[corpus] += 1
    return found, taken


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5], WEIGHTS, [7.0, 2.0, 1.0], [1e-6, 1.0], [3.0, 1.0, 4.0, 1.0, 5.0, 9.0, 2.0, 6.0]])
def test_the_rule(weights, tmp_path):
    index = BlendIndex.build(weights, 500)
    found, counts = dealt(weights, 500)
    assert list(zip(index.corpus.tolist(), index.position.tolist(), strict=True)) == found
    assert index.counts.tolist() == counts
    for number, weight in enumerate(weights):  # every prefix has its share, to within the number of corpora
        taken = np.cumsum(index.corpus == number)
        assert np.abs(taken - weight / sum(weights) * np.arange(1, 501)).max() <= len(weights)
    shorter = BlendIndex.build(weights, 123)
    assert np.array_equal(shorter.corpus, index.corpus[:123]) and np.array_equal(shorter.position, index.position[:123])
    index.save(tmp_path)
    again = BlendIndex.load(tmp_path)
    assert isinstance(again.corpus, np.memmap)
    assert all(np.array_equal(getattr(again, name), getattr(index, name)) for name in ("corpus", "position", "counts"))


def test_packed_sequences_are_those_of_megatrons_blended_dataset(corpora):
    ours = build(corpora, "packed", 40)
    config = ours.parts[0].config
    path, config.path_to_cache = config.path_to_cache, None  # with a cache, megatron-core asks for a process group
    theirs = BlendedDataset(ours.parts, WEIGHTS, 40, config)
    config.path_to_cache = path
    assert len(ours) == len(theirs) == 40
    assert [as_tuple(ours[place]) for place in range(40)] == [as_tuple(theirs[place]) for place in range(40)]
    assert {int(theirs[place]["dataset_id"]) for place in range(40)} == {0, 1, 2}


# --------------------------------------------------------------------------------------------------------------------------- coverage


def test_documents_are_covered_exactly_over_two_epochs(corpora):
    """Weights in proportion to the documents: 60 sequences are two epochs of each corpus."""
    sequences = build(corpora, "documents", 60)
    found = [as_tuple(sample) for sample in sequences]
    everything = [*make_documents(21, 100), *make_documents(6, 200), *make_documents(3, 300)]
    assert Counter(found) == Counter({expected_sample(document): 2 for document in everything})
    once = Counter(found[:30])
    assert sum(abs(once[expected_sample(document)] - 1) for document in everything) <= 4  # in between, to within the rule's steps


def test_a_corpus_is_repeated_as_its_weight_asks(corpora):
    sequences = build([corpora[0], corpora[2]], "documents", 80)  # weights 0.7 and 0.1: 70 of 21 documents, 10 of 3
    firsts = Counter(as_tuple(sample)[0][0] for sample in sequences)
    assert sorted(firsts[300 + number] for number in range(3)) == [3, 3, 4]
    assert sorted(firsts[100 + number] for number in range(21)) == [3] * 14 + [4] * 7


def test_packed_parts_keep_their_own_order(corpora):
    sequences = build(corpora, "packed", 40)
    for number, corpus in enumerate(corpora):
        count = int(sequences.index.counts[number])
        alone = build([corpus], "packed", count)
        own = [as_tuple(sequences[place]) for place in range(40) if sequences.index.corpus[place] == number]
        assert own == [as_tuple(alone[place]) for place in range(count)]


@pytest.mark.parametrize("protocol", ["packed", "documents"])
def test_order_and_fingerprint(corpora, protocol):
    sequences, again = build(corpora, protocol, 40), build(corpora, protocol, 40)
    assert [as_tuple(sample) for sample in sequences] == [as_tuple(sample) for sample in again]
    assert fingerprint(sequences) == fingerprint(again)
    others = [build(corpora, protocol, 40, seed=2), build(corpora[::-1], protocol, 40), build(corpora[:2], protocol, 40)]
    others.append(build([type(corpora[0])(corpora[0].data, 0.6), *corpora[1:]], protocol, 40))
    assert len({fingerprint(other) for other in [sequences, *others]}) == 5
    for place in (-1, 40):
        with pytest.raises(IndexError, match=f"sequence {place} is not in 0..39"):
            sequences[place]


@pytest.mark.parametrize("protocol", ["packed", "documents"])
def test_a_corpus_whose_turn_never_comes(corpora, protocol):
    rare = [corpora[0], type(corpora[1])(corpora[1].data, 1e-9)]
    sequences = build(rare, protocol, 20)
    assert sequences.index.counts.tolist() in ([20, 0], [19, 1])
    assert len([as_tuple(sample) for sample in sequences]) == 20


def test_the_index_is_built_once_and_checked(corpora, tmp_path):
    def build_in(cache):
        return build_train_sequences(corpora, "documents", seq_length=SEQ, samples=40, seed=1, cache=cache)

    first = build_in(tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert np.array_equal(build_in(tmp_path / "cache").index.corpus, first.index.corpus)
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} and len(stamps) == 3
    np.save(folder / "position.npy", np.array([{"an": "object"}]), allow_pickle=True)
    with pytest.raises(UserError, match="position.npy is damaged"):
        build_in(tmp_path / "cache")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write the sample index in .*: set data.cache to a writable folder"):
        build_in(tmp_path / "file")
    build_in("")
    assert (corpora[0].data.path / "cache").is_dir()


def test_description(corpora):
    assert describe(build(corpora, "documents", 60), corpora) == [
        f"data: 70.00% from {corpora[0].data.path}: 42 sequences, 2 epochs of its 21 documents",
        f"data: 20.00% from {corpora[1].data.path}: 12 sequences, 2 epochs of its 6 documents",
        f"data: 10.00% from {corpora[2].data.path}: 6 sequences, 2 epochs of its 3 documents",
    ]
    tokens = corpora[0].data.train_tokens
    (line,) = describe(build(corpora[:1], "packed", 10), corpora[:1])
    assert line == f"data: 100.00% from {corpora[0].data.path}: 10 sequences, {60 / tokens:.3g} epochs of its {tokens} tokens"


# ------------------------------------------------------------------------------------------------------------------------ what is refused


def test_corpora_need_one_tokenizer(tmp_path):
    sources = []
    for name in ("one", "two", "three"):
        sources.append(tmp_path / f"{name}.jsonl")
        lines = [json.dumps({"text": f"{name} document {number} about spectra and {name} rotations"}) for number in range(60)]
        sources[-1].write_text("\n".join(lines) + "\n")
    prepare([str(sources[0])], tmp_path / "one", vocab_size=310, valid_fraction=0.2)
    prepare([str(sources[1])], tmp_path / "two", tokenizer=tmp_path / "one" / "tokenizer.model", valid_fraction=0.2)
    prepare([str(sources[2])], tmp_path / "three", vocab_size=310, valid_fraction=0.2)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    opened = open_corpora(DataConfig(blend=f"3 {one} 1 {two}"), 310, 16)
    assert [(corpus.data.path, corpus.weight) for corpus in opened] == [(one, 3.0), (two, 1.0)]
    assert [(corpus.data.path, corpus.weight) for corpus in open_corpora(DataConfig(path=str(one)), 310, 16)] == [(one, 1.0)]
    for config in (DataConfig(blend=f"3 {one} 1 {two} 1 {three}"), DataConfig(blend=f"3 {one} 1 {two}", path=str(three))):
        with pytest.raises(UserError) as caught:
            open_corpora(config, 310, 16)
        for part in ["data.blend mixes tokenizers", str(one), f"prepare {three} again with --tokenizer {one / 'tokenizer.model'}"]:
            assert part in str(caught.value)
    with pytest.raises(UserError, match="model.vocab_size is 400, but .* set model.vocab_size to 310"):
        open_corpora(DataConfig(blend=f"3 {one} 1 {two}"), 400, 16)
    with pytest.raises(UserError, match="nothing/manifest.json does not exist"):
        open_corpora(DataConfig(blend=f"3 {one} 1 {tmp_path / 'nothing'}"), 310, 16)
    with pytest.raises(UserError, match="data.path is empty"):
        open_corpora(DataConfig(), 310, 16)
