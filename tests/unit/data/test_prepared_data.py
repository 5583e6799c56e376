import json

import pytest

from data_prep.prepare import prepare
from data_prep.tokenizer import train_tokenizer
from poet_megatron.data.prepared import PreparedData
from poet_megatron.errors import UserError


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": f"document number {i} about spectra and rotations"}) + "\n" for i in range(60)))
    prepare([str(source)], tmp_path / "out", vocab_size=310, valid_fraction=0.2)
    return tmp_path / "out"


def test_open(folder):
    data = PreparedData.open(folder, 310, 16)
    assert (data.vocab_size, data.eos_id) == (310, 2)
    assert data.train_tokens * 2 == folder.joinpath("train.bin").stat().st_size
    assert data.valid_tokens * 2 == folder.joinpath("valid.bin").stat().st_size
    assert [data.train_prefix, data.valid_prefix, data.tokenizer_path] == [folder / "train", folder / "valid", folder / "tokenizer.model"]


def test_a_model_of_another_vocabulary_is_refused(folder):
    with pytest.raises(UserError) as caught:
        PreparedData.open(folder, 32100, 16)
    files = [str(folder / "train.bin"), str(folder / "tokenizer.model")]
    for part in ["wrong tokenizer for the data", "32100", "310", "set model.vocab_size", *files]:
        assert part in str(caught.value)


def test_a_swapped_tokenizer_is_refused(folder):
    train_tokenizer(
        [f"other {i} texts of several words and letters: {chr(97 + i % 26) * 2}" for i in range(200)], folder / "tokenizer.model", 300
    )
    with pytest.raises(UserError, match="wrong tokenizer for the data: .*tokenizer.model is not the one that made .*train.bin"):
        PreparedData.open(folder, 310, 16)


def test_too_little_text_for_one_sequence(folder):
    tokens = PreparedData.open(folder, 310, 16).train_tokens
    assert PreparedData.open(folder, 310, tokens - 1)
    with pytest.raises(UserError, match=f"has {tokens} tokens; a sequence of model.seq_length {tokens} takes {tokens + 1}"):
        PreparedData.open(folder, 310, tokens)


def test_missing_and_incomplete_folders(folder, tmp_path):
    with pytest.raises(UserError, match="data.path is empty"):
        PreparedData.open("", 310, 16)
    with pytest.raises(UserError, match="manifest.json does not exist: make the data with poet-megatron prepare"):
        PreparedData.open(tmp_path / "nothing", 310, 16)
    (folder / "valid.bin").unlink()
    with pytest.raises(UserError, match="incomplete .valid.bin is missing."):
        PreparedData.open(folder, 310, 16)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "complete": False}))
    with pytest.raises(UserError, match="an earlier prepare did not finish"):
        PreparedData.open(folder, 310, 16)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="manifest.json cannot be read"):
        PreparedData.open(folder, 310, 16)
