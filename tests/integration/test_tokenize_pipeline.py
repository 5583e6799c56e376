"""From files to training data: tokenize, merge, verify, through the command line and as a library."""

import errno
import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from data_prep.indexed import read_indexed
from data_prep.merge import merge
from data_prep.settings import Shard
from data_prep.tokenizer import load_tokenizer
from data_prep.verify import verify
from poet_megatron.cli.main import main
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, make_texts, make_tokenizer, part, run, write_corpus


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), files=5, documents=3000, words=200)  # several blocks a file


@pytest.fixture(scope="module")
def parts(corpus, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "out"
    run(corpus[0], folder, tokenizer, valid_fraction=0.05)
    return folder


@pytest.fixture(scope="module")
def few_parts(tokenizer, tmp_path_factory):
    """Of 60 documents, a third of them for validation."""
    folder = tmp_path_factory.mktemp("few")
    run(write_corpus(folder, files=2, documents=30)[0], folder / "out", tokenizer, valid_fraction=0.33)
    return folder / "out"


def decoded(prefix, tokenizer):
    model, data = load_tokenizer(tokenizer), read_indexed(prefix)
    return [model.decode(data.document(i)[:-1]) for i in range(len(data))]


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(corpus, tokenizer, parts, tmp_path, workers):
    run(corpus[0], tmp_path / "out", tokenizer, workers=workers, valid_fraction=0.05)
    assert hashes(tmp_path / "out", ("",)) == hashes(parts, ("",))


def test_shards_give_the_same_parts(corpus, tokenizer, parts, tmp_path):
    with pytest.raises(
        UserError, match=r"lacks 3 of 5 parts: part-00000 \(.*c4-train.00000.json.gz\).*run poet-megatron prepare tokenize for all"
    ):
        run(corpus[0], tmp_path / "out", tokenizer, shard=Shard(1, 2), valid_fraction=0.05)
        merge([tmp_path / "out"], tmp_path / "merged")
    run(corpus[0], tmp_path / "out", tokenizer, shard=Shard(0, 2), valid_fraction=0.05)
    assert hashes(tmp_path / "out", ("",)) == hashes(parts, ("",))


def test_megatron_reads_each_document_as_the_tokenizer_made_it(corpus, tokenizer, parts):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    model = load_tokenizer(tokenizer)
    for number, texts in enumerate(corpus[1]):
        expected = [[*model.encode(text), model.eos_id] for text in texts]
        found = []
        for split in ("train", "valid"):
            data = IndexedDataset(str(parts / f"part-{number:05d}.{split}"))
            assert data.index.dtype == np.uint16 and len(data.document_indices) == len(data) + 1
            found += [data[i].tolist() for i in range(len(data))]
        assert sorted(found) == sorted(expected)


def test_merge_keeps_order_and_counts_and_training_opens_it(corpus, tokenizer, parts, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = merge([parts], tmp_path / "merged")
    texts = [text for content in corpus[1] for text in content]
    for split in ("train", "valid"):
        found = [text for number in range(5) for text in decoded(parts / f"part-{number:05d}.{split}", tokenizer)]
        assert decoded(tmp_path / "merged" / split, tokenizer) == found
        data, ours = IndexedDataset(str(tmp_path / "merged" / split)), read_indexed(tmp_path / "merged" / split)
        assert all(np.array_equal(data[i], ours.document(i)) for i in range(len(data)))
    assert 0.03 * len(texts) < manifest.splits["valid"].documents < 0.07 * len(texts)
    assert sum(counts.documents for counts in manifest.splits.values()) == manifest.details["records"] == len(texts)
    assert sum(counts.text_bytes for counts in manifest.splits.values()) == sum(len(text.encode()) for text in texts)
    opened = PreparedData.open(tmp_path / "merged", vocab_size=400, seq_length=64)
    assert opened.train_tokens == manifest.splits["train"].tokens
    assert verify(tmp_path / "merged", check_sources=True).problems == verify(parts, check_sources=True).problems == []
    assert "lengths.svg" in hashes(tmp_path / "merged", ("",))


def test_the_split_is_that_of_prepare(tokenizer, tmp_path):
    from data_prep.prepare import prepare

    texts = make_texts(300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "prepared", tokenizer=tokenizer, valid_fraction=0.1)
    run(tmp_path / "a.jsonl", tmp_path / "parts", tokenizer, valid_fraction=0.1)
    merge([tmp_path / "parts"], tmp_path / "merged")
    names = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model")
    assert hashes(tmp_path / "merged", names) == hashes(tmp_path / "prepared", names)


def test_special_tokens_are_explicit(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["the matrix", "of"]))
    model = load_tokenizer(tokenizer)
    for eos, bos in ((True, True), (False, True), (False, False)):
        run(tmp_path / "a.jsonl", tmp_path / f"{eos}{bos}", tokenizer, eos=eos, bos=bos)
        data = read_indexed(tmp_path / f"{eos}{bos}" / "part-00000.train")
        for i, text in enumerate(["the matrix", "of"]):
            assert data.document(i).tolist() == [1] * bos + model.encode(text) + [2] * eos
        assert verify(tmp_path / f"{eos}{bos}").problems == []


def test_duplicates_are_dropped_across_files_also_after_an_interruption(tokenizer, tmp_path):
    texts = make_texts(40)
    for number, content in enumerate([[*texts[:20], texts[3]], texts[10:30], [*texts[5:12], *texts[30:]]]):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(content))
    totals = run(tmp_path / "*.jsonl", tmp_path / "out", tokenizer, dedup=True)
    assert totals.filtered == {"duplicate": 1 + 10 + 7} and totals.documents["train"] == 40
    assert part(tmp_path / "out")["filtered"] == {"duplicate": {"count": 1, "first_records": [21]}}
    before = hashes(tmp_path / "out", ("",))
    (tmp_path / "out" / "part-00001.json").unlink()
    again = run(tmp_path / "*.jsonl", tmp_path / "out", tokenizer, dedup=True)
    assert hashes(tmp_path / "out", ("",)) == before and again.reused == 2
    with pytest.raises(UserError, match="with --dedup the number of shards must stay 1, is 2"):
        run(tmp_path / "*.jsonl", tmp_path / "out", tokenizer, dedup=True, shard=Shard(0, 2))


