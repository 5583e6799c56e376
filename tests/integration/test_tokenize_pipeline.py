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
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, make_texts, part, run

pytest_plugins = ("tokenize_fixtures",)


def decoded(prefix, tokenizer):
    model, data = load_tokenizer(tokenizer), read_indexed(prefix)
    return [model.decode(data.document(i)[:-1]) for i in range(len(data))]


@pytest.mark.parametrize("workers", [2, 4])
def test_any_number_of_workers_gives_the_same_bytes(c4_files, c4_tokenizer, c4_parts, tmp_path, workers):
    run(c4_files[0], tmp_path / "out", c4_tokenizer, workers=workers, valid_fraction=0.05)
    assert hashes(tmp_path / "out", ("",)) == hashes(c4_parts, ("",))


def test_shards_give_the_same_parts(c4_files, c4_tokenizer, c4_parts, tmp_path):
    with pytest.raises(
        UserError, match=r"lacks 3 of 5 parts: part-00000 \(.*c4-train.00000.json.gz\).*run poet-megatron prepare tokenize for all"
    ):
        run(c4_files[0], tmp_path / "out", c4_tokenizer, shard=Shard(1, 2), valid_fraction=0.05)
        merge([tmp_path / "out"], tmp_path / "merged")
    run(c4_files[0], tmp_path / "out", c4_tokenizer, shard=Shard(0, 2), valid_fraction=0.05)
    assert hashes(tmp_path / "out", ("",)) == hashes(c4_parts, ("",))


def test_megatron_reads_each_document_as_the_tokenizer_made_it(c4_files, c4_tokenizer, c4_parts):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    model = load_tokenizer(c4_tokenizer)
    for number, texts in enumerate(c4_files[1]):
        expected = [[*model.encode(text), model.eos_id] for text in texts]
        found = []
        for split in ("train", "valid"):
            data = IndexedDataset(str(c4_parts / f"part-{number:05d}.{split}"))
            assert data.index.dtype == np.uint16 and len(data.document_indices) == len(data) + 1
            found += [data[i].tolist() for i in range(len(data))]
        assert sorted(found) == sorted(expected)


def test_merge_keeps_order_and_counts_and_training_opens_it(c4_files, c4_tokenizer, c4_parts, tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    manifest = merge([c4_parts], tmp_path / "merged")
    texts = [text for content in c4_files[1] for text in content]
    for split in ("train", "valid"):
        found = [text for number in range(5) for text in decoded(c4_parts / f"part-{number:05d}.{split}", c4_tokenizer)]
        assert decoded(tmp_path / "merged" / split, c4_tokenizer) == found
        data, ours = IndexedDataset(str(tmp_path / "merged" / split)), read_indexed(tmp_path / "merged" / split)
        assert all(np.array_equal(data[i], ours.document(i)) for i in range(len(data)))
    assert 0.03 * len(texts) < manifest.splits["valid"].documents < 0.07 * len(texts)
    assert sum(counts.documents for counts in manifest.splits.values()) == manifest.details["records"] == len(texts)
    assert sum(counts.text_bytes for counts in manifest.splits.values()) == sum(len(text.encode()) for text in texts)
    opened = PreparedData.open(tmp_path / "merged", vocab_size=400, seq_length=64)
    assert opened.train_tokens == manifest.splits["train"].tokens
    assert verify(tmp_path / "merged", check_sources=True).problems == verify(c4_parts, check_sources=True).problems == []
    assert "lengths.svg" in hashes(tmp_path / "merged", ("",))


def test_the_split_is_that_of_prepare(c4_tokenizer, tmp_path):
    from data_prep.prepare import prepare

    texts = make_texts(300)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "prepared", tokenizer=c4_tokenizer, valid_fraction=0.1)
    run(tmp_path / "a.jsonl", tmp_path / "parts", c4_tokenizer, valid_fraction=0.1)
    merge([tmp_path / "parts"], tmp_path / "merged")
    names = ("train.bin", "train.idx", "valid.bin", "valid.idx", "tokenizer.model")
    assert hashes(tmp_path / "merged", names) == hashes(tmp_path / "prepared", names)


