"""Every kind of bad input: counted with its reason and position, or an error under --strict; nothing is lost without a count."""

import errno
import gzip
import io
import json
import os
import re
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import zstandard

from data_prep.indexed import read_indexed
from data_prep.settings import Settings
from data_prep.sources import FileSource, find_files
from data_prep.tokenizer import load_tokenizer
from data_prep.tokenizing import tokenize
from poet_megatron.errors import UserError
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, make_texts, make_tokenizer, part, run

GOOD = make_texts(6)
FIRST, LAST = jsonl(GOOD[:3]), jsonl(GOOD[3:])
LIMIT = 1 << 20
CASES = {
    "invalid JSON": (b'{"text": "cut\n', "invalid JSON"),
    "nested": (b"[" * 100_000 + b"\n", "invalid JSON"),
    "huge number": (b'{"text": "a", "n": ' + b"9" * 5000 + b"}\n", "invalid JSON"),
    "NUL bytes": (b"\0" * 512 + b"\n", "invalid JSON"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}\n', "invalid UTF-8"),
    "no text": (b'{"url": "x"}\n', 'no "text"'),
    "null text": (b'{"text": null}\n', '"text" is not a string'),
    "number": (b"17\n", "not a JSON object"),
    "empty": (b'{"text": ""}\n', "empty text"),
    "white": (b'{"text": " \\n\\t\\u00a0"}\n', "empty text"),
    "blank line": (b"  \r\n", "blank line"),
    "NUL character": (b'{"text": "a\\u0000b"}\n', "NUL character"),
    "lone surrogate": (b'{"text": "a\\ud800b"}\n', "lone surrogate"),
    "long line": (b'{"text": "' + b"x " * LIMIT + b'"}\n', f"longer than {LIMIT} bytes"),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def texts_of(folder, tokenizer, number=0):
    model, data = load_tokenizer(tokenizer), read_indexed(folder / f"part-{number:05d}.train")
    return [model.decode(data.document(i)[:-1]) for i in range(len(data))]


def test_each_is_skipped_counted_and_located(tmp_path, tokenizer, capsys):
    for number, (content, _) in enumerate(CASES.values()):
        (tmp_path / f"{number:02d}.jsonl").write_bytes(FIRST + content + LAST)
    out = tmp_path / "out"
    totals = run(tmp_path / "*.jsonl", out, tokenizer, max_document_bytes=LIMIT)
    for number, (_, reason) in enumerate(CASES.values()):
        found = part(out, number)
        assert found["skipped"] == {reason: {"count": 1, "first_records": [4]}}
        assert found["records"] == 7 and found["splits"]["train"]["documents"] == 6
        assert texts_of(out, tokenizer, number) == GOOD
    assert totals.skipped.total() == len(CASES) and totals.documents["train"] == 6 * len(CASES)
    assert f"{tmp_path / '00.jsonl'}: skipped 1 records (invalid JSON; records 4)" in capsys.readouterr().err


@pytest.mark.parametrize("case", ["invalid JSON", "invalid UTF-8", "lone surrogate", "long line"])
def test_strict_stops_at_the_first_and_leaves_no_part(tmp_path, tokenizer, case):
    content, reason = CASES[case]
    (tmp_path / "a.jsonl").write_bytes(FIRST + content + b"more\n" + LAST)
    message = f"{tmp_path / 'a.jsonl'}, record 4: {reason} (--strict): correct or remove it, or leave out --strict to skip and count it"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, strict=True, max_document_bytes=LIMIT)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("damage", "reason"), [(lambda d: d[:-2000], "truncated gzip"), (lambda d: d[:-2000] + b"\xff" * 99 + d[-1901:], "corrupt gzip")]
)
def test_a_damaged_gzip_gives_what_comes_before(tmp_path, tokenizer, damage, reason):
    texts = make_texts(3000)
    (tmp_path / "a.json.gz").write_bytes(damage(gzip.compress(jsonl(texts))))
    run(tmp_path / "a.json.gz", tmp_path / "out", tokenizer)
    found, kept = part(tmp_path / "out"), texts_of(tmp_path / "out", tokenizer)
    assert len(kept) > 2000 and kept[:2000] == texts[:2000]
    assert reason == "corrupt gzip" or kept == texts[: len(kept)]
    assert found["skipped"][reason] == {"count": 1, "first_records": [found["records"]]}
    with pytest.raises(UserError, match=r"record \d+: .* \(--strict\)"):
        run(tmp_path / "a.json.gz", tmp_path / "strict", tokenizer, strict=True)


