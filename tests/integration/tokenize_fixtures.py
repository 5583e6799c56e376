"""Small corpora in the form of C4, tokenized once for all tests of a session."""

import pytest

from tests.unit.data_prep.tokenize_samples import make_tokenizer, run, write_corpus


@pytest.fixture(scope="session")
def c4_tokenizer(tmp_path_factory):
    """A SentencePiece model of 400 pieces."""
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def c4_files(tmp_path_factory):
    """Pattern of five .json.gz files, and the texts of each."""
    return write_corpus(tmp_path_factory.mktemp("corpus"), files=5, documents=3000, words=200)  # several blocks a file


@pytest.fixture(scope="session")
def c4_parts(c4_files, c4_tokenizer, tmp_path_factory):
    """Folder with the parts of these files, a twentieth of them for validation."""
    folder = tmp_path_factory.mktemp("parts") / "out"
    run(c4_files[0], folder, c4_tokenizer, valid_fraction=0.05)
    return folder


@pytest.fixture(scope="session")
def few_parts(c4_tokenizer, tmp_path_factory):
    """Of 60 documents, a third of them for validation."""
    folder = tmp_path_factory.mktemp("few")
    run(write_corpus(folder, files=2, documents=30)[0], folder / "out", c4_tokenizer, valid_fraction=0.33)
    return folder / "out"
