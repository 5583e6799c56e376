"""Datasets of the Hugging Face hub, streamed by the `datasets` library: each of their shards is one source.

A connection that breaks is tried again, after a pause that doubles; rows that were read already are skipped: none is lost or doubled.
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from data_prep.blocks import Block, text_blocks
from data_prep.sources import Identity, Reader
from poet_megatron.errors import UserError

ATTEMPTS = 6
FIRST_PAUSE = 2.0
PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError)
"""What another attempt does not mend; `datasets` reports an unknown name as the first."""
OFFLINE = ("LocalEntryNotFoundError",)
"""Of huggingface_hub: no connection and no copy here; a FileNotFoundError all the same."""
SURROGATES = "surrogatepass"


@dataclass(frozen=True)
class Retry:
    """How often, and after how many seconds at first, a failing connection is tried again."""

    attempts: int = ATTEMPTS
    first_pause: float = FIRST_PAUSE
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False)

    def rows(self, begin: Callable[[int], Iterator[Any]], what: str) -> Iterator[Any]:
        """Rows of `begin(done)`, which starts after the first `done` rows; progress resets the number of attempts."""
        done = failures = 0
        while True:
            try:
                for row in begin(done):
                    done, failures = done + 1, 0
                    yield row
                return
            except _passing_errors() as error:
                if isinstance(error, PERMANENT) and type(error).__name__ not in OFFLINE:
                    raise UserError(f"{what} cannot be read ({_short(error)}): check its name, files and your rights to them") from error
                failures += 1
                if failures == self.attempts:
                    raise UserError(
                        f"{what} cannot be read ({_short(error)}), tried {failures} times after {done} rows: check the name and the "
                        "network, then run the same command again; finished parts are kept. Files on disk go to --input"
                    ) from error
                pause = self.first_pause * 2 ** (failures - 1)
                print(f"{what}: {_short(error)}; trying again in {pause:.0f} s (row {done + 1})", file=sys.stderr, flush=True)
                self.sleep(pause)


def _short(error: BaseException) -> str:
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


def _passing_errors() -> tuple[type[BaseException], ...]:
    """What a bad network raises; httpx's errors are not OSErrors."""
    found: list[type[BaseException]] = [OSError, EOFError]
    for module, name in (("httpx", "HTTPError"), ("httpx2", "HTTPError"), ("aiohttp", "ClientError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


@dataclass(frozen=True)
class HubShard:
    """One shard of a streamed dataset."""

    name: str
    dataset: Any
    """The shard, as an IterableDataset."""
    retry: Retry = Retry()
    bytes: int = 0

    def open(self, key: str, max_bytes: int) -> Reader:
        """A pass over the shard; it cannot know how long a text is before it is here."""
        return _ShardReader(self, key)


class _ShardReader:
    def __init__(self, shard: HubShard, key: str):
        self._shard, self._key = shard, key
        self._digest = hashlib.sha256()
        self._bytes = 0

    def blocks(self) -> Iterator[Block]:
        return text_blocks(self._texts())

    def identity(self) -> Identity:
        return Identity(self._bytes, self._digest.hexdigest())

    def _texts(self) -> Iterator[tuple[bytes | None, int]]:
        with _no_second_reads():
            for row in self._rows():
                if self._key not in row:
                    raise UserError(f"{self._shard.name} has no column {self._key!r} (it has {', '.join(row)}): set --text-key")
                text = row[self._key]
                content = text.encode("utf-8", SURROGATES) if isinstance(text, str) else None
                self._digest.update((content or b"") + b"\n")
                self._bytes += len(content or b"")
                yield content, 0

    def _rows(self) -> Iterator[Any]:
        dataset, name, done = self._shard.dataset, self._shard.name, 0
        try:
            for row in self._shard.retry.rows(lambda done: iter(dataset.skip(done) if done else dataset), name):
                done += 1
                yield row
        except UserError:
            raise
        except Exception as error:  # of the library that parses the file
            raise UserError(
                f"{name} cannot be read after {done} rows ({_short(error)}): download its file and use --input, which skips what is bad"
            ) from error


@contextmanager
def _no_second_reads() -> Iterator[None]:
    """Let an error in the middle of a read reach our `Retry`, which begins the shard again.

    `datasets` repeats the read itself, on the same gzip stream. What the broken read had taken from it is gone then: text in the middle of
    the file, without a word if what is left of two lines happens to be one line of JSON.
    """
    import datasets

    before = datasets.config.STREAMING_READ_MAX_RETRIES
    datasets.config.STREAMING_READ_MAX_RETRIES = 1
    try:
        yield
    finally:
        datasets.config.STREAMING_READ_MAX_RETRIES = before


def find_shards(
    name: str, config: str = "", split: str = "train", revision: str = "", files: Sequence[str] = (), retry: Retry | None = None
) -> list[HubShard]:
    """The shards of a dataset, which `datasets.load_dataset(..., streaming=True)` opens without downloading it."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"--dataset {name} needs the datasets package: pip install 'poet-megatron[data]', or download its files and use --input"
        ) from error
    retry = retry or Retry()
    options = {"revision": revision} if revision else {}
    if files:
        options["data_files"] = list(files)  # type: ignore[assignment]

    def opened(done: int) -> Iterator[Any]:
        yield datasets.load_dataset(name, config or None, split=split, streaming=True, **options)

    try:
        whole = next(retry.rows(opened, f"dataset {name}"))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"dataset {name} cannot be opened ({_short(error)}): check --dataset, --dataset-config and --dataset-split"
        ) from error
    count = whole.num_shards
    label = f"hf://{name}/{config or 'default'}/{split}@{revision or 'main'}"
    return [HubShard(f"{label}#{number}", whole.shard(count, number), retry) for number in range(count)]
