import json
import random
import subprocess
import sys

import pytest

from data_prep import prepare as prepare_module
from data_prep.indexed import read_indexed
from data_prep.prepare import prepare
from data_prep.tokenizer import load_tokenizer, train_tokenizer
from poet_megatron.errors import UserError

WORDS = ["the", "of", "matrix", "orthogonal", "training", "weight", "spectrum", "rotate", "permute", "block", "neuron", "gradient"]


def make_texts(count, seed=0):
    source = random.Random(seed)
    return [f"{i} " + " ".join(source.choices(WORDS, k=30)) + "\n" for i in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "source.jsonl", [*make_texts(200), "", "a\ud800"])


def run(source, output, **settings):
    return prepare([source], output, **{"vocab_size": 350, "valid_fraction": 0.1, **settings})


def all_texts(output):
    tokenizer = load_tokenizer(output / "tokenizer.model")
    found = {}
    for split in ("train", "valid"):
        data = read_indexed(output / split)
        assert all(data.document(i)[-1] == 2 for i in range(len(data)))
        found[split] = [tokenizer.decode(data.document(i)[:-1]) for i in range(len(data))]
    return found


def test_every_document_lands_in_one_split_unchanged(source, tmp_path):
    manifest = run(source, tmp_path / "out")
    found = all_texts(tmp_path / "out")
    assert sorted(found["train"] + found["valid"]) == sorted(make_texts(200))
    assert 5 <= len(found["valid"]) <= 40
    assert manifest.skipped == {"blank text": 1, "lone surrogate": 1}
    for split, counts in manifest.splits.items():
        assert counts.documents == len(found[split])
        assert counts.text_bytes == sum(len(text.encode()) for text in found[split])
        assert counts.tokens == len(read_indexed(tmp_path / "out" / split).tokens)


def test_split_depends_on_the_text_alone(source, tmp_path):
    run(source, tmp_path / "a")
    shuffled = make_texts(200)
    random.Random(3).shuffle(shuffled)
    run(write_jsonl(tmp_path / "shuffled.jsonl", shuffled), tmp_path / "b", vocab_size=320)
    assert set(all_texts(tmp_path / "a")["valid"]) == set(all_texts(tmp_path / "b")["valid"])


def test_vocabulary_is_learned_from_the_training_split(source, tmp_path):
    manifest = run(source, tmp_path / "out")
    train = all_texts(tmp_path / "out")["train"]
    assert train_tokenizer(train, tmp_path / "t.model", 350).sha256 == manifest.tokenizer_sha256
    assert train_tokenizer(make_texts(200), tmp_path / "t.model", 350).sha256 != manifest.tokenizer_sha256


def test_same_request_same_bytes(source, tmp_path, monkeypatch):
    run(source, tmp_path / "a")
    monkeypatch.setattr(prepare_module, "BATCH_DOCUMENTS", 7)
    run(source, tmp_path / "b", threads=2)
    for name in ("tokenizer.model", "train.bin", "train.idx", "valid.bin", "valid.idx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_complete_folder_is_reused(source, tmp_path, capsys):
    first = run(source, tmp_path / "out")
    stamp = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    assert run(source, tmp_path / "out") == first
    assert (tmp_path / "out" / "train.bin").stat().st_mtime_ns == stamp
    assert "reusing" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["train.bin", "valid.idx", "tokenizer.model", "cut", "unfinished"])
def test_an_incomplete_folder_is_rebuilt(source, tmp_path, capsys, monkeypatch, damage):
    out = tmp_path / "out"
    first = run(source, out)
    whole = (out / "train.bin").read_bytes()
    if damage == "cut":
        (out / "train.bin").write_bytes(whole[:-2])
    elif damage == "unfinished":
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prepare_module.SplitWriter, "_check", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            run(source, out, force=True)
    else:
        (out / damage).unlink()
    assert run(source, out) == first
    assert "rebuilding" in capsys.readouterr().err
    assert (out / "train.bin").read_bytes() == whole and not list(out.glob(".*"))


