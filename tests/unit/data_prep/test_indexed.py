import numpy as np
import pytest

from data_prep.indexed import IndexedWriter, read_indexed, token_dtype
from poet_megatron.errors import UserError

DOCUMENTS = [[5, 6, 2], [2], list(range(3, 300)), [7, 2]]


def write(prefix, dtype=np.uint16, documents=DOCUMENTS):
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(ids)
    return writer


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_the_documents_back(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    big = [[np.iinfo(dtype).max, 2]]
    writer = write(tmp_path / "train", dtype, DOCUMENTS + big)
    dataset = IndexedDataset(str(tmp_path / "train"))
    assert [list(dataset[i]) for i in range(len(dataset))] == DOCUMENTS + big
    assert list(dataset.document_indices) == list(range(len(DOCUMENTS) + 2)) and dataset[0].dtype == dtype
    assert (writer.documents, writer.tokens) == (5, sum(map(len, DOCUMENTS)) + 2)


def test_same_bytes_as_megatrons_builder(tmp_path):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    write(tmp_path / "ours")
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), np.uint16)
    for ids in DOCUMENTS:
        builder.add_document(torch.tensor(ids), [len(ids)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for kind in ("bin", "idx"):
        assert (tmp_path / f"ours.{kind}").read_bytes() == (tmp_path / f"theirs.{kind}").read_bytes()


def test_own_reader(tmp_path):
    write(tmp_path / "train")
    data = read_indexed(tmp_path / "train")
    assert [list(data.document(i)) for i in range(len(data))] == DOCUMENTS
    assert list(data.tokens) == sum(DOCUMENTS, [])


def test_dtype_follows_megatron():
    from megatron.core.datasets.indexed_dataset import DType

    for size in (300, 65499, 65500, 65536, 65537, 128000):
        assert token_dtype(size) is DType.optimal_dtype(size)


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.add([1, 2])
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_ids_that_do_not_fit_and_empty_documents_are_refused(tmp_path):
    with pytest.raises(OverflowError):
        write(tmp_path / "train", np.uint16, [[65536]])
    with pytest.raises(ValueError, match="without tokens"):
        write(tmp_path / "train", np.uint16, [[]])
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path):
    prefix = tmp_path / "train"
    with pytest.raises(UserError, match="train.idx cannot be read"):
        read_indexed(prefix)
    write(prefix)
    index = (tmp_path / "train.idx").read_bytes()
    for content, message in {b"short": "not a Megatron index", index[:40]: "is damaged", b"X" + index[1:]: "not a Megatron index"}.items():
        (tmp_path / "train.idx").write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_indexed(prefix)
    (tmp_path / "train.idx").write_bytes(index)
    (tmp_path / "train.bin").write_bytes(b"1234")
    with pytest.raises(UserError, match="train.bin has 4 bytes; its index says 606"):
        read_indexed(prefix)