@pytest.mark.parametrize(
    ("name", "place", "problem"),
    [
        ("train.bin", 100, "bin_sha256 is"),
        ("train.idx", 40, "index says|outside|bin_bytes|tokens is"),
        ("valid.idx", -9, "document boundaries are not one per sequence"),
        ("tokenizer.model", 50, "sha256 differs"),
    ],
)
def test_verify_finds_a_changed_byte(parts, tmp_path, name, place, problem):
    merge([parts], tmp_path / "merged")
    content = bytearray((tmp_path / "merged" / name).read_bytes())
    content[place] ^= 1
    (tmp_path / "merged" / name).write_bytes(content)
    problems = "\n".join(verify(tmp_path / "merged").problems)
    assert any(word in problems for word in problem.split("|")), problems


def test_merge_finds_a_changed_part(corpus, tokenizer, tmp_path):
    run(corpus[0], tmp_path / "out", tokenizer, shard=Shard(0, 1))
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
    assert run(corpus[0], tmp_path / "out", tokenizer).reused == 4
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


def test_a_merge_does_not_go_into_a_folder_of_parts(parts):
    before = hashes(parts, ("",))
    with pytest.raises(UserError, match=r"holds parts \(plan.json\): choose another --output"):
        merge([parts], parts, force=True)
    assert hashes(parts, ("",)) == before


def test_tasks_that_begin_together_agree_on_one_plan(corpus, tokenizer, tmp_path, monkeypatch):
    """Another task writes its plan between our look and our own writing."""
    from data_prep import settings

    original = settings.create_atomically

    def late(path, content):
        path.write_bytes(content.replace(b'"valid_fraction": 0.05', b'"valid_fraction": %s' % share.encode()))
        return original(path, content)

    monkeypatch.setattr(settings, "create_atomically", late)
    share = "0.25"
    with pytest.raises(UserError, match=r"holds parts of another request \(valid_fraction was 0.25, is 0.05\)"):
        run(corpus[0], tmp_path / "other", tokenizer, valid_fraction=0.05)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["plan.json"]
    share = "0.05"
    assert run(corpus[0], tmp_path / "same", tokenizer, shard=Shard(4, 5), valid_fraction=0.05).parts == 1