def test_text_and_parquet_files(tmp_path, tokenizer):
    table = pyarrow.table({"body": [GOOD[0], None, "", "a\0b", GOOD[1]], "id": [1, 2, 3, 4, 5]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    run(tmp_path / "a.parquet", tmp_path / "out", tokenizer, text_key="body")
    assert texts_of(tmp_path / "out", tokenizer) == GOOD[:2]
    reasons = {reason: found["first_records"] for reason, found in part(tmp_path / "out")["skipped"].items()}
    assert reasons == {'no "body"': [2], "empty text": [3], "NUL character": [4]}
    for key, message in (("text", r"has no column 'text' \(it has body, id\): set --text-key"), ("id", "holds int64, not text")):
        with pytest.raises(UserError, match=message):
            run(tmp_path / "a.parquet", tmp_path / key, tokenizer, text_key=key)
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-100])
    run(tmp_path / "cut.parquet", tmp_path / "cut", tokenizer, text_key="body")
    assert part(tmp_path / "cut")["skipped"] == {"corrupt parquet": {"count": 1, "first_records": [1]}}


def test_text_files(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_bytes(b"one\r\n\ntwo")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"cut" * 1000)[:-5])
    (tmp_path / "d.txt").write_bytes(b"x" * 3000)
    run(tmp_path / "*.txt*", tmp_path / "out", tokenizer, max_document_bytes=2000)
    assert texts_of(tmp_path / "out", tokenizer, 0) == ["one\r\n\ntwo"]
    skipped = [list(part(tmp_path / "out", number)["skipped"]) for number in range(4)]
    assert skipped[0] == [] and skipped[1] == ["invalid UTF-8"] and skipped[3] == ["longer than 2000 bytes"]
    assert skipped[2] in (["truncated gzip"], ["longer than 2000 bytes"])


def test_zstd(tmp_path, tokenizer):
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(GOOD)))
    run(tmp_path / "a.jsonl.zst", tmp_path / "out", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == GOOD


def test_a_byte_order_mark_is_no_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(GOOD).rstrip(b"\n"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone")
    for number, (name, texts) in enumerate({"a.jsonl": GOOD, "b.txt": ["one"]}.items()):
        run(tmp_path / name, tmp_path / f"out{number}", tokenizer, strict=True)
        assert texts_of(tmp_path / f"out{number}", tokenizer) == texts


def test_windows_line_ends_are_no_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(jsonl(GOOD).replace(b"\n", b"\r\n"))
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, strict=True)
    assert texts_of(tmp_path / "out", tokenizer) == GOOD


def test_links_are_read_as_their_names_say(tmp_path, tokenizer):
    """As in Hugging Face's cache, where they lead to files named by a hash."""
    (tmp_path / "0a1b").write_bytes(gzip.compress(jsonl(GOOD)))
    (tmp_path / "a.json.gz").symlink_to(tmp_path / "0a1b")
    run(tmp_path / "a.json.gz", tmp_path / "out", tokenizer, strict=True)
    assert texts_of(tmp_path / "out", tokenizer) == GOOD


class Changing:
    """A source to which something is done when it has been read to the end, before anybody asks what it was."""

    def __init__(self, source, change):
        self._source, self._change, self.name, self.bytes = source, change, source.name, source.bytes

    def open(self, key, max_bytes):
        reader = self._source.open(key, max_bytes)
        blocks = reader.blocks

        def changed():
            yield from blocks()
            self._change(self._source.path)

        reader.blocks = changed
        return reader


@pytest.mark.parametrize(
    ("name", "change", "now"),
    [
        ("a.jsonl", lambda path: path.write_bytes(jsonl(GOOD)), len(jsonl(GOOD))),
        ("a.jsonl", lambda path: os.utime(path, ns=(1, 1)), len(jsonl(GOOD[:3]))),
        ("a.parquet", lambda path: path.write_bytes(b"short"), 5),
    ],
    ids=["grown", "rewritten", "parquet"],
)
def test_a_file_that_changes_while_it_is_read_makes_no_part(tmp_path, tokenizer, name, change, now):
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": GOOD}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(FIRST)
    size = (tmp_path / name).stat().st_size
    source = Changing(find_files([str(tmp_path / name)])[0], change)
    message = (
        rf"a\.\w+ changed while it was read \({size} bytes, now {now}\): nothing of it is kept; run the same command again when nothing"
    )
    with pytest.raises(UserError, match=message):
        tokenize([source], tmp_path / "out", Settings(tokenizer=str(tokenizer)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_file_that_the_system_does_not_give_is_not_taken_for_a_corrupt_one(tmp_path, tokenizer, name):
    """A name without a file here; the same error is raised for a disk or a server that fails."""
    source = FileSource(tmp_path / name, 0)
    with pytest.raises(UserError, match=rf"input .*{name} cannot be read \(No such file or directory\): finished parts are kept; run the"):
        tokenize([source], tmp_path / "out", Settings(tokenizer=str(tokenizer)))
    (tmp_path / name).write_bytes(b"x")
    reader = FileSource(tmp_path / name, 1).open("text", 100)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"input .*{name} cannot be read \(.*No such file or directory.*\): finished parts are kept"):
        list(reader.blocks())


def test_a_read_that_fails_half_way(tmp_path, tokenizer, monkeypatch):
    class Broken(io.BytesIO):
        def read(self, count):
            if self.tell():
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().read(count)

    (tmp_path / "a.jsonl").write_bytes(FIRST)
    original = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, mode="r", **rest: Broken(FIRST) if path.name == "a.jsonl" else original(path, mode, **rest)
    )
    with pytest.raises(UserError, match=r"input .*a.jsonl cannot be read \(Input/output error\): finished parts are kept"):
        tokenize([FileSource(tmp_path / "a.jsonl", len(FIRST))], tmp_path / "out", Settings(tokenizer=str(tokenizer)))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]


