import gzip
import json

import pytest

from data_prep.corpus import embedded_documents, expand, read_documents, skip_reason
from poet_megatron.errors import UserError

LONG = "A sentence that is about nothing in particular. " * 6


def read(path):
    return [document.text for document in read_documents(expand([str(path)]))]


@pytest.fixture
def library(tmp_path):
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(f"topics = {{'assert': 'The topic.', 'if': {LONG!r}}}\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_x.py").write_text(f"'''{LONG} in a test'''\n")
    body = f"raise RuntimeError('imported')\ndef f():\n    '''{LONG} of f'''\n" + "".join(
        f"def g{i}():\n    '''Short docstring number {i}, of a function that does little.'''\n" for i in range(6)
    )
    (tmp_path / "module.py").write_text(f"# {'A comment that is long enough to be kept as English text, really.'}\n{body}")
    (tmp_path / "copy.py").write_text(f"def f():\n    '''{LONG} of f'''\n")
    (tmp_path / "broken.py").write_text("def (:\n")
    return tmp_path


def test_embedded_documents_of_a_small_library(library):
    documents = list(embedded_documents(library))
    assert documents == list(embedded_documents(library))
    assert len(documents) == len(set(documents)) == 4
    assert "The topic." in documents and LONG.strip() in documents
    merged = next(text for text in documents if "Short docstring number 0" in text)
    assert "Short docstring number 5" in merged and "A comment that is long enough" in merged
    assert sum("of f" in text for text in documents) == 1
    assert not any("in a test" in text for text in documents)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_reads_json_lines(tmp_path, name):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt", encoding="utf-8") as stream:
        stream.write('{"text": "one\\ntwo", "url": ""}\n\n{"text": "\u00fcn\u00ef"}')
    assert read(tmp_path / name) == ["one\ntwo", "\u00fcn\u00ef"]


def test_reads_a_text_file_as_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\n\ntwo")
    assert read(tmp_path / "a.txt") == ["one\r\n\n\ntwo"]


def test_globs_are_sorted_and_files_are_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "[c].txt"):
        (tmp_path / name).write_text(name)
    files = expand([f"{tmp_path}/[c].txt", f"{tmp_path}/?.txt", f"{tmp_path}/a.txt", f"{tmp_path}/../{tmp_path.name}/a.txt"])
    assert [path.name for path in files] == ["[c].txt", "a.txt", "b.txt"]


def test_input_errors_name_the_file_and_the_fix(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "a.csv").write_text("x")
    cases = {
        "missing.jsonl": "matches no file",
        "*.gz": "matches no file",
        "empty.txt": "is empty",
        "a.csv": "unknown ending",
        ".": "folder",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            expand([f"{tmp_path}/{name}"])
        assert str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no input files"):
        expand([])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 3}', 'no "text"'),
        (b'{"url": "x"}', "found: url"),
        (b"[1]", "found: list"),
        (b"{", "not a JSON"),
        (b'{"text": "\xff"}', "UTF-8"),
    ],
)
def test_malformed_lines_name_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert f"{path}:2" in str(caught.value)


def test_damaged_files_name_the_line(tmp_path):
    whole = gzip.compress(b"".join(json.dumps({"text": f"{i} {LONG}"}).encode() + b"\n" for i in range(5)), mtime=0)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    (tmp_path / "not.json.gz").write_bytes(b"plain text")
    (tmp_path / "latin.txt").write_bytes(b"fine\n\xe9\n")
    for name, message in {"cut.jsonl.gz": "damaged gzip", "not.json.gz": "damaged gzip", "latin.txt": r"latin.txt:2: not UTF-8"}.items():
        with pytest.raises(UserError, match=message):
            read(tmp_path / name)


def test_skip_reasons():
    assert skip_reason("text") is None
    assert skip_reason(" \n\t") == "blank text"
    assert skip_reason("a\ud800") == "lone surrogate"


def test_a_link_is_read_as_its_own_name_says_and_only_once(tmp_path):
    """Hugging Face's cache: names with endings link to files named by their hash."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "0a1b").write_bytes(gzip.compress(b'{"text": "one"}\n'))
    for name in ("a.json.gz", "b.json.gz"):
        (tmp_path / name).symlink_to(tmp_path / "blobs" / "0a1b")
    assert expand([str(tmp_path / "*.json.gz"), str(tmp_path / "b.json.gz")]) == [tmp_path / "a.json.gz"]
    assert read(tmp_path / "b.json.gz") == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (b'{"text": "one"}\r\n{"text": "two"}\r\n' if name == "a.jsonl" else b"one"))
    assert read(tmp_path / name) == (["one", "two"] if name == "a.jsonl" else ["one"])
