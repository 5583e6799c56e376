"""Every kind of bad input: counted with its reason and position, or an error under --strict; nothing is lost without a count."""

import gzip
import json
import os
import re
import sys

import pytest

from data_prep.indexed import read_indexed
from data_prep.sources import find_files
from data_prep.tokenizer import load_tokenizer
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
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")

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
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(jsonl(GOOD)))
    run(tmp_path / "a.jsonl.zst", tmp_path / "out", tokenizer)
    assert texts_of(tmp_path / "out", tokenizer) == GOOD


def test_a_byte_order_mark_is_no_error(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(GOOD).rstrip(b"\n"))
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, strict=True)
    assert texts_of(tmp_path / "out", tokenizer) == GOOD


@pytest.fixture
def nobody():
    """Run as a user whom permissions bind."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


def test_an_unreadable_source_stops_before_any_work(tmp_path, nobody):
    if os.getuid() == 0:
        os.seteuid(0)
    (tmp_path / "a.jsonl").write_bytes(FIRST)
    (tmp_path / "a.jsonl").chmod(0)
    for folder in (tmp_path, *list(tmp_path.parents)[:2]):
        folder.chmod(0o755)
    if os.getuid() == 0:
        os.seteuid(65534)
    with pytest.raises(UserError, match=r"a.jsonl cannot be read \(Permission denied\): check its permissions"):
        find_files([str(tmp_path / "a.jsonl")])


def test_an_output_that_cannot_be_written(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(FIRST)

    def deny(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out" / "plan.json"))

    monkeypatch.setattr("data_prep.settings.write_atomically", deny)
    with pytest.raises(UserError, match=r"plan.json cannot be written \(permission denied\): choose another --output, or change its owner"):
        run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)


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
