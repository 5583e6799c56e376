"""Checkpoint directories, and the refusal of untrusted indexes, without any training."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from poet_megatron.checkpoint import store as store_module
from poet_megatron.checkpoint.safety import check_metadata
from poet_megatron.checkpoint.store import MANIFEST, CheckpointStore
from poet_megatron.errors import UserError


def write(store: CheckpointStore, step: int, content: bytes = b"weights") -> Path:
    staging = store.begin(step)
    (staging / "tensors").mkdir()
    (staging / "tensors" / "part-0").write_bytes(content)
    return store.commit(step)


def test_nothing_appears_under_the_final_name_before_commit(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.begin(5) / "part").write_bytes(b"half")
    assert store.steps() == []
    assert store.newest_intact() is None
    store.commit(5)
    assert store.steps() == [5]


def test_keep_last(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    for step in (10, 20, 30):
        write(store, step)
    assert store.steps() == [20, 30]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest"])
def test_damage_is_found_and_passed_over(tmp_path, damage, caplog):
    store = CheckpointStore(tmp_path)
    write(store, 10)
    victim = write(store, 20) / "tensors" / "part-0"
    if damage == "truncate":
        victim.write_bytes(b"weight")
    elif damage == "flip":
        victim.write_bytes(b"weighty"[:7])
    elif damage == "delete":
        victim.unlink()
    else:
        (store.path(20) / MANIFEST).write_text("{")
    assert store.damage(20) is not None
    assert store.damage(10) is None
    assert store.newest_intact() == 10
    assert "step-00000020 is damaged" in caplog.text


def test_what_the_run_fell_back_from_makes_room(tmp_path):
    """Step 30 is damaged, the run went on from 10: saving 20 must neither delete 20 nor keep 30."""
    store = CheckpointStore(tmp_path, keep_last=1)
    write(store, 10)
    (store.begin(30) / "part").write_bytes(b"x")
    store.commit(30)
    write(store, 20)
    assert store.steps() == [20]


def test_begin_clears_what_an_interrupted_save_left(tmp_path):
    store = CheckpointStore(tmp_path)
    (store.begin(7) / "part").write_bytes(b"half")
    assert list(store.begin(9).iterdir()) == []
    assert not store.staging(7).exists()


def test_ranks_share_the_checksums(tmp_path):
    """Each its own files, by their names, rank 0 the rest; together they are those of one process."""
    store = CheckpointStore(tmp_path)
    staging = store.begin(5)
    for name in ("__0_0.distcp", "__1_0.distcp", "__10_1.distcp", "rng-0.pt", "rng-1.pt", "rng-10.pt", "config.yaml", ".metadata"):
        (staging / name).write_text(name)
    shares = [store.checksums(5, rank) for rank in range(11)]
    assert set(shares[0]) == {"__0_0.distcp", "rng-0.pt", "config.yaml", ".metadata"}
    assert set(shares[1]) == {"__1_0.distcp", "rng-1.pt"}
    assert set(shares[10]) == {"__10_1.distcp", "rng-10.pt"}
    together = {name: entry for share in shares for name, entry in share.items()}
    assert sum(map(len, shares)) == len(together)
    assert together == store.checksums(5)
    store.commit(5, together)
    assert store.damage(5) is None


def test_a_rank_flushes_what_it_wrote_and_rank_0_what_is_its_own(tmp_path, monkeypatch):
    """A rank on another machine has its files in its own page cache, and rank 0 may not see their names yet."""
    flushed: list[str] = []
    fsync = store_module._fsync
    monkeypatch.setattr(store_module, "_fsync", lambda path: (flushed.append(path.name), fsync(path)))
    store = CheckpointStore(tmp_path)
    staging = store.begin(5)
    (staging / "tensors").mkdir()
    for name in ("__0_0.distcp", "__1_0.distcp", "tensors/part"):
        (staging / name).write_text(name)
    theirs = store.checksums(5, 1)
    assert flushed == ["__1_0.distcp"]
    flushed.clear()
    ours = store.checksums(5, 0)
    assert flushed == ["__0_0.distcp", "part"]
    flushed.clear()
    (staging / "__1_0.distcp").unlink()  # not visible from here yet
    final = store.commit(5, theirs | ours)
    assert sorted(flushed) == sorted([MANIFEST, "tensors", staging.name, tmp_path.name])
    (final / "__1_0.distcp").write_text("__1_0.distcp")
    assert store.damage(5) is None


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_an_index_that_would_run_code_is_refused_without_running_it(tmp_path):
    target = tmp_path / "created-by-the-pickle"
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps({"state_dict_metadata": Evil(target)}))
    with pytest.raises(UserError, match=r"names posix\.mkdir"):
        check_metadata(index)
    assert not target.exists()
    pickle.loads(index.read_bytes())  # the same bytes do run it, so the test can fail
    assert target.exists()


def test_an_index_that_declares_pickled_bytes_is_refused(tmp_path):
    """torch unpickles byte entries without restriction, so only tensors may be listed."""
    torch.distributed.checkpoint.save({"weight": torch.ones(3), "bytes": "text"}, checkpoint_id=tmp_path / "mixed", no_dist=True)
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        check_metadata(tmp_path / "mixed" / ".metadata")


def test_a_real_index_passes_and_a_broken_one_is_named(tmp_path):
    torch.distributed.checkpoint.save({"weight": torch.ones(3, dtype=torch.bfloat16)}, checkpoint_id=tmp_path / "real", no_dist=True)
    check_metadata(tmp_path / "real" / ".metadata")
    assert isinstance(pickle.loads((tmp_path / "real" / ".metadata").read_bytes()), Metadata)
    (tmp_path / "broken").write_bytes(b"\x80\x04garbage")
    with pytest.raises(UserError, match="not a checkpoint index"):
        check_metadata(tmp_path / "broken")