def test_a_file_is_created_once(tmp_path, monkeypatch):
    from data_prep.files import create_atomically

    assert create_atomically(tmp_path / "a", b"first") and not create_atomically(tmp_path / "a", b"second")

    def no_links(*names):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert create_atomically(tmp_path / "b", b"first") and not create_atomically(tmp_path / "b", b"second")
    assert hashes(tmp_path, ("",)).keys() == {"a", "b"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"first"


def test_files_of_one_name_and_size_are_told_apart_by_their_folders(tokenizer, tmp_path):
    for name in ("x", "y"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jsonl").write_bytes(jsonl([f"text of {name}"]))
    files = [str(tmp_path / "in" / name / "a.jsonl") for name in ("x", "y")]
    common = ["prepare", "tokenize", "--tokenizer", str(tokenizer), "--workers", "1", "--output", str(tmp_path / "out"), "--input"]
    assert main([*common, *files, "--shard", "0/2"]) == 0
    assert main([*common, *reversed(files), "--shard", "1/2"]) == 2  # it would make a part of x again, and none of y
    (tmp_path / "in").rename(tmp_path / "moved")
    assert main([*common, *(path.replace("/in/", "/moved/") for path in files), "--shard", "1/2"]) == 0
    assert [decoded(tmp_path / "out" / f"part-{number:05d}.train", tokenizer) for number in (0, 1)] == [["text of x"], ["text of y"]]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_hashes_that_are_lost_make_their_part_anew(tokenizer, tmp_path, damage):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(make_texts(20 + number)))
    run(tmp_path / "*.jsonl", tmp_path / "out", tokenizer, dedup=True)
    before = hashes(tmp_path / "out", ("",))
    damage(tmp_path / "out" / "part-00000.hashes")
    (tmp_path / "out" / "part-00001.json").unlink()
    assert run(tmp_path / "*.jsonl", tmp_path / "out", tokenizer, dedup=True).reused == 1
    assert hashes(tmp_path / "out", ("",)) == before


def test_a_vocabulary_over_65535_through_the_whole_pipeline(tmp_path):
    """int32 in every file, read by Megatron, merged and verified."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {name: number for number, name in enumerate([*letters, "</s>", *(f"unused {i}" for i in range(70_000)), "th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("t", "h")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    texts = ["the", "th" * 50, "\u65e5\n"]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(tmp_path / "a.jsonl", tmp_path / "out", tmp_path / "tokenizer.json")
    manifest = merge([tmp_path / "out"], tmp_path / "merged")
    assert manifest.vocab_size == 256 + 1 + 70_000 + 1
    data = IndexedDataset(str(tmp_path / "merged" / "train"))
    expected = [[*tokenizer.encode(text, add_special_tokens=False).ids, 256] for text in texts]
    assert data.index.dtype == np.int32 and [data[i].tolist() for i in range(len(data))] == expected
    assert expected[1] == [manifest.vocab_size - 1] * 50 + [256]
    assert verify(tmp_path / "merged").problems == verify(tmp_path / "out").problems == []


def test_two_folders_of_parts_and_the_command_line(corpus, tokenizer, tmp_path, capsys):
    (tmp_path / "held.json.gz").write_bytes(gzip.compress(jsonl(make_texts(30, seed=99)) + b"broken\n"))
    common = ["--tokenizer", str(tokenizer), "--workers", "1"]
    for name, source, fraction in (("a", corpus[0], "0"), ("b", str(tmp_path / "held.json.gz"), "1")):
        assert (
            main(["prepare", "tokenize", "--input", source, "--output", str(tmp_path / name), "--valid-fraction", fraction, *common]) == 0
        )
    assert main(["prepare", "merge", "--parts", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "train: 15,000 documents" in out and "valid: 30 documents" in out and "skipped: 1 records (invalid JSON)" in out
    assert f"use data.path={tmp_path / 'm'} and model.vocab_size=400" in out
    assert main(["prepare", "verify", str(tmp_path / "m"), "--samples", "2"]) == 0
    assert "0 problems" in (out := capsys.readouterr().out) and out.count(" tokens: '") == 2
    (tmp_path / "m" / "valid.bin").write_bytes(b"")
    assert main(["prepare", "verify", str(tmp_path / "m")]) == 1
    assert "problem:" in capsys.readouterr().err
    assert main(["prepare", "merge", "--parts", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 2
    assert "holds manifest.json: choose another --output, or overwrite it with --force" in capsys.readouterr().err


def test_train_tokenizer_then_tokenize(corpus, tmp_path, capsys):
    model = tmp_path / "new" / "unigram.model"
    words = ["--input", corpus[0], "--vocab-size", "310", "--model", "unigram", "--max-mb", "1", "--output", str(model)]
    assert main(["prepare", "train-tokenizer", *words]) == 0
    assert "unigram, 310 tokens" in capsys.readouterr().out
    assert load_tokenizer(model).decode(load_tokenizer(model).encode("\n a\n\n")) == "\n a\n\n"


def test_prepare_without_a_step_needs_an_output(capsys):
    assert main(["prepare"]) == 2
    assert "poet-megatron prepare needs --output DIR, or a step: tokenize, merge, verify or train-tokenizer" in capsys.readouterr().err


def test_the_module_is_the_command():
    shown = subprocess.run([sys.executable, "-m", "data_prep.tokenize_c4", "--help"], capture_output=True, text=True, check=True).stdout
    assert "poet-megatron prepare tokenize" in shown and "--shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" in shown


def test_nothing_here_imports_torch():
    names = "tokenizing, merge, verify, hub, worker, train_texts"
    code = f"import sys; from data_prep import {names}; print([name for name in ('torch', 'megatron', 'datasets') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_dataset_through_the_datasets_library(tokenizer, tmp_path, monkeypatch):
    from data_prep.hub import find_shards
    from data_prep.settings import Settings
    from data_prep.tokenizing import tokenize

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = [make_texts(30, seed) for seed in range(3)]
    for seed, content in enumerate(texts):
        (tmp_path / f"{seed}.jsonl").write_bytes(jsonl([*content, ""]))
    shards = find_shards("json", files=[str(tmp_path / f"{seed}.jsonl") for seed in range(3)])
    assert len(shards) == 3 and shards[1].name == "hf://json/default/train@main#1"
    settings = Settings(tokenizer=str(tokenizer), valid_fraction=0.0)
    tokenize(shards, tmp_path / "out", settings, workers=1)
    for seed, content in enumerate(texts):
        assert decoded(tmp_path / "out" / f"part-{seed:05d}.train", tokenizer) == content
        assert part(tmp_path / "out", seed)["skipped"] == {"empty text": {"count": 1, "first_records": [31]}}
    rows = shards[0].retry.rows(lambda done: iter(shards[0].dataset.skip(done)), "x")
    assert json.dumps([row["text"] for row in rows]) == json.dumps([*texts[0], ""])


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
def test_verify_looks_at_every_document(tokenizer, tmp_path, monkeypatch, scan):
    """Files that agree with their manifest and are wrong all the same, as another program could have made them."""
    from data_prep import verify as module
    from data_prep.indexed import IndexedWriter

    monkeypatch.setattr(module, "SCAN", scan)
    (tmp_path / "a.jsonl").write_bytes(jsonl(["the matrix", "of", "the"]))
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer)
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


def test_a_long_document_among_short_ones(tokenizer, tmp_path):
    texts = [*make_texts(2000), "a long document " * 300_000, *make_texts(2000, seed=1)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, workers=2, max_document_bytes=8 << 20)
    assert decoded(tmp_path / "out" / "part-00000.train", tokenizer) == texts
