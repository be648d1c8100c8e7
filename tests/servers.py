"""Servers of embeddings, for tests: our own in a process of its own, and one that misbehaves."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from forked import start
from secateur.data.embedders import Endpoint


@contextmanager
def serving(folder: Path, log: Path, key: str) -> Iterator[str]:
    """``secateur serve`` with a model's folder; gives its address."""
    words = ("serve", folder, "--port", "0", "--device", "cpu", "--backend", "torch")
    process = start(words, log.with_name("out"), log, environment={"SECATEUR_API_KEYS": key})
    try:
        wait_until(lambda: '"serving"' in log.read_text() or not process.is_alive())
        yield f"{json.loads(log.read_text().splitlines()[1])['address']}/v1"
    finally:
        process.terminate()
        process.join(20)


def wait_until(true: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@dataclass
class Mood:
    """What the misbehaving server does, one entry for each request; at the end of the list it behaves."""

    does: list[str] = field(default_factory=list)
    requests: list[tuple[str, int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""

    def embed(self, texts: list[str], **options: object) -> np.ndarray:
        endpoint = Endpoint(f"{self.url}#m")
        endpoint.client = endpoint.client.with_options(**({"timeout": 5} | options))
        return endpoint.embed(texts)


@pytest.fixture
def mood() -> Iterator[Mood]:
    state = Mood()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(200, json.dumps({"data": [{"id": "one"}, {"id": "two"}]}).encode())

        def do_POST(self) -> None:
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            state.requests.append((self.headers.get("Authorization", ""), len(texts)))
            state.times.append(time.monotonic())
            state.texts += texts
            act = state.does.pop(0) if state.does else "well"
            rows = [{"index": i, "embedding": [float(len(text)), 10.0]} for i, text in enumerate(texts)]
            if act == "429":
                self.answer(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.3"})
            elif act == "429 tomorrow":
                self.answer(429, b"", {"Retry-After": "86400"})
            elif act in ("400", "401", "404", "500", "503"):
                self.answer(int(act), b'{"error": {"message": "no such thing"}}')
            elif act == "moved":
                self.answer(307, b"", {"Location": f"{state.url}/elsewhere"})
            elif act == "truncated":
                self.answer(200, json.dumps({"data": rows}).encode()[:-5])
            elif act == "broken off":
                self.answer(200, json.dumps({"data": rows}).encode()[:-5], {"Content-Length": "999"})
            elif act == "fewer":
                self.answer(200, json.dumps({"data": rows[:-1]}).encode())
            elif act == "more":
                self.answer(200, json.dumps({"data": [*rows, rows[0]]}).encode())
            elif act == "ragged":
                rows[0]["embedding"] = [1.0]
                self.answer(200, json.dumps({"data": rows}).encode())
            elif act == "wide":
                self.answer(200, json.dumps({"data": [row | {"embedding": [1.0, 2.0, 3.0]} for row in rows]}).encode())
            elif act == "another":
                turned = [row | {"embedding": [-1.0, row["embedding"][0]]} for row in rows]
                self.answer(200, json.dumps({"data": turned}).encode())
            elif act == "HTML":
                self.answer(200, b"<!doctype html><title>Welcome to the portal</title>", {"Content-Type": "text/html"})
            elif act == "deep":
                self.answer(200, b"[" * 100_000 + b"]" * 100_000)
            elif act == "endless":
                self.answer(200, b'{"data": [{"index": 1e999, "embedding": [1.0]}]}')
            elif act == "text":
                self.answer(200, b'["sorry"]')
            elif act == "NaN":
                rows[0]["embedding"] = [float("nan"), 1.0]
                self.answer(200, json.dumps({"data": rows}).encode())
            elif act == "slow":
                time.sleep(1)
            else:
                self.answer(200, json.dumps({"data": rows[::-1]}).encode())

        def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in (
                {"Content-Length": str(len(body)), "Content-Type": "application/json"} | (headers or {})
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts, where the server does not say how long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
