import io

from data_prep.progress import Progress


def test_lines_have_documents_rate_and_time_left():
    stream = io.StringIO()
    progress = Progress("tokenizing", 1000, stream, interval=0.0)
    progress.update(3, 2_000_000, 250)
    progress.update(1, 1_000_000, 1000)
    progress.close()
    first, second, last = stream.getvalue().splitlines()
    assert first.startswith("tokenizing: 3 documents, 2.0 MB, ") and "25%, ETA" in first
    assert "4 documents, 3.0 MB" in second and "ETA" not in last and last.endswith(" s")


def test_one_line_per_interval(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.5, 4.0, 6.0])
    monkeypatch.setattr("data_prep.progress.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    progress = Progress("tokenizing", 100, stream, interval=2.0)
    for position in (10, 50, 60, 70, 80):
        progress.update(1, 1_000_000, position)
    first, second = stream.getvalue().splitlines()
    assert first == "tokenizing: 2 documents, 2.0 MB, 0.7 MB/s, 50%, ETA 3 s"
    assert second.startswith("tokenizing: 5 documents")


def test_quiet_between_intervals():
    stream = io.StringIO()
    progress = Progress("tokenizing", 0, stream, interval=1000.0)
    for _ in range(50):
        progress.update(1, 1, 1)
    assert stream.getvalue() == ""
