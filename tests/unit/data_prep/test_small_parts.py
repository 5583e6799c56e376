"""Filters, de-duplication, lengths, retries: the parts of `prepare tokenize` that need no process."""

import random
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from data_prep import filters, hub
from data_prep.dedup import SeenHashes
from data_prep.lengths import Lengths, histogram_svg, lower_edge
from data_prep.settings import Shard
from poet_megatron.errors import UserError

GOOD = 'This line has more than five words.\nAnd this one has them too, really!\nA third one ends with a quote, "like this."\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, ""),
        (GOOD + "lorem IPSUM dolor sit amet, all of it.", "C4 filter: lorem ipsum"),
        (GOOD + "for (;;) { this is code, not a text. }", "C4 filter: curly bracket"),
        ("Only one line that has enough words.\nshort.\n", "C4 filter: fewer than 3 sentences"),
    ],
)
def test_pages_that_c4_leaves_out(text, reason):
    assert filters.clean(text)[1] == reason


def test_lines_that_c4_leaves_out():
    bad = [
        "Menu",
        "Too few words.",
        "Please enable Javascript to see this page.",
        "Read our privacy policy before you go on.",
        "It goes on and on...",
    ]
    kept, _ = filters.clean("\n".join([bad[0], GOOD, *bad[1:]]))
    assert kept == GOOD.strip()


@pytest.mark.parametrize("seed", range(5))
def test_seen_hashes_against_a_set(seed):
    source = random.Random(seed)
    seen, expected = SeenHashes(), set()
    for _ in range(60):
        batch = [source.randrange(3000) for _ in range(source.randrange(200))] + [2**64 - 1]
        new = seen.add(np.array(batch, np.uint64)).tolist()
        for value, is_new in zip(batch, new, strict=True):
            assert is_new == (value not in expected)
            expected.add(value)
    assert len(seen) == len(expected) and len(seen._levels) < 12


def test_lengths_add_up_over_parts():
    values = np.random.default_rng(0).integers(1, 5000, 1000).astype(np.int32)
    whole, halves, second = Lengths(), Lengths(), Lengths()
    whole.add(values)
    halves.add(values[:300])
    second.add(values[300:])
    halves.add_dict(second.as_dict())
    halves.add_dict(Lengths().as_dict())
    assert halves.as_dict() == whole.as_dict()
    found = whole.as_dict()
    assert found["longest"] == values.max() and found["shortest"] == values.min() and found["total"] == values.sum()
    for number, count in enumerate(found["counts"]):
        low, high = found["edges"][number], found["edges"][number + 1]
        assert count == ((values >= low) & (values < high)).sum()
    median = whole.quantile(0.5)
    assert median <= np.median(values) < 2 * median


def test_the_histogram_is_a_picture_with_a_bar_for_each_bin():
    lengths = Lengths()
    lengths.add(np.array([1, 100, 100, 5000], np.int32))
    tree = ElementTree.fromstring(histogram_svg(lengths))
    text = "".join(tree.itertext())
    assert "4 documents, 5,201 tokens" in text and text.count(" to ") == len(lengths.counts)
    assert ElementTree.fromstring(histogram_svg(Lengths())) is not None
    assert [lower_edge(number) for number in range(9)] == [1, 2, 2, 3, 4, 6, 8, 12, 16]


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0", ""])
def test_a_shard_out_of_range(text):
    with pytest.raises(UserError, match=r"is not i/N with i from 0 to N - 1"):
        Shard.parse(text)


def test_shards_share_the_parts():
    assert sorted(part for i in range(3) for part in range(10) if Shard.parse(f"{i}/3").holds(part)) == list(range(10))


class Flaky:
    """Rows 0 to 9 over a connection that breaks at the rows given."""

    def __init__(self, breaks):
        self.breaks = list(breaks)
        self.begun = []

    def begin(self, done):
        self.begun.append(done)
        for row in range(done, 10):
            if self.breaks and self.breaks[0] == row:
                self.breaks.pop(0)
                raise ConnectionError("reset by peer")
            yield row


def test_a_broken_connection_loses_and_doubles_no_row(capsys):
    pauses = []
    source = Flaky([0, 0, 4, 9])
    rows = list(hub.Retry(first_pause=2, sleep=pauses.append).rows(source.begin, "hf://x"))
    assert rows == list(range(10)) and source.begun == [0, 0, 0, 4, 9]
    assert pauses == [2, 4, 2, 2]
    assert "hf://x: ConnectionError: reset by peer; trying again in 4 s (row 1)" in capsys.readouterr().err


def test_a_dead_connection_is_an_error_after_some_attempts():
    pauses = []
    source = Flaky([3] * 10)
    with pytest.raises(
        UserError, match=r"hf://x cannot be read \(ConnectionError: reset by peer\), tried 3 times after 3 rows: check the name and"
    ):
        list(hub.Retry(attempts=3, first_pause=1, sleep=pauses.append).rows(source.begin, "hf://x"))
    assert pauses == [1, 2]


@pytest.mark.parametrize("kind", [FileNotFoundError, PermissionError])
def test_what_another_attempt_does_not_mend_is_an_error_at_once(kind):
    def begin(done):
        raise kind("no such dataset")
        yield

    with pytest.raises(
        UserError, match=rf"hf://x cannot be read \({kind.__name__}: no such dataset\): check its name, files and your rights"
    ):
        list(hub.Retry(sleep=lambda pause: pytest.fail("it waited")).rows(begin, "hf://x"))


def test_no_connection_and_no_copy_here_is_tried_again():
    from huggingface_hub.errors import LocalEntryNotFoundError

    calls = []

    def begin(done):
        calls.append(done)
        if len(calls) < 3:
            raise LocalEntryNotFoundError("outgoing traffic is disabled")
        yield "row"

    assert list(hub.Retry(sleep=lambda pause: None).rows(begin, "hf://x")) == ["row"] and len(calls) == 3


def test_datasets_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"--dataset allenai/c4 needs the datasets package: pip install 'poet-megatron\[data\]'"):
        hub.find_shards("allenai/c4")
