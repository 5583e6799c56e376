"""Crashes, full disks and memory: whatever ends a run, the next one completes it to the same bytes."""

import contextlib
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest

from data_prep import tokenizing
from data_prep.disk import DiskFullError
from data_prep.pool import LostWorker, WorkerPool
from tests.unit.data_prep.tokenize_samples import hashes, jsonl, make_texts, make_tokenizer, run, write_corpus

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), files=6, documents=3000, words=150)[0]


def command(corpus, tokenizer, output, *options):
    words = ["--input", str(corpus), "--tokenizer", str(tokenizer), "--output", str(output), "--workers", "2", *options]
    return [sys.executable, "-m", "data_prep.tokenize_c4", *words]


def normal(folder):
    """Hashes of all files; the manifests with the name of the output folder, which the command in them contains, taken out."""
    found = hashes(folder, ("",))
    for path in folder.glob("part-*.json"):
        found[path.name] = path.read_text().replace(str(folder), "OUT")
    return found


@pytest.fixture(scope="module")
def reference(corpus, tokenizer, tmp_path_factory):
    """What an undisturbed run makes, and how many bytes that is."""
    output = tmp_path_factory.mktemp("reference") / "out"
    subprocess.run(command(corpus, tokenizer, output), check=True, capture_output=True)
    return normal(output), written(output)


def written(folder):
    """Bytes in the files of a folder, those without a final name included."""
    total = 0
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
            total += path.stat().st_size
    return total


def wait_until_written(output, count, process):
    """Whatever the speed of the machine, the process is then at a certain point of its work."""
    while (not (output / "plan.json").exists() or written(output) < count) and process.poll() is None:
        time.sleep(0.001)


def kill_and_resume(corpus, tokenizer, output, reference, times, seed):
    expected, size = reference
    source = random.Random(seed)
    killed = 0
    for _ in range(times):
        process = subprocess.Popen(command(corpus, tokenizer, output), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        done = written(output)
        wait_until_written(output, done + source.uniform(0, 0.8) * (size - done), process)
        time.sleep(source.uniform(0, 0.02))  # and somewhere between two writings
        workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not psutil.wait_procs(workers, timeout=20)[1], "workers outlive their parent"
        for path in output.glob("part-*.json"):
            assert normal_manifest(path, output) == expected[path.name]  # what is committed is right at any time
    subprocess.run(command(corpus, tokenizer, output), check=True, capture_output=True)
    assert normal(output) == expected
    return killed


def normal_manifest(path, folder):
    return path.read_text().replace(str(folder), "OUT")


def test_kill_at_random_times_and_resume(corpus, tokenizer, reference, tmp_path):
    assert kill_and_resume(corpus, tokenizer, tmp_path / "out", reference, 3, seed=0) >= 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
def test_kill_more_often(corpus, tokenizer, reference, tmp_path, seed):
    kill_and_resume(corpus, tokenizer, tmp_path / "out", reference, 4, seed)


def test_a_file_size_limit_is_a_full_disk_that_can_be_resumed(corpus, tokenizer, reference, tmp_path):
    largest = max(path.stat().st_size for path in _files(reference, corpus, tokenizer, tmp_path))

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 2, largest // 2))

    output = tmp_path / "out"
    failed = subprocess.run(command(corpus, tokenizer, output), capture_output=True, text=True, preexec_fn=limit)
    assert failed.returncode == 2
    assert (
        f"no room left in {output} while tokenizing" in failed.stderr
        and "0 finished parts are kept, the 6 that are left need about" in failed.stderr
    )
    assert "a quota or limit of file size was hit; free some and run the same command again" in failed.stderr
    assert [path.name for path in output.iterdir()] == ["plan.json"]
    subprocess.run(command(corpus, tokenizer, output), check=True, capture_output=True)
    assert normal(output) == reference[0]


def _files(reference, corpus, tokenizer, tmp_path):
    run(corpus, tmp_path / "sizes", tokenizer)
    return list((tmp_path / "sizes").glob("*.bin"))


def test_a_disk_that_fills_up_says_how_much_is_missing(corpus, tokenizer, tmp_path, monkeypatch):
    from data_prep.indexed import IndexedWriter

    whole = IndexedWriter.add_batch
    calls = []

    def add_batch(self, ids, lengths):
        calls.append(len(ids))
        if len(calls) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, ids, lengths)

    monkeypatch.setattr(IndexedWriter, "add_batch", add_batch)
    monkeypatch.setattr(tokenizing, "free_bytes", lambda folder: 1000)
    with pytest.raises(
        DiskFullError,
        match=r"[1-5] finished parts are kept, the [1-5] that are left need about [\d.]+ MB, about [\d.]+ MB are missing; free some",
    ):
        run(corpus, tmp_path / "out", tokenizer)
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    assert run(corpus, tmp_path / "out", tokenizer).reused >= 1
    run(corpus, tmp_path / "again", tokenizer)
    assert hashes(tmp_path / "out", ("",)) == hashes(tmp_path / "again", ("",))