def test_other_settings_are_an_error_until_forced(source, tmp_path):
    out = tmp_path / "out"
    run(source, out)
    other = write_jsonl(tmp_path / "other.jsonl", make_texts(50, seed=5))
    train_tokenizer(make_texts(100, seed=9), tmp_path / "given.model", 350)
    cases = [
        ({"vocab_size": 320}, "vocab_size: it was made with 350, not with 320"),
        ({"valid_fraction": 0.3}, "valid_fraction: it was made with 0.1, not with 0.3"),
        ({"valid_inputs": [other]}, r"valid_inputs: it was made from nothing, not from .*other.jsonl"),
        ({"tokenizer": tmp_path / "given.model"}, "tokenizer_sha256: it was made with none, not with"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            run(source, out, **settings)
        assert "--force" in str(caught.value)
    with pytest.raises(UserError, match=r"inputs: it was made from .*source.jsonl .*, not from .*other.jsonl"):
        run(other, out)
    assert run(other, out, vocab_size=320, force=True).vocab_size == 320
    assert load_tokenizer(out / "tokenizer.model").vocab_size == 320


def test_a_changed_source_is_noticed_and_a_moved_one_is_not(source, tmp_path, capsys):
    run(source, tmp_path / "out")
    moved = tmp_path / "moved.jsonl"
    (tmp_path / "source.jsonl").rename(moved)
    run(str(moved), tmp_path / "out")
    assert "reusing" in capsys.readouterr().err
    write_jsonl(moved, make_texts(199))
    with pytest.raises(UserError, match="holds other data"):
        run(str(moved), tmp_path / "out")


def test_validation_from_files_of_its_own(source, tmp_path):
    valid = write_jsonl(tmp_path / "valid.jsonl", make_texts(20, seed=7))
    manifest = run(source, tmp_path / "out", valid_inputs=[valid])
    assert all_texts(tmp_path / "out") == {"train": make_texts(200), "valid": make_texts(20, seed=7)}
    assert manifest.request.valid_fraction == 0 and len(manifest.request.valid_inputs) == 1
    with pytest.raises(UserError, match="both a training and a validation input"):
        run(source, tmp_path / "both", valid_inputs=[source])


def test_a_given_tokenizer_is_used(source, tmp_path):
    given = train_tokenizer(make_texts(100, seed=9), tmp_path / "given.model", 310)
    manifest = run(source, tmp_path / "out", tokenizer=tmp_path / "given.model", vocab_size=None)
    assert (manifest.tokenizer_sha256, manifest.vocab_size) == (given.sha256, 310)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == given.model
    with pytest.raises(UserError, match="vocab_size is 350, but tokenizer .*given.model has 310"):
        run(source, tmp_path / "out", tokenizer=tmp_path / "given.model")


def test_requests_that_cannot_work(source, tmp_path):
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="valid_fraction is .*; it must be between 0 and 1"):
            run(source, tmp_path / "out", valid_fraction=fraction)
    with pytest.raises(UserError, match="no document fell into the valid split"):
        run(source, tmp_path / "out", valid_fraction=1e-9)
    assert not list((tmp_path / "out").glob("*.bin"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file: name a folder"):
        run(source, tmp_path / "file")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "train.bin").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds train.bin but no manifest.json"):
        run(source, tmp_path / "foreign")
    assert (tmp_path / "foreign" / "train.bin").read_bytes() == b"precious"


def test_manifest_records_sources_and_versions(source, tmp_path):
    run(source, tmp_path / "out", command=["poet-megatron", "prepare"])
    content = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert content["complete"] and content["command"] == ["poet-megatron", "prepare"]
    assert content["request"]["inputs"][0]["name"] == source and len(content["request"]["inputs"][0]["sha256"]) == 64
    assert {"python", "sentencepiece", "numpy", "poet-megatron"} == set(content["versions"])
    content["format"] = 99
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="format 99; this release reads formats up to 1"):
        run(source, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="is not a manifest"):
        run(source, tmp_path / "out")


def test_embedded_corpus_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "embedded_documents", lambda: iter(make_texts(100)))
    manifest = prepare(None, tmp_path / "out", vocab_size=350, valid_fraction=0.2)
    assert sum(counts.documents for counts in manifest.splits.values()) == 100
    assert "CPython" in manifest.request.inputs[0].name


def test_command_line_and_no_torch(source, tmp_path):
    code = (
        "import argparse, sys; from poet_megatron.cli import prepare as command;"
        "parser = argparse.ArgumentParser(); command.add_parser(parser.add_subparsers());"
        "args = parser.parse_args(sys.argv[1:]); status = command.run(args);"
        "sys.exit(status or ('torch' in sys.modules))"
    )
    words = ["prepare", "--output", str(tmp_path / "out"), "--input", source, "--vocab-size", "350", "--valid-fraction", "0.1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "model.vocab_size=350" in done.stdout and "skipped: 1 documents (blank text)" in done.stdout
    assert "MB/s" in done.stderr
    shown = subprocess.run([sys.executable, "-c", code, "prepare", "--help"], capture_output=True, text=True).stdout
    assert "examples:" in shown and "--valid-input" in shown
