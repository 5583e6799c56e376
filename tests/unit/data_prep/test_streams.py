import gzip
import hashlib

import pytest
import zstandard

from data_prep.blocks import DamagedInput
from data_prep.streams import HashedFile, chunks

DATA = b"".join(b'{"text": "line %d"}\n' % i for i in range(20_000))


def read(path):
    with HashedFile(path) as raw:
        found = b"".join(chunks(raw))
        assert raw.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def zstd(data):
    return zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize(
    "content", [gzip.compress(DATA), gzip.compress(DATA[:99]) + gzip.compress(DATA[99:]), gzip.compress(DATA) + b"\0" * 70_000]
)
def test_gzip_members_and_padding(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(content)
    assert read(tmp_path / "a.gz") == DATA


def test_zstd_frames(tmp_path):
    (tmp_path / "a.zst").write_bytes(zstd(DATA[:77]) + zstd(DATA[77:]))
    assert read(tmp_path / "a.zst") == DATA


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("a.gz", lambda data: data[:-100], "truncated gzip"),
        ("a.gz", lambda data: data[:-4], "truncated gzip"),
        ("a.gz", lambda data: data[:3], "truncated gzip"),
        ("a.gz", lambda data: data[:10_000] + b"\xff" * 50 + data[10_050:], "corrupt gzip"),
        ("a.gz", lambda data: data[:-8] + b"\0\0\0\0" + data[-4:], "corrupt gzip"),
        ("a.gz", lambda data: data + b"garbage", "corrupt gzip"),
        ("a.gz", lambda data: DATA, "corrupt gzip"),
        ("a.gz", lambda data: b"\0" * 100 + data, "corrupt gzip"),
        ("a.zst", lambda data: data[:-10], "truncated zstd"),
        ("a.zst", lambda data: DATA, "corrupt zstd"),
    ],
)
def test_damage_is_named_and_hashed_all_the_same(tmp_path, name, damage, message):
    whole = gzip.compress(DATA) if name.endswith("gz") else zstd(DATA)
    (tmp_path / name).write_bytes(damage(whole))
    with HashedFile(tmp_path / name) as raw:
        found = b""
        with pytest.raises(DamagedInput, match=message):
            for piece in chunks(raw):
                found += piece
        if name.endswith("gz") and whole[:10_000] == damage(whole)[:10_000]:  # nothing that comes before the damage is lost
            assert len(found) > 9000 * len(DATA) / len(whole) and found[: len(DATA) // 10] == DATA[: len(DATA) // 10]
        assert raw.sha256() == hashlib.sha256(damage(whole)).hexdigest()


def test_memory_is_bounded_for_a_bomb(tmp_path):
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"\0" * (200 << 20), 9))
    with HashedFile(tmp_path / "a.gz") as raw:
        assert max(len(piece) for piece in chunks(raw)) <= 80 << 20
