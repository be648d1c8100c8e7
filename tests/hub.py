"""A stand-in for the Hub on this machine: what downloads need of it, with ranges, counting what it sends."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants


class StandIn(ThreadingHTTPServer):
    """Serves one folder as the repository ``me/tiny``.

    Attributes:
        is_down: Whether every connection is closed without an answer.
        ranges: Whether requests for ranges are understood.
        break_after: After how many bytes to break the next longer answer, once.
        sent: Bytes of bodies sent so far.
        asked: The requests so far, as "method path range".
    """

    commit = "c0ffee" + "0" * 34

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.is_down = False
        self.ranges = True
        self.break_after: int | None = None
        self.sent = 0
        self.counting = threading.Lock()
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # a client that hangs up is none


@contextlib.contextmanager
def serve(root: Path) -> Iterator[StandIn]:
    server = StandIn(root)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def fetch_from(server: StandIn, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Have models be fetched from there, into a cache of their own."""
    patch.setattr(constants, "HF_HUB_CACHE", str(cache))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "ENDPOINT", server.address)
    template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        asked = self.headers.get("Range", "")
        self.server.asked.append(f"{self.command} {self.path} {asked}")
        if self.server.is_down:
            self.close_connection = True
            return
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/me/tiny(?:/(revision|tree)/[^/]+)?", path):
            self._tell(match[1] or "revision")
            return
        match = re.fullmatch(r"/me/tiny/resolve/([^/]+)/(.+)", path)
        file = self.server.root / match[2] if match else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if match or "/tree/" in path else "RepoNotFound")
            self.send_header("X-Repo-Commit", self.server.commit)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        size = file.stat().st_size
        start, end = self._head(file, size, re.fullmatch(r"bytes=(\d+)-(\d*)", asked))
        if body:
            self._body(file, start, end)

    def _tell(self, what: str) -> None:
        """What the Hub tells of a repository: its commit, or its files."""
        root = self.server.root
        files = [file for file in sorted(root.rglob("*")) if file.is_file()]
        tree = [
            {"type": "file", "path": file.relative_to(root).as_posix(), "size": file.stat().st_size, "oid": file.name}
            for file in files
        ]
        told = {"id": "me/tiny", "sha": self.server.commit, "siblings": []} if what == "revision" else tree
        content = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _head(self, file: Path, size: int, span: re.Match[str] | None) -> tuple[int, int]:
        start, end = 0, size
        if span and self.server.ranges:
            start, end = int(span[1]), min(size, int(span[2] or size) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{file.name}-{size}"')
        self.send_header("X-Repo-Commit", self.server.commit)
        self.end_headers()
        return start, end

    def _body(self, file: Path, start: int, end: int) -> None:
        limit = self.server.break_after
        if limit is not None and end - start > limit:
            self.server.break_after, end, self.close_connection = None, start + limit, True
        if end > start:
            with self.server.counting:  # before it is sent: whoever has the last byte may look at once
                self.server.sent += end - start
            with file.open("rb") as stream:
                self.connection.sendfile(stream, start, end - start)

    def log_message(self, *args) -> None:
        pass