def test_too_little_room_is_seen_before_any_work(corpus, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.disk.free_bytes", lambda folder: 10_000)
    with pytest.raises(
        DiskFullError, match=r"out has 0.0 MB free, tokenizing 6 sources takes about [\d.]+ MB: [\d.]+ MB are missing; free them"
    ):
        run(corpus, tmp_path / "out", tokenizer)


def test_a_killed_worker_is_an_error_and_the_rest_is_kept(corpus, tokenizer, tmp_path, monkeypatch):
    class Sabotaged(WorkerPool):
        sources = 0

        def encode(self, blocks):
            self.sources += 1
            if self.sources == 3:
                os.kill(self.pids[0], signal.SIGKILL)
            yield from super().encode(blocks)

    monkeypatch.setattr(tokenizing, "WorkerPool", Sabotaged)
    message = r"worker process \d+ was killed \(SIGKILL.*\) while it encoded records \d+ to \d+: nothing of this source is kept, finished"
    with pytest.raises(LostWorker, match=message):
        run(corpus, tmp_path / "out", tokenizer, workers=2)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.json")) == ["part-00000.json", "part-00001.json", "plan.json"]
    assert not list((tmp_path / "out").glob(".*"))
    monkeypatch.undo()
    assert run(corpus, tmp_path / "out", tokenizer, workers=2).reused == 2


def peak_memory(words):
    """Largest sum of resident bytes of a process and its children."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    parent, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for one in (parent, *_children(parent)):
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, total)
        time.sleep(0.02)
    assert process.returncode == 0, process.stderr.read()
    return peak


def _children(parent):
    try:
        return parent.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def synthetic(path, megabytes):
    """JSON lines of some length; every 20 MB one of 1 MB, and one line longer than the limit."""
    texts = make_texts(2000, words=400)
    piece = jsonl(texts)
    with path.open("wb") as stream:
        stream.write(b'{"text": "' + b"long " * (MEGABYTE + 1) + b'"}\n')
        while stream.tell() < megabytes * MEGABYTE:
            if stream.tell() // (20 * MEGABYTE) != (stream.tell() + len(piece)) // (20 * MEGABYTE):
                stream.write(jsonl(["a long document " * (MEGABYTE // 16)]))
            stream.write(piece)
    return path


def test_memory_does_not_grow_with_the_input(tokenizer, tmp_path):
    peaks = []
    for megabytes in (6, 24):
        path = synthetic(tmp_path / f"{megabytes}.jsonl", megabytes)
        peaks.append(peak_memory(command(path, tokenizer, tmp_path / f"out{megabytes}")))
    print("peak MB:", [peak // MEGABYTE for peak in peaks])
    assert max(peaks) < 1 << 30 and peaks[1] < peaks[0] + 96 * MEGABYTE


@pytest.mark.slow
def test_memory_on_500_megabytes(tokenizer, tmp_path):
    peaks = []
    for megabytes in (100, 500):
        path = synthetic(tmp_path / f"{megabytes}.jsonl", megabytes)
        peaks.append(peak_memory(command(path, tokenizer, tmp_path / f"out{megabytes}")))
        path.unlink()
    print("peak MB:", [peak // MEGABYTE for peak in peaks])
    assert max(peaks) < 1 << 30 and peaks[1] < peaks[0] + 96 * MEGABYTE


@pytest.mark.slow
def test_a_line_of_200_megabytes_is_skipped_in_little_memory(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as stream:
        stream.write(jsonl(["before"]) + b'{"text": "')
        for _ in range(200):
            stream.write(b"x " * (MEGABYTE // 2))
        stream.write(b'"}\n' + jsonl(["after"]))
    assert peak_memory(command(path, tokenizer, tmp_path / "out")) < 400 * MEGABYTE
    assert run(path, tmp_path / "out2", tokenizer).skipped == {f"longer than {4 * MEGABYTE} bytes": 1}
