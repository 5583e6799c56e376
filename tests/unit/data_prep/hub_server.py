"""A hub on 127.0.0.1 with one dataset that breaks connections as told: enough of the Hugging Face hub for `datasets` to stream from it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

NAME = "someone/corpus"
COMMIT = "c" * 40
PIECE = 5 << 20
"""Bytes that fsspec asks for at once."""


@dataclass
class Hub:
    """What the server serves."""

    files: dict[str, bytes]
    address: str = ""
    breaks: dict[tuple[str, int], int] = field(default_factory=dict)
    """(file, number of a piece of it) -> how many requests for it get only half of what they ask for."""
    asked: list[tuple[str, int]] = field(default_factory=list)
    """The same of each request for content."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def is_to_break(self, name: str, start: int) -> bool:
        """Count a request for content, and say whether it is one that breaks."""
        key = (name, start // PIECE)
        with self.lock:
            self.asked.append(key)
            left = self.breaks.get(key, 0)
            self.breaks[key] = left - 1
        return left > 0


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/datasets/{NAME}/tree/"):
                self._json(_listing(hub, *path.split("/tree/")[1].partition("/")[::2]))
            elif path == f"/api/datasets/{NAME}" or path.startswith(f"/api/datasets/{NAME}/revision/"):
                self._json({"_id": "1", "id": NAME, "sha": COMMIT, "tags": [], "siblings": [{"rfilename": name} for name in hub.files]})
            elif path.startswith(f"/datasets/{NAME}/resolve/"):
                self._file(path.split("/resolve/")[1].partition("/")[2])
            else:
                self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

        def _file(self, name: str) -> None:
            if name not in hub.files:
                self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            content, ranged = hub.files[name], self.headers.get("Range", "")
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            start, end = int(first or 0), min(int(last or len(content)) + 1, len(content))
            self.send_response(206 if ranged else 200)
            for key, value in {
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
                "Content-Range": f"bytes {start}-{end - 1}/{len(content)}",
                "Content-Length": str(end - start),
            }.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.is_to_break(name, start):
                self.wfile.write(content[start : (start + end) // 2])
                self.close_connection = True  # before all that was promised is sent
            else:
                self.wfile.write(content[start:end])

        def _json(self, content: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            for key, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    return Handler


def _listing(hub: Hub, revision: str, folder: str) -> list[dict[str, object]]:
    """What lies in a folder, not in its folders."""
    prefix = f"{folder}/" if folder else ""
    names = [name for name in hub.files if name.startswith(prefix)]
    here = [name for name in names if "/" not in name[len(prefix) :]]
    folders = sorted({prefix + name[len(prefix) :].partition("/")[0] for name in names if name not in here})
    entries: list[dict[str, object]] = [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
    return entries + [{"type": "file", "path": name, "size": len(hub.files[name]), "oid": "1" * 40} for name in here]


@contextmanager
def serve(files: dict[str, bytes]) -> Iterator[Hub]:
    """A hub with these files in its dataset, for as long as the block lasts."""
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