def test_special_tokens_are_explicit(c4_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(["the matrix", "of"]))
    model = load_tokenizer(c4_tokenizer)
    for eos, bos in ((True, True), (False, True), (False, False)):
        run(tmp_path / "a.jsonl", tmp_path / f"{eos}{bos}", c4_tokenizer, eos=eos, bos=bos)
        data = read_indexed(tmp_path / f"{eos}{bos}" / "part-00000.train")
        for i, text in enumerate(["the matrix", "of"]):
            assert data.document(i).tolist() == [1] * bos + model.encode(text) + [2] * eos
        assert verify(tmp_path / f"{eos}{bos}").problems == []


def test_duplicates_are_dropped_across_files_also_after_an_interruption(c4_tokenizer, tmp_path):
    texts = make_texts(40)
    for number, content in enumerate([[*texts[:20], texts[3]], texts[10:30], [*texts[5:12], *texts[30:]]]):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(content))
    totals = run(tmp_path / "*.jsonl", tmp_path / "out", c4_tokenizer, dedup=True)
    assert totals.filtered == {"duplicate": 1 + 10 + 7} and totals.documents["train"] == 40
    assert part(tmp_path / "out")["filtered"] == {"duplicate": {"count": 1, "first_records": [21]}}
    before = hashes(tmp_path / "out", ("",))
    (tmp_path / "out" / "part-00001.json").unlink()
    again = run(tmp_path / "*.jsonl", tmp_path / "out", c4_tokenizer, dedup=True)
    assert hashes(tmp_path / "out", ("",)) == before and again.reused == 2
    with pytest.raises(UserError, match="with --dedup the number of shards must stay 1, is 2"):
        run(tmp_path / "*.jsonl", tmp_path / "out", c4_tokenizer, dedup=True, shard=Shard(0, 2))


def test_tasks_that_begin_together_agree_on_one_plan(c4_files, c4_tokenizer, tmp_path, monkeypatch):
    """Another task writes its plan between our look and our own writing."""
    from data_prep import settings

    original = settings.create_atomically

    def late(path, content):
        path.write_bytes(content.replace(b'"valid_fraction": 0.05', b'"valid_fraction": %s' % share.encode()))
        return original(path, content)

    monkeypatch.setattr(settings, "create_atomically", late)
    share = "0.25"
    with pytest.raises(UserError, match=r"holds parts of another request \(valid_fraction was 0.25, is 0.05\)"):
        run(c4_files[0], tmp_path / "other", c4_tokenizer, valid_fraction=0.05)
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["plan.json"]
    share = "0.05"
    assert run(c4_files[0], tmp_path / "same", c4_tokenizer, shard=Shard(4, 5), valid_fraction=0.05).parts == 1


def test_a_file_is_created_once(tmp_path, monkeypatch):
    from data_prep.files import create_atomically

    assert create_atomically(tmp_path / "a", b"first") and not create_atomically(tmp_path / "a", b"second")

    def no_links(*names):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert create_atomically(tmp_path / "b", b"first") and not create_atomically(tmp_path / "b", b"second")
    assert hashes(tmp_path, ("",)).keys() == {"a", "b"}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == b"first"


def test_files_of_one_name_and_size_are_told_apart_by_their_folders(c4_tokenizer, tmp_path):
    for name in ("x", "y"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.jsonl").write_bytes(jsonl([f"text of {name}"]))
    files = [str(tmp_path / "in" / name / "a.jsonl") for name in ("x", "y")]
    common = ["prepare", "tokenize", "--tokenizer", str(c4_tokenizer), "--workers", "1", "--output", str(tmp_path / "out"), "--input"]
    assert main([*common, *files, "--shard", "0/2"]) == 0
    assert main([*common, *reversed(files), "--shard", "1/2"]) == 2  # it would make a part of x again, and none of y
    (tmp_path / "in").rename(tmp_path / "moved")
    assert main([*common, *(path.replace("/in/", "/moved/") for path in files), "--shard", "1/2"]) == 0
    assert [decoded(tmp_path / "out" / f"part-{number:05d}.train", c4_tokenizer) for number in (0, 1)] == [["text of x"], ["text of y"]]


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-8])])
def test_hashes_that_are_lost_make_their_part_anew(c4_tokenizer, tmp_path, damage):
    for number in range(3):
        (tmp_path / f"{number}.jsonl").write_bytes(jsonl(make_texts(20 + number)))
    run(tmp_path / "*.jsonl", tmp_path / "out", c4_tokenizer, dedup=True)
    before = hashes(tmp_path / "out", ("",))
    damage(tmp_path / "out" / "part-00000.hashes")
    (tmp_path / "out" / "part-00001.json").unlink()
    assert run(tmp_path / "*.jsonl", tmp_path / "out", c4_tokenizer, dedup=True).reused == 1
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


