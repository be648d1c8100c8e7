"""A real server in a thread of the test's process, with a tiny model that a test can hold."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openai
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import secateur
from conftest import tiny_transformer
from secateur.inference.app import make_app
from secateur.inference.encoders import Opening
from secateur.inference.queueing import LocalWorker
from secateur.inference.serve import Server, bind, make_server, open_worker
from secateur.options import ServeOptions, make
from secateur.runtime.core import Encoder, Tokens, Vectors
from servers import wait_until

PROMPTS = {"query": "find: ", "document": ""}
TEXTS = ["one", "a somewhat longer text, with a comma.", "葉 🌿", "x" * 100, "tab\tand\x00nul", " "]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers folder with prompts that are not pooled, and vectors of 32 numbers."""
    made = tmp_path_factory.mktemp("served")
    transformer = Transformer(str(tiny_transformer(made / "bare", "llama", depth=2)))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean", include_prompt=False)
    modules = [transformer, pooling, Normalize()]
    SentenceTransformer(modules=modules, device="cpu", prompts=PROMPTS).save(str(made / "tiny"))
    return made / "tiny"


@pytest.fixture(scope="module")
def model(folder: Path) -> SentenceTransformer:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return worker_of(folder).encoder


@pytest.fixture(scope="module")
def exported(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "onnx"
    secateur.export(folder, out=out)
    return out


def limits(**changed: object) -> ServeOptions:
    return make(ServeOptions, {"model": "tiny", **changed})


def worker_of(folder: Path) -> LocalWorker:
    """A model's folder in float32, or an export."""
    exported = (folder / "export.json").is_file()
    return open_worker(Opening(str(folder)) if exported else Opening(str(folder), dtype="float32", device="cpu"))


@dataclass
class Running:
    """A server in a thread of this process."""

    server: Server
    port: int
    thread: threading.Thread

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options: object) -> openai.OpenAI:
        settings = {"base_url": f"{self.address}/v1", "api_key": "none", "max_retries": 0, "timeout": 300}
        return openai.OpenAI(**{**settings, **options})

    def get(self, path: str) -> tuple[int, str]:
        return fetch(urllib.request.Request(self.address + path))

    def post(self, body: bytes, path: str = "/v1/embeddings", **headers: str) -> tuple[int, str]:
        headers = {"Content-Type": "application/json", **headers}
        return fetch(urllib.request.Request(self.address + path, body, headers))

    def metric(self, name: str) -> float:
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def fetch(request: urllib.request.Request) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def running(app) -> Iterator[Running]:
    server = make_server(app, timeout=20)
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        wait_until(lambda: server.started)
        try:
            yield Running(server, port, thread)
        finally:
            server.should_exit = True
            thread.join(300)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def served(encoder: Encoder) -> Iterator[Running]:
    with running(make_app(encoder, "tiny", limits(max_items=64, max_tokens=2000, max_bytes=100_000))) as server:
        yield server


def vectors(response) -> np.ndarray:
    return np.array([row.embedding for row in response.data], dtype=np.float32)


def refused(status: int, answer: tuple[int, str]) -> dict[str, str | None]:
    """The error of a refusal, in OpenAI's shape."""
    assert answer[0] == status, answer
    error = json.loads(answer[1])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def request(**fields: object) -> bytes:
    return json.dumps({"model": "tiny", "input": "one", **fields}).encode()


class Held(Encoder):
    """An encoder that a test can hold; it fails where it is told to, and remembers what it was given."""

    def __init__(self, encoder: Encoder) -> None:
        for name in ("name", "dimension", "max_length", "vocabulary", "prompts", "default_prompt", "truncation_side"):
            setattr(self, name, getattr(encoder, name))
        self._encoder = encoder
        self.go = threading.Event()
        self.go.set()
        self.poison: int | None = None
        self.failures = 0
        self.room: int | None = None
        self.batches: list[list[Tokens]] = []

    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        return self._encoder.read(texts, prompt, truncate)

    def run(self, batch: Sequence[Tokens]) -> Vectors:
        self.batches.append(list(batch))
        assert self.go.wait(300)
        if self.room and len(batch) * max(map(len, batch)) > self.room:
            raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
        if self.failures or any(self.poison in tokens.ids for tokens in batch):
            self.failures = max(0, self.failures - 1)
            raise RuntimeError("the processor is on strike")
        return self._encoder.run(batch)


@contextlib.contextmanager
def holding(held: Held) -> Iterator[None]:
    """The model does nothing inside, and goes on at the end, also of a test that fails."""
    held.go.clear()
    try:
        yield
    finally:
        held.go.set()


def raw(port: int, *parts: bytes, seconds: float = 60) -> bytes:
    """What the server answers to bytes on a socket, until it closes or falls silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        for part in parts:
            connection.sendall(part)
        answer = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            while chunk := connection.recv(65536):
                answer += chunk
    return answer


HEAD = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nConnection: close\r\n"