@pytest.fixture
def nobody():
    """Run as a user whom permissions bind."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.fixture
def open_to_all(tmp_path_factory):
    """Lets other users enter a folder of pytest's, through the ones above it that are pytest's too (with xdist one more)."""
    base = tmp_path_factory.getbasetemp()
    above = [parent for parent in base.parents if parent.name.startswith("pytest-")]
    if base.name.startswith("popen-"):
        above.append(base.parent)

    def open_(folder):
        for path in (folder, *folder.parents):
            if path == base or base in path.parents or path in above:
                path.chmod(0o755)

    return open_


def test_an_unreadable_source_stops_before_any_work(tmp_path, nobody, open_to_all):
    if os.getuid() == 0:
        os.seteuid(0)
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    (tmp_path / "a.jsonl").chmod(0)
    open_to_all(tmp_path)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError, match=r"a.jsonl cannot be read \(Permission denied\): check its permissions"):
        find_files([str(tmp_path / "a.jsonl")])


@pytest.fixture
def locked(tmp_path, tokenizer, nobody, open_to_all):
    """A folder that this user may enter and read, and not write."""
    if os.getuid() == 0:
        os.seteuid(0)
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    (tmp_path / "locked").mkdir(mode=0o555)
    open_to_all(tmp_path)
    open_to_all(tokenizer.parent)
    if os.getuid() == 0:
        os.seteuid(65534)
    return tmp_path / "locked"


def test_an_output_that_cannot_be_written(locked, tokenizer):
    source = locked.parent / "a.jsonl"
    message = r"cannot be written \(permission denied\): choose another --output, or change its owner"
    with pytest.raises(UserError, match=rf"locked/\.plan\.json\..*\.tmp {message}"):
        run(source, locked, tokenizer)
    with pytest.raises(UserError, match=rf"locked/out {message}"):
        run(source, locked / "out", tokenizer)
    with pytest.raises(UserError, match=r"a.jsonl/out cannot be written \(Not a directory\): choose another --output"):
        run(source, source / "out", tokenizer)
    with pytest.raises(UserError, match=r"output .*a.jsonl is a file: name a folder"):
        run(source, source, tokenizer)


def test_another_request_does_not_mix_with_what_is_there(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    before = hashes(tmp_path / "out")
    with pytest.raises(
        UserError, match=r"holds parts of another request \(valid_fraction was 0.0, is 0.5; bos was False, is True\)|bos was False"
    ):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, bos=True, valid_fraction=0.5)
    (tmp_path / "b.jsonl").write_bytes(LAST)
    with pytest.raises(UserError, match=r"it was 1 sources, is 2"):
        run(tmp_path / "*.jsonl", tmp_path / "out", tokenizer)
    (tmp_path / "a.jsonl").write_bytes(FIRST + LAST)
    with pytest.raises(UserError, match=r"a source was .*a.jsonl \(\d+ bytes\), is"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    assert hashes(tmp_path / "out") == before


def test_settings_out_of_range(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    with pytest.raises(UserError, match=r"--valid-fraction is 1.5; it must be between 0"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, valid_fraction=1.5)
    with pytest.raises(UserError, match=r"--workers is 0; it must be at least 1"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, workers=0)
    with pytest.raises(UserError, match=r"matches no file"):
        run(tmp_path / "b.jsonl", tmp_path / "out", tokenizer)


def test_manifest_says_what_was_read(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
    found, plan = part(tmp_path / "out"), json.loads((tmp_path / "out" / "plan.json").read_text())
    assert found["source"] == {"name": str(tmp_path / "a.jsonl"), "bytes": len(FIRST), "sha256": hashes(tmp_path, ("a.jsonl",))["a.jsonl"]}
    assert plan["tokenizer"]["sha256"] == load_tokenizer(tokenizer).sha256
    assert found["splits"]["train"]["bin_sha256"] == hashes(tmp_path / "out")["part-00000.train.bin"]
    assert found["splits"]["train"]["text_bytes"] == sum(len(text.encode()) for text in GOOD[:3])
    assert {"python", "sentencepiece", "poet-megatron", "encoder"} <= set(found["versions"])


@pytest.mark.parametrize(("name", "package"), [("a.jsonl.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_an_optional_package_that_is_missing(tmp_path, monkeypatch, name, package):
    (tmp_path / name).write_bytes(b"x")
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"needs the {package} package: pip install 'poet-megatron\[data\]'"):
        find_files([str(tmp_path / name)])