def test_two_folders_of_parts_and_the_command_line(c4_files, c4_tokenizer, tmp_path, capsys):
    (tmp_path / "held.json.gz").write_bytes(gzip.compress(jsonl(make_texts(30, seed=99)) + b"broken\n"))
    common = ["--tokenizer", str(c4_tokenizer), "--workers", "1"]
    for name, source, fraction in (("a", c4_files[0], "0"), ("b", str(tmp_path / "held.json.gz"), "1")):
        assert (
            main(["prepare", "tokenize", "--input", source, "--output", str(tmp_path / name), "--valid-fraction", fraction, *common]) == 0
        )
    assert main(["prepare", "merge", "--parts", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "m")]) == 0
    out = capsys.readouterr().out
    assert "train: 15,000 documents" in out and "valid: 30 documents" in out and "skipped: 1 records (invalid JSON)" in out
    assert f"next: poet-megatron prepare merge --parts {tmp_path / 'b'} --output FOLDER" in out
    assert f"use data.path={tmp_path / 'm'} and model.vocab_size=400" in out
    assert main(["prepare", "verify", str(tmp_path / "m"), "--samples", "2"]) == 0
    assert "0 problems" in (out := capsys.readouterr().out) and out.count(" tokens: '") == 2
    (tmp_path / "m" / "valid.bin").write_bytes(b"")
    assert main(["prepare", "verify", str(tmp_path / "m")]) == 1
    assert "problem:" in capsys.readouterr().err
    assert main(["prepare", "merge", "--parts", str(tmp_path / "a"), "--output", str(tmp_path / "m")]) == 2
    assert "holds manifest.json: choose another --output, or overwrite it with --force" in capsys.readouterr().err


def test_train_tokenizer_then_tokenize(c4_files, tmp_path, capsys):
    model = tmp_path / "new" / "unigram.model"
    words = ["--input", c4_files[0], "--vocab-size", "310", "--model", "unigram", "--max-mb", "1", "--output", str(model)]
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


def test_a_dataset_through_the_datasets_library(c4_tokenizer, tmp_path, monkeypatch):
    from data_prep.hub import find_shards
    from data_prep.settings import Settings
    from data_prep.tokenizing import tokenize

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    texts = [make_texts(30, seed) for seed in range(3)]
    for seed, content in enumerate(texts):
        (tmp_path / f"{seed}.jsonl").write_bytes(jsonl([*content, ""]))
    shards = find_shards("json", files=[str(tmp_path / f"{seed}.jsonl") for seed in range(3)])
    assert len(shards) == 3 and shards[1].name == "hf://json/default/train@main#1"
    settings = Settings(tokenizer=str(c4_tokenizer), valid_fraction=0.0)
    tokenize(shards, tmp_path / "out", settings, workers=1)
    for seed, content in enumerate(texts):
        assert decoded(tmp_path / "out" / f"part-{seed:05d}.train", c4_tokenizer) == content
        assert part(tmp_path / "out", seed)["skipped"] == {"empty text": {"count": 1, "first_records": [31]}}
    rows = shards[0].retry.rows(lambda done: iter(shards[0].dataset.skip(done)), "x")
    assert json.dumps([row["text"] for row in rows]) == json.dumps([*texts[0], ""])


def test_a_long_document_among_short_ones(c4_tokenizer, tmp_path):
    texts = [*make_texts(2000), "a long document " * 300_000, *make_texts(2000, seed=1)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts))
    run(tmp_path / "a.jsonl", tmp_path / "out", c4_tokenizer, workers=2, max_document_bytes=8 << 20)
    assert decoded(tmp_path / "out" / "part-00000.train", c4_tokenizer) == texts
