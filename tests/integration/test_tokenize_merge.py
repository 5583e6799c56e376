"""Merging parts, and verifying parts and what was merged: damage of every kind is found, a merge that ends early is repeated."""

import json

import numpy as np
import pytest

from data_prep.merge import merge
from data_prep.settings import Shard
from data_prep.verify import verify
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, run

pytest_plugins = ("tokenize_fixtures",)


@pytest.mark.parametrize(
    ("name", "place", "problem"),
    [
        ("train.bin", 100, "bin_sha256 is"),
        ("train.idx", 40, "index says|outside|bin_bytes|tokens is"),
        ("valid.idx", -9, "document boundaries are not one per sequence"),
        ("tokenizer.model", 50, "sha256 differs"),
    ],
)
def test_verify_finds_a_changed_byte(c4_parts, tmp_path, name, place, problem):
    merge([c4_parts], tmp_path / "merged")
    content = bytearray((tmp_path / "merged" / name).read_bytes())
    content[place] ^= 1
    (tmp_path / "merged" / name).write_bytes(content)
    problems = "\n".join(verify(tmp_path / "merged").problems)
    assert any(word in problems for word in problem.split("|")), problems


def test_merge_finds_a_changed_part(c4_files, c4_tokenizer, tmp_path):
    run(c4_files[0], tmp_path / "out", c4_tokenizer, shard=Shard(0, 1))
    path = tmp_path / "out" / "part-00002.train.bin"
    content = bytearray(path.read_bytes())
    content[7] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00002.train.bin is damaged \(its hash differs"):
        merge([tmp_path / "out"], tmp_path / "merged")
    assert [found.name for found in (tmp_path / "merged").iterdir()] == ["manifest.json"]
    with pytest.raises(UserError, match=r"is incomplete \(an earlier prepare did not finish\)"):
        PreparedData.open(tmp_path / "merged", vocab_size=400, seq_length=64)
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=r"part-00002.train.bin has \d+ bytes instead of \d+: run poet-megatron prepare tokenize again"):
        merge([tmp_path / "out"], tmp_path / "merged")
    assert run(c4_files[0], tmp_path / "out", c4_tokenizer).reused == 4
    index = tmp_path / "out" / "part-00001.train.idx"
    content = bytearray(index.read_bytes())
    content[34], content[38] = content[38], content[34]  # two lengths: the sum stays
    assert index.read_bytes() != content
    whole = index.read_bytes()
    index.write_bytes(content)
    with pytest.raises(UserError, match=r"part-00001.train.idx is damaged \(its hash differs"):
        merge([tmp_path / "out"], tmp_path / "merged")
    index.write_bytes(whole)
    merge([tmp_path / "out"], tmp_path / "merged")  # what failed is done again, no --force needed
    with pytest.raises(UserError, match=r"holds manifest.json: choose another --output, or overwrite it with --force"):
        merge([tmp_path / "out"], tmp_path / "merged")


@pytest.mark.parametrize("published", range(6))
def test_a_merge_that_is_killed_is_repeated_to_the_same_bytes(few_parts, tmp_path, monkeypatch, published):
    """It ends after some of its files, each time without any tidying up."""
    from data_prep import files

    expected = tmp_path / "expected"
    merge([few_parts], expected)
    original, names = files.publish, []

    class Killed(BaseException):
        pass

    def publish(stream, temporary, path):
        if len(names) > published:
            raise Killed
        names.append(path.name)
        original(stream, temporary, path)

    monkeypatch.setattr(files, "publish", publish)
    with pytest.raises(Killed):
        merge([few_parts], tmp_path / "merged")
    monkeypatch.undo()
    assert names == ["manifest.json", "train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model", "lengths.svg"][: published + 1]
    (tmp_path / "merged" / ".train.bin.node.1.tmp").write_bytes(b"half")
    with pytest.raises(UserError, match="is incomplete"):
        PreparedData.open(tmp_path / "merged", vocab_size=400, seq_length=64)
    with pytest.raises(UserError, match="is incomplete: run the command that makes it again"):
        verify(tmp_path / "merged")
    merge([few_parts], tmp_path / "merged")
    assert hashes(tmp_path / "merged", ("",)) == hashes(expected, ("",))


def test_a_merge_does_not_go_into_a_folder_of_parts(c4_parts):
    before = hashes(c4_parts, ("",))
    with pytest.raises(UserError, match=r"holds parts \(plan.json\): choose another --output"):
        merge([c4_parts], c4_parts, force=True)
    assert hashes(c4_parts, ("",)) == before


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("scan", [1 << 22, 7])
@pytest.mark.parametrize(
    ("field", "problem"),
    [(0, "index says"), (1, "byte pointers do not follow from the lengths"), (2, "boundaries are not one per sequence")],
)
def test_verify_reads_every_field_of_the_index(few_parts, tmp_path, monkeypatch, field, problem, scan, place):
    from data_prep import verify as module

    monkeypatch.setattr(module, "SCAN", scan)
    manifest = merge([few_parts], tmp_path / "merged")
    assert verify(tmp_path / "merged").problems == []
    path, count = tmp_path / "merged" / "valid.idx", manifest.splits["valid"].documents
    content = bytearray(path.read_bytes())
    begin, size, entries = [(34, 4, count), (34 + 4 * count, 8, count), (34 + 12 * count, 8, count + 1)][field]  # after the header
    content[begin + size * (0 if place == "first" else entries - 1)] ^= 1
    path.write_bytes(content)
    problems = "\n".join(verify(tmp_path / "merged").problems)
    assert problem in problems and (field == 0 or "valid: idx_sha256 is" in problems), problems


@pytest.mark.parametrize("scan", [1 << 22, 3])
def test_verify_looks_at_every_document(c4_tokenizer, tmp_path, monkeypatch, scan):
    """Files that agree with their manifest and are wrong all the same, as another program could have made them."""
    from data_prep import verify as module
    from data_prep.indexed import IndexedWriter

    monkeypatch.setattr(module, "SCAN", scan)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["the matrix", "of", "the"]))
    run(tmp_path / "a.jsonl", tmp_path / "out", c4_tokenizer)
    manifest_path = tmp_path / "out" / "part-00000.json"
    manifest = json.loads(manifest_path.read_text())
    for last, problem in (([9, 9], "a document does not end in the end-of-sequence token 2"), ([400, 2], "outside the vocabulary of 400")):
        with IndexedWriter(tmp_path / "out" / "part-00000.train", np.uint16) as writer:
            for ids in [[5, 2], [7, 7, 7, 2], last]:
                writer.add(ids)
        counts = {"documents": 3, "tokens": 8, "bin_sha256": writer.sha256, "idx_sha256": writer.index_sha256}
        counts |= {f"{kind}_bytes": (tmp_path / "out" / f"part-00000.train.{kind}").stat().st_size for kind in ("bin", "idx")}
        manifest["splits"]["train"] |= counts
        manifest_path.write_text(json.dumps(manifest))
        (found,) = verify(tmp_path / "out").problems
        assert problem in found
