"""The server as clients meet it: the real ``openai`` client and raw sockets, over a real uvicorn server."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
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
from secateur.errors import ConfigError, ModelError, SecateurError
from secateur.inference.app import make_app
from secateur.inference.encoders import ModelEncoder
from secateur.inference.middleware import API_KEYS, ApiError, JsonLines, Keys, Metrics, read_keys
from secateur.inference.opening import Opening
from secateur.inference.queueing import Batcher, LocalWorker
from secateur.inference.serve import Server, bind, make_server, open_worker
from secateur.inference.workers import EncoderDied, EncoderProcess
from secateur.measures.metrics import paired_cosines
from secateur.options import ServeOptions, make
from secateur.runtime.core import Encoder, Tokens, Vectors

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

    def forward(self, seconds: float) -> None:
        """Put the server's clock forward: what waits for so long need not be waited for."""
        loop = self.server.servers[0].get_loop()
        before = loop.time
        loop.time = lambda: before() + seconds
        loop.call_soon_threadsafe(lambda: None)

    @property
    def connections(self) -> list:
        return list(self.server.server_state.connections)

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
def running(app, send_buffer: int | None = None) -> Iterator[Running]:
    server = make_server(app, timeout=20)
    with bind("127.0.0.1", 0, Keys()) as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
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


def wait_until(true, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


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


# What clients get


def test_vectors_are_those_of_the_model_itself(served: Running, model: SentenceTransformer):
    expected = model.encode(TEXTS)
    with served.client() as client:
        for form in ("float", "base64"):
            answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
            if form == "base64":
                raw = [base64.b64decode(row.embedding) for row in answer.data]
                found = np.array([np.frombuffer(row, dtype="<f4") for row in raw])
            else:
                found = vectors(answer)
            assert [row.index for row in answer.data] == list(range(len(TEXTS)))
            np.testing.assert_allclose(found, expected, atol=1e-5)
        by_default = client.embeddings.create(model="tiny", input="one")  # base64 on the way, unpacked by the client
        np.testing.assert_allclose(vectors(by_default), expected[:1], atol=1e-5)
        tokens = sum(len(model.tokenizer(text)["input_ids"]) for text in TEXTS)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
        assert answer.model == "tiny"


def test_token_ids_are_taken_as_they_are(served: Running, model: SentenceTransformer):
    ids = [model.tokenizer(text)["input_ids"] for text in TEXTS]
    with served.client() as client:
        several = vectors(client.embeddings.create(model="tiny", input=ids))
        one = vectors(client.embeddings.create(model="tiny", input=ids[1]))
    np.testing.assert_allclose(several, model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(one[0], several[1], atol=1e-5)


def test_dimensions_cut_and_make_one_long(served: Running, model: SentenceTransformer):
    with served.client() as client:
        found = vectors(client.embeddings.create(model="tiny", input=TEXTS, dimensions=8))
        with pytest.raises(openai.BadRequestError, match="less than or equal to 32") as error:
            client.embeddings.create(model="tiny", input="one", dimensions=33)
    assert error.value.param == "dimensions"
    expected = model.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_prompts_by_name(served: Running, model: SentenceTransformer):
    def found(**extra: str) -> np.ndarray:
        with served.client() as client:
            return vectors(client.embeddings.create(model="tiny", input=TEXTS, extra_body=extra))

    expected = model.encode(TEXTS, prompt_name="query")
    np.testing.assert_allclose(found(prompt="query"), expected, atol=1e-5)
    np.testing.assert_allclose(found(prompt="document"), model.encode(TEXTS), atol=1e-5)
    assert np.abs(expected - model.encode(TEXTS)).max() > 0.01
    with pytest.raises(openai.BadRequestError, match="'document' or 'query'"):
        found(prompt="passage")
    assert refused(400, served.post(request(prompt="query", input=[5])))["param"] == "prompt"


def test_a_model_without_prompts_takes_none(encoder: Encoder):
    plain = Held(encoder)
    plain.prompts, plain.default_prompt = {}, None
    with running(make_app(plain, "tiny", limits())) as server:
        assert refused(400, server.post(request(prompt="query")))["param"] == "prompt"
        assert server.post(request(prompt=None))[0] == 200


def test_the_models_own_default_prompt_is_kept(folder: Path):
    model = SentenceTransformer(str(folder), device="cpu", default_prompt_name="query")
    with running(make_app(ModelEncoder(model), "tiny", limits())) as server, server.client() as client:
        found = vectors(client.embeddings.create(model="tiny", input=TEXTS))
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)


def test_the_model_is_listed_and_another_is_not_served(served: Running):
    with served.client() as client:
        assert [card.id for card in client.models.list()] == ["tiny"]
        assert client.models.retrieve("tiny").object == "model"
        with pytest.raises(openai.NotFoundError, match="this server has tiny"):
            client.embeddings.create(model="ada", input="one")
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("some/ada")


def test_long_answers_come_in_pieces_and_whole(encoder: Encoder, model: SentenceTransformer):
    texts = [f"text {i}" for i in range(2000)]
    with running(make_app(encoder, "tiny", limits())) as server, server.client() as client:
        answer = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    np.testing.assert_allclose(vectors(answer), model.encode(texts), atol=1e-5)


# What is refused


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"input": ""}, "input", "at least 1 character"),
        ({"input": ["one", ""]}, "input[1]", "at least 1 character"),
        ({"input": []}, "input", "at least 1 item"),
        ({"input": [[]]}, "input[0]", "at least 1 item"),
        ({"input": [1, "one"]}, "input[1]", "valid integer"),
        ({"input": [True]}, "input[0]", "valid integer"),
        ({"input": {"text": "one"}}, "input", "valid list"),
        ({"input": None}, "input", "valid list"),
        ({"input": 1}, "input", "valid list"),
        ({"input": [-1]}, "input[0]", "greater than or equal to 0"),
        ({"input": [[5], [10**30]]}, "input[1][0]", "less than 45"),
        ({"input": ["one", "x" * 129]}, "input[1]", "129 tokens are too many: the model reads at most 128"),
        ({"input": "x" * 10_000}, "input", "10000 characters are too many"),
        ({"input": [[5] * 129]}, "input[0]", "at most 128 items"),
        ({"input": ["a"] * 65}, "input", "at most 64 items"),
        ({"input": ["a" * 100] * 30}, "input", "more than 2000 tokens in one request"),
        ({"input": [[5] * 100] * 30}, "input", "more than 2000 tokens in one request"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"dimensions": 8.5}, "dimensions", "valid integer"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"input_type": "query"}, "input_type", "no such field"),
        ({"model": 3}, "model", "valid string"),
    ],
)
def test_a_refusal_names_the_field_and_the_limit(served: Running, fields: dict, param: str, said: str):
    error = refused(400, served.post(request(**fields)))
    assert error["param"] == param
    assert said in error["message"]


def test_what_means_the_default_or_nothing_is_taken(served: Running):
    expected = served.post(request())
    assert expected[0] == 200
    assert served.post(request(encoding_format=None, dimensions=None, prompt=None, user=1)) == expected


def test_texts_are_cut_only_where_the_server_was_told_to(encoder: Encoder, model: SentenceTransformer):
    texts = ["word, " * 100, "word, " * 5000]
    with running(make_app(encoder, "tiny", limits(truncate=True))) as server, server.client() as client:
        answer = client.embeddings.create(model="tiny", input=texts)
    np.testing.assert_allclose(vectors(answer), model.encode(texts), atol=1e-5)
    assert answer.usage.prompt_tokens == 256


@pytest.mark.parametrize("kind", ["folder", "exported"])
def test_very_long_texts_are_cut_on_the_models_own_side(
    request: pytest.FixtureRequest, folder: Path, tmp_path: Path, kind: str
):
    copied = shutil.copytree(request.getfixturevalue(kind), tmp_path / "left")
    settings = copied / ("export.json" if kind == "exported" else "tokenizer_config.json")
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"truncation_side": "left"}))
    model = SentenceTransformer(str(folder), device="cpu")
    model.tokenizer.truncation_side = "left"
    texts = ["word, " * 5000 + "and the end", "word, " * 100 + "x", " " * 20_000 + "end"]
    expected = model.encode(texts)
    ids = [model.tokenizer(text, truncation=False)["input_ids"] for text in texts]
    encoder = worker_of(copied).encoder
    with running(make_app(encoder, "tiny", limits(truncate=True))) as server, server.client() as client:
        for given in (texts, ids):
            found = vectors(client.embeddings.create(model="tiny", input=given))
            np.testing.assert_allclose(found, expected, atol=1e-5)


HOSTILE = {
    "nothing": (b"", 400),
    "no JSON": (b"{", 400),
    "no object": (b'["model"]', 400),
    "not UTF-8": (b'{"model": "tiny", "input": "\xff\xfe"}', 400),
    "half a surrogate": (b'{"model": "tiny", "input": "\\ud800"}', 400),
    "UTF-16": (request().decode().encode("utf-16"), 400),
    "deep lists": (b'{"model": "tiny", "input": ' + b"[" * 45_000 + b"]" * 45_000 + b"}", 400),
    "deep objects": (b'{"a":' * 15_000 + b"1" + b"}" * 15_000, 400),
    "no number": (b'{"model": "tiny", "input": [NaN]}', 400),
    "infinite": (b'{"model": "tiny", "input": "one", "dimensions": 1e999}', 400),
    "a huge number": (b'{"model": "tiny", "input": "one", "dimensions": ' + b"9" * 90_000 + b"}", 400),
    "many keys": (b"{" + b",".join(b'"%d":1' % i for i in range(9000)) + b"}", 400),
    "many empty lists": (b'{"model": "tiny", "input": [' + b"[]," * 30_000 + b"[]]}", 400),
    "many wrong types": (b'{"model": "tiny", "input": ["a"' + b",1" * 40_000 + b"]}", 400),
    "a key that is long": (b'{"' + b"k" * 90_000 + b'": 1}', 400),
    "too large": (request(input="x" * 100_000), 413),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies_are_refused_and_the_server_goes_on(served: Running, name: str):
    body, status = HOSTILE[name]
    error = refused(status, served.post(body))
    assert len(error["message"]) < 500
    assert served.post(request())[0] == 200


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


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00\xff\r\n\r\n", b"400"),
        (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: x\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n{", b"4"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + (b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 7, b"413"),
        (HEAD + b"Authorization: Bearer \xff\xfe\r\nContent-Length: 2\r\n\r\n{}", b"400"),
        (b"GET /%ff%fe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"404"),
        (b"BREW /v1/embeddings HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"405"),
    ],
)
def test_hostile_bytes_get_a_4xx(served: Running, sent: bytes, status: bytes):
    assert raw(served.port, sent).startswith(b"HTTP/1.1 " + status)
    assert served.get("/ready")[0] == 200


def test_other_paths_methods_and_types_are_errors_in_the_same_shape(served: Running):
    assert refused(404, served.get("/v1/chat"))["type"] == "invalid_request_error"
    assert "POST /v1/embeddings" in refused(404, served.get("/v1/embeddings/"))["message"]
    wrong = refused(405, served.get("/v1/embeddings"))
    assert (wrong["code"], wrong["message"]) == ("method_not_allowed", "this path takes POST")
    refused(415, served.post(request(), **{"Content-Type": "text/plain"}))
    assert "Content-Encoding" in refused(415, served.post(request(), **{"Content-Encoding": "gzip"}))["message"]
    assert served.post(request(), **{"Content-Encoding": "identity"})[0] == 200
    assert served.metric('secateur_errors_total{code="method_not_allowed"}') >= 1
    assert served.metric('secateur_errors_total{code="not_found"}') >= 2
    assert served.metric('secateur_requests_total{path="/v1/embeddings",status="405"}') >= 1


def test_what_the_gate_refuses_counts_under_its_path(encoder: Encoder):
    with running(make_app(encoder, "tiny", limits(max_bytes=100))) as server:
        refused(413, server.post(request(input="x" * 100)))
        refused(404, server.post(request(), path="/v1/nothing"))
        assert server.metric('secateur_requests_total{path="/v1/embeddings",status="413"}') == 1
        assert server.metric('secateur_requests_total{path="other",status="404"}') == 1


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_can_be_asked_for_without_a_body(served: Running, path: str):
    assert fetch(urllib.request.Request(served.address + path, method="HEAD")) == (200, "")


def test_bodies_in_memory_are_bounded_together(encoder: Encoder):
    with running(make_app(encoder, "tiny", limits(max_bytes=1000))) as server, contextlib.ExitStack() as held:
        for _ in range(8):  # each holds a body but for its last byte
            connection = held.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            connection.sendall(HEAD + b"Content-Length: 1000\r\n\r\n" + b" " * 990)
        wait_until(lambda: server.post(request(input="x" * 100))[0] == 429)
        held.close()
        wait_until(lambda: server.post(request(input="x" * 100))[0] == 200)


def test_schemathesis_finds_nothing_against_the_servers_own_schema(served: Running, tmp_path: Path):
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.address}/openapi.json"]
    options = ["--max-examples", "15", "--seed", "1", "--no-color"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, cwd=tmp_path)  # it keeps a cache there
    assert done.returncode == 0, done.stdout
    assert "6 selected / 6 total" in done.stdout
    assert served.get("/ready")[0] == 200


# Keys


def test_keys(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    (tmp_path / "keys").write_text("from-file\n\nanother\n")
    monkeypatch.setenv(API_KEYS, "from-environment, ")
    caplog.set_level(logging.DEBUG)
    with running(make_app(encoder, "tiny", limits(), keys=read_keys(tmp_path / "keys"))) as server:
        for key in ("from-file", "another", "from-environment"):
            with server.client(api_key=key) as client:
                assert len(client.embeddings.create(model="tiny", input="one").data) == 1
        for key in ("from-fil", "from-file2", "ключ".encode().decode("latin-1"), "from-environment,"):
            refused(401, server.post(request(), Authorization=f"Bearer {key}"))
        refused(401, server.post(b"x" * 10_000_000))
        refused(401, server.post(request(), Authorization="Basic from-file"))
        assert [server.get(path)[0] for path in ("/metrics", "/v1/models", "/health", "/ready")] == [401, 401, 200, 200]
    assert "from-" not in caplog.text


def test_what_is_no_key_is_refused_and_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\n\n second \n")
    keys = read_keys(file)
    assert [keys.allow(b"Bearer " + key) for key in (b"first", b"second", b"")] == [True, True, False]
    file.write_text("first\n# of Anna\n")
    with pytest.raises(ConfigError, match="line 2: a key has no blanks") as error:
        read_keys(file)
    assert "Anna" not in str(error.value)
    for wrong in ("first\nsecond", "first,sec ond"):
        monkeypatch.setenv(API_KEYS, wrong)
        with pytest.raises(ConfigError, match="separated by commas"):
            read_keys(None)
    monkeypatch.setitem(os.environ, API_KEYS, os.fsdecode(b"\xff\xfe"))
    with pytest.raises(ConfigError, match="UTF-8"):
        read_keys(None)


def test_other_machines_are_served_only_with_a_key_or_when_told_so(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0 is reachable from other machines.*--no-auth"):
        bind("0.0.0.0", 0, Keys())
    with pytest.raises(ConfigError, match="reachable"):
        bind("::", 0, Keys())
    bind("0.0.0.0", 0, Keys(), auth=False).close()
    bind("0.0.0.0", 0, Keys(["key"])).close()
    with bind("127.0.0.1", 0, Keys()) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot listen at 127\.0\.0\.1"):
            bind("127.0.0.1", taken.getsockname()[1], Keys())
    with pytest.raises(ConfigError, match=r"cannot listen at a\.\.b, port 0"):
        bind("a..b", 0, Keys(), auth=False)
    if socket.has_ipv6:
        with contextlib.suppress(ConfigError):
            bind("::1", 0, Keys()).close()
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(tmp_path / "empty")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "none")


# Under load


def waiting(server: Running) -> float:
    return server.metric("secateur_queue_tokens ")


def test_requests_of_many_clients_share_batches(encoder: Encoder, model: SentenceTransformer):
    held = Held(encoder)
    texts = [f"text number {i:02}" for i in range(40)]
    with (
        running(make_app(held, "tiny", limits())) as server,
        server.client() as client,
        ThreadPoolExecutor(40) as clients,
    ):
        one = partial(client.embeddings.create, model="tiny")
        with holding(held):
            answers = [clients.submit(one, input=text) for text in texts]
            wait_until(lambda: waiting(server) == 40 * 14)
            assert len(held.batches) == 1
        found = np.concatenate([vectors(answer.result()) for answer in answers])
        assert len(held.batches) == 2
        assert server.metric("secateur_texts_total") == 40
        assert server.metric("secateur_batch_texts_count") == 2
        assert server.metric("secateur_queue_seconds_count") == 40
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)


def test_a_full_queue_says_when_to_come_again(encoder: Encoder):
    held = Held(encoder)
    app = make_app(held, "tiny", limits(queue_tokens=50))
    with running(app) as server, server.client(max_retries=5) as client, ThreadPoolExecutor(6) as clients:
        ask = partial(client.embeddings.create, model="tiny", input="ten tokens")
        busy = 'secateur_errors_total{code="server_busy"}'
        with holding(held):
            answers = [clients.submit(ask) for _ in range(5)]
            wait_until(lambda: waiting(server) == 50)
            with server.client() as impatient, pytest.raises(openai.RateLimitError) as error:
                impatient.embeddings.create(model="tiny", input="ten tokens")
            assert 1 <= int(error.value.response.headers["retry-after"]) <= 60
            answers.append(clients.submit(ask))  # the real client waits, and comes again
            wait_until(lambda: server.metric(busy) == 2)
        assert [len(answer.result().data) for answer in answers] == [1] * 6


def test_a_request_that_takes_too_long_leaves_the_queue(encoder: Encoder):
    held = Held(encoder)
    with running(make_app(held, "tiny", limits(timeout=0.3))) as server, holding(held):
        assert refused(503, server.post(request()))["code"] == "timeout"
        wait_until(lambda: waiting(server) == 0)


def test_who_leaves_is_not_encoded(encoder: Encoder):
    held = Held(encoder)
    body = request(input="left")
    sent = HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(1) as other:
        with holding(held):
            first = other.submit(server.post, request(input="first"))
            wait_until(lambda: held.batches)
            for _ in range(5):
                with socket.create_connection(("127.0.0.1", server.port)) as connection:
                    connection.sendall(sent)
                    wait_until(lambda: waiting(server) == len("first") + len("left"))
                wait_until(lambda: waiting(server) == len("first"))
        assert first.result()[0] == 200
        assert server.post(request(input="second"))[0] == 200
        assert server.metric('secateur_requests_total{path="/v1/embeddings",status="499"}') == 5
    assert sum(len(batch) for batch in held.batches) == 2


def test_a_batch_that_fails_fails_only_whom_it_must(encoder: Encoder, model: SentenceTransformer):
    held = Held(encoder)
    held.poison = int(model.tokenizer("?")["input_ids"][0])
    texts = ["what? " if i == 3 else f"text {i}" for i in range(8)]
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(8) as clients:
        with holding(held):
            asked = [clients.submit(server.post, request(input=text)) for text in texts]
            wait_until(lambda: waiting(server) == 8 * 6)
        answers = [answer.result() for answer in asked]
        assert [status for status, _ in answers] == [200, 200, 200, 500, 200, 200, 200, 200]
        assert refused(500, answers[3]) == {
            "message": "the model failed on these texts",
            "type": "server_error",
            "param": None,
            "code": "encoding_failed",
        }
        found = [json.loads(answer)["data"][0]["embedding"] for status, answer in answers if status == 200]
        held.failures = 1  # a failure that passes is not noticed
        assert server.post(request())[0] == 200
    others = [text for i, text in enumerate(texts) if i != 3]
    np.testing.assert_allclose(np.array(found), model.encode(others), atol=1e-5)


def test_a_batch_too_large_for_the_memory_is_halved_until_it_fits(encoder: Encoder, model: SentenceTransformer):
    held = Held(encoder)
    held.room = 24  # tokens: two texts
    texts = [f"text number {i:02}"[-10:] for i in range(32)]
    with running(make_app(held, "tiny", limits())) as server, server.client() as client:
        found = vectors(client.embeddings.create(model="tiny", input=texts))
        assert server.metric("secateur_batch_errors_total") == 0
        held.room = 5  # not even one
        assert refused(500, server.post(request(input=texts)))["code"] == "encoding_failed"
    np.testing.assert_allclose(found, model.encode(texts), atol=1e-5)


@pytest.mark.parametrize("kind", ["folder", "exported"])
def test_a_text_has_one_vector_alone_beside_long_ones_and_a_hundred_times_at_once(
    request: pytest.FixtureRequest, model: SentenceTransformer, kind: str
):
    held = Held(worker_of(request.getfixturevalue(kind)).encoder)
    texts = ["short", "a text of some thirty letters.", "long, " * 20, "tiny"]
    expected = model.encode(texts)
    with (
        running(make_app(held, "tiny", limits())) as server,
        server.client() as client,
        ThreadPoolExecutor(104) as clients,
    ):
        ask = partial(client.embeddings.create, model="tiny")
        with holding(held):
            asked = [clients.submit(ask, input=texts) for _ in range(100)]
            alone = [clients.submit(ask, input=text) for text in texts]
            wait_until(lambda: waiting(server) == 101 * sum(map(len, texts)))
        for answer in asked:
            np.testing.assert_allclose(vectors(answer.result()), expected, atol=1e-5)
        found = np.concatenate([vectors(answer.result()) for answer in alone])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert max(len(batch) * max(map(len, batch)) for batch in held.batches) <= held.batch_tokens


def test_a_server_told_to_end_finishes_what_it_took(encoder: Encoder):
    held = Held(encoder)
    held.batch_tokens = 16
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(10) as clients:
        with holding(held):
            asked = [clients.submit(server.post, request(input=f"text {i}")) for i in range(10)]
            wait_until(lambda: waiting(server) == 60)
            server.server.should_exit = True
            wait_until(lambda: refuses_connections(server.port))
        assert [answer.result()[0] for answer in asked] == [200] * 10
        server.thread.join(300)
        with pytest.raises(urllib.error.URLError):
            server.get("/health")


def refuses_connections(port: int) -> bool:
    with socket.socket() as connection:
        return connection.connect_ex(("127.0.0.1", port)) != 0


def test_a_second_signal_answers_who_waits_and_ends_at_once(encoder: Encoder, caplog):
    held = Held(encoder)
    held.batch_tokens = 16
    with running(make_app(held, "tiny", limits())) as server, ThreadPoolExecutor(4) as clients, holding(held):
        asked = [clients.submit(server.post, request(input=f"text {i}")) for i in range(4)]
        wait_until(lambda: waiting(server) == 24)
        server.server.handle_exit(signal.SIGINT, None)
        server.server.handle_exit(signal.SIGINT, None)
        assert [refused(503, answer.result())["code"] for answer in asked] == ["shutdown"] * 4
        server.thread.join(300)
        assert not server.thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info or "Traceback" in record.getMessage()]


def arrived(server: Running, count: int = 1) -> bool:
    """Whether so many connections hold a part of a request's headers."""
    return sum(bool(connection.conn.trailing_data[0]) for connection in server.connections) == count


def test_headers_that_trickle_are_cut_off(encoder: Encoder):
    with running(make_app(encoder, "tiny", limits())) as server:
        for first in (b"", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"):
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
                answer = b""
                if first:
                    connection.sendall(first)
                    while not answer.endswith(b'{"status":"ok"}'):
                        answer += connection.recv(65536)
                    server.forward(40)  # between requests it may rest for longer
                connection.sendall(b"GET /health HTTP/1.1\r\n")
                wait_until(lambda: arrived(server))
                server.forward(20)
                connection.sendall(b"X: 1\r\n")
                wait_until(lambda: server.connections[0].conn.trailing_data[0].endswith(b"X: 1\r\n"))
                server.forward(11)
                while chunk := connection.recv(65536):
                    answer += chunk
            head, _, body = answer[answer.index(b"HTTP/1.1 408") :].decode().partition("\r\n\r\n")
            assert refused(408, (408, body))["message"] == "the headers came too slowly"
            assert f"Content-Length: {len(body)}" in head
            assert answer.count(b"200 OK") == bool(first)
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as silent:
            wait_until(lambda: server.connections)
            server.forward(31)
            assert silent.recv(100) == b""
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        with contextlib.closing(kept):
            for _ in range(2):
                kept.request("GET", "/health")
                assert kept.getresponse().read() == b'{"status":"ok"}'
                server.forward(40)


def send_and_read_nothing(server: Running, connection: socket.socket, texts: int, buffer: int = 4096) -> None:
    body = request(input=[[5]] * texts)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)


def test_who_does_not_read_is_left(encoder: Encoder, caplog):
    left = 'secateur_requests_total{path="/v1/embeddings",status="499"}'
    app = make_app(encoder, "tiny", limits(max_items=5000))
    with running(app, send_buffer=4096) as server, socket.socket() as pieces, socket.socket() as whole:
        for connection, texts in ((pieces, 5000), (whole, 1000)):
            send_and_read_nothing(server, connection, texts)

        def unread() -> int:
            return sum(connection.transport.get_write_buffer_size() > 0 for connection in server.connections)

        wait_until(lambda: unread() == 2)
        while unread():  # the operating system may take a little more in between
            server.forward(31)
            time.sleep(0.05)
        wait_until(lambda: server.metric(left) == 2)
    assert not caplog.records


def test_who_reads_slowly_gets_all(encoder: Encoder):
    app = make_app(encoder, "tiny", limits(max_items=5000))
    with running(app, send_buffer=4096) as server, socket.socket() as connection:
        send_and_read_nothing(server, connection, 5000, 1 << 16)
        answer = connection.recv(1 << 16)
        for _ in range(5):
            server.forward(20)
            answer += connection.recv(1 << 18)
        while chunk := connection.recv(1 << 18):
            answer += chunk
    assert answer.endswith(b"0\r\n\r\n")


@pytest.mark.slow  # a process starts
def test_what_an_encoder_process_cannot_open_is_told(tmp_path: Path):
    process = EncoderProcess(partial(open_worker, Opening(str(tmp_path / "none"))))
    with contextlib.closing(process), pytest.raises(SecateurError, match="no such file or folder"):
        process.restart()
    assert not process.ready()


@pytest.mark.slow  # six processes start, two at a time
def test_workers_that_hang_or_die_are_replaced_and_no_request_is_lost(
    encoder: Encoder, folder: Path, exported: Path, model: SentenceTransformer, caplog
):
    restarts: list[int] = []
    make = [partial(worker_of, served) for served in (folder, exported)]
    workers = [EncoderProcess(one, lambda: restarts.append(1), silence=2.0) for one in make]
    texts = [f"text {i:02}" for i in range(12)]
    expected = model.encode(texts)
    one_by_one = Held(encoder)
    one_by_one.batch_tokens = 16
    app = make_app(one_by_one, "tiny", limits(timeout=120), processes=workers)
    with running(app) as server, server.client(timeout=120) as client, ThreadPoolExecutor(12) as clients:

        def send(number: int) -> None:
            for worker in workers:
                os.kill(worker.pid, number)

        def ask() -> list[Future]:
            return [clients.submit(client.embeddings.create, model="tiny", input=text) for text in texts]

        def check(answers: list[Future]) -> None:
            found = np.concatenate([vectors(answer.result()) for answer in answers])
            np.testing.assert_allclose(found, expected, atol=1e-5)

        assert refused(503, server.get("/ready"))["code"] == "not_ready"  # they have not loaded yet
        wait_until(lambda: all(worker.ready() for worker in workers))
        send(signal.SIGSTOP)
        answers = ask()
        wait_until(lambda: waiting(server) == 12 * 7)
        send(signal.SIGKILL)  # each holds a batch
        check(answers)
        assert len(restarts) == server.metric("secateur_batch_errors_total") == 2
        assert any("code -9" in str(vars(record)) for record in caplog.records)

        wait_until(lambda: all(worker.ready() for worker in workers))
        send(signal.SIGSTOP)
        answers = ask()
        wait_until(lambda: server.get("/ready")[0] == 503)
        check(answers)  # by the new ones
        wait_until(lambda: server.get("/ready")[0] == 200)
    assert len(restarts) == 4
    assert any("no sign of life" in str(vars(record)) for record in caplog.records)
    with pytest.raises(EncoderDied):
        workers[0].encode_batch(numbers(3))


class Stuck:
    """An encoder for a process: the first that is made on a machine never ends a batch that has a 7 in it."""

    def __init__(self, file: Path) -> None:
        self._first = not file.exists()
        file.touch()

    def encode_batch(self, batch: Sequence[Tokens]) -> Vectors:
        while self._first and any(7 in tokens.ids for tokens in batch):
            time.sleep(0.1)
        return np.array([[tokens.ids[0]] for tokens in batch], dtype=np.float32)


class Function(Encoder):
    """An encoder of small numbers: a function of its batches."""

    name, dimension, max_length, batch_tokens = "function", 1, 40, 200

    def __init__(self, run: Callable[[Sequence[Tokens]], Vectors] = lambda batch: np.zeros((len(batch), 1))) -> None:
        self.run = run  # type: ignore[method-assign]

    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        raise NotImplementedError

    def run(self, batch: Sequence[Tokens]) -> Vectors:
        raise NotImplementedError


def batcher_of(encoder: Encoder, workers: int | Sequence[EncoderProcess] = 1, **options: object) -> Batcher:
    takers = [LocalWorker(encoder)] * workers if isinstance(workers, int) else workers
    return Batcher(encoder, takers, ThreadPoolExecutor(len(takers)), limits(**options), Metrics())


@pytest.mark.slow  # two processes start
def test_a_batch_that_never_ends_is_repeated_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr("secateur.inference.queueing.LEAST_PATIENCE", 2.0)

    async def everything(process: EncoderProcess) -> None:
        batcher = batcher_of(Function(), [process])
        async with batcher.running():
            for first in (3, 7):
                found = await batcher.embed([Tokens(np.array([first], dtype=np.int32))])
                assert found.tolist() == [[first]]

    with contextlib.closing(EncoderProcess(partial(Stuck, tmp_path / "made"))) as process:
        asyncio.run(asyncio.wait_for(everything(process), 300))
    problems = [record.facts["problem"] for record in caplog.records if record.getMessage() == "batch failed"]
    assert problems
    assert all("an encoder process was at one batch for too long" in problem for problem in problems)


# The queue by itself


def numbers(*lengths: int, prompt: int = 0) -> list[Tokens]:
    return [Tokens(np.zeros(length, dtype=np.int32), prompt) for length in lengths]


@pytest.mark.parametrize(
    ("texts", "budget", "lengths"),
    [
        (numbers(20, 100, 17, 3, 24, 22), 72, [20, 17, 22]),
        (numbers(20, 100, 17, 3, 24, 16, 22), 1000, [20, 17, 24, 16, 22]),
        (numbers(*[120] * 9, 100), 2000, [*[120] * 9, 100]),
        (numbers(200, 3), 96, [200]),
        ([*numbers(5), *numbers(5, prompt=2), *numbers(6)], 96, [5, 6]),
    ],
)
def test_a_batch_is_the_first_text_and_those_nearest_to_it_in_length(
    texts: list[Tokens], budget: int, lengths: list[int]
):
    batches: list[Sequence[Tokens]] = []
    encoder = Function(lambda batch: batches.append(batch) or np.zeros((len(batch), 1)))
    encoder.batch_tokens, encoder.max_length = budget, 256

    async def everything() -> None:
        batcher = batcher_of(encoder)
        asked = [asyncio.ensure_future(batcher.embed([text])) for text in texts]
        await asyncio.sleep(0)
        async with batcher.running():
            await asyncio.gather(*asked)

    asyncio.run(everything())
    assert sorted(map(len, batches[0])) == sorted(lengths)


def test_every_text_gets_its_own_vector_whatever_fails_or_leaves():
    rng = np.random.default_rng(0)

    def encode(batch: Sequence[Tokens]) -> Vectors:
        if rng.random() < 0.1:
            raise RuntimeError
        return np.array([[tokens.ids[0], len(tokens)] for tokens in batch], dtype=np.float32)

    async def ask(batcher: Batcher, number: int) -> bool:
        texts = [Tokens(np.full(1 + (number * 7 + i) % 40, number * 10 + i, dtype=np.int32)) for i in range(number % 4)]
        texts = texts or numbers(3)
        asked = asyncio.ensure_future(batcher.embed(texts))
        if number % 10 == 7:
            await asyncio.sleep(0)
            asked.cancel()
        try:
            found = await asked
        except asyncio.CancelledError:
            return True
        except ApiError:
            return False
        assert found.tolist() == [[text.ids[0], len(text)] for text in texts]
        return True

    async def everything() -> list[bool]:
        encoder = Function(encode)
        encoder.dimension = 2
        batcher = batcher_of(encoder, workers=2, queue_tokens=10**6)
        async with batcher.running():
            outcomes = await asyncio.gather(*(ask(batcher, number) for number in range(1000)))
            assert batcher.ready
        return outcomes

    assert sum(asyncio.run(everything())) >= 950


def test_a_queue_takes_one_request_of_any_size_and_then_only_what_fits():
    async def everything() -> None:
        batcher = batcher_of(Function(), queue_tokens=10)
        first = asyncio.ensure_future(batcher.embed(numbers(20)))
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="busy"):
            await batcher.embed(numbers(1))
        async with batcher.running():
            await first
            await batcher.embed(numbers(1))

    asyncio.run(everything())


# The process, its log, its options


@pytest.mark.parametrize(
    ("workers", "backend"),
    [("0", "torch"), ("0", "openvino"), pytest.param("1", "openvino", marks=pytest.mark.slow)],
)
def test_the_command_serves_logs_json_without_texts_and_ends_well(
    folder: Path, model: SentenceTransformer, tmp_path: Path, workers: str, backend: str
):
    if backend != "torch":
        pytest.importorskip(backend)
    log = tmp_path / "log"
    secret = "a text that nobody should read"
    environment = os.environ | {API_KEYS: "sesame-open"}
    command = [sys.executable, "-m", "secateur", "serve", str(folder), "--port", "0", "--device", "cpu"]
    command += ["--workers", workers, "--backend", backend]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, env=environment)
    try:
        wait_until(lambda: '"serving"' in log.read_text() or process.poll() is not None)
        first = json.loads(log.read_text().splitlines()[1])
        address = f"{first['address']}/v1"
        with openai.OpenAI(base_url=address, api_key="sesame-open", max_retries=9) as client:
            answer = client.embeddings.with_raw_response.create(model="tiny", input=[secret, "two"])
            with pytest.raises(openai.BadRequestError):
                client.embeddings.create(model="tiny", input=secret * 100)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        process.kill()
    assert first["backend"] == backend
    assert first["told"].startswith(f"{backend} ")
    expected = model.encode([secret, "two"])
    given = np.array([row.embedding for row in answer.parse().data])
    assert paired_cosines(given, expected).min() >= 0.9999
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["event"] for line in lines] == ["starting", "serving", "request", "request", "ended"]
    told = lines[2]
    assert told["request"] == answer.headers["x-request-id"]
    assert (told["path"], told["status"], told["texts"], told["tokens"]) == ("/v1/embeddings", 200, 2, len(secret) + 3)
    assert lines[3]["error"] == "text_refused"
    assert secret not in log.read_text()
    assert "sesame" not in log.read_text()


def test_a_traceback_in_the_log_says_where_but_not_what():
    try:
        raise ValueError("a text")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, __file__, 1, "bug", None, sys.exc_info())
    line = JsonLines().format(record)
    assert json.loads(line)["error"] == "ValueError"
    assert "test_serve.py:" in line
    assert "a text" not in line


def test_a_model_that_gives_other_vectors_in_batches_is_not_served(folder: Path):
    model = secateur.open_model(folder, device="cpu")
    model[1].register_forward_pre_hook(
        lambda _, features: (
            (features[0] | {"token_embeddings": features[0]["token_embeddings"].roll(1, 2)},)
            if features[0]["input_ids"].shape[1] % 8 == 0
            else None
        )
    )
    with pytest.raises(ModelError, match="gives other vectors in batches"):
        ModelEncoder(model, "tiny")


def test_an_export_is_served_like_its_model(exported: Path, model: SentenceTransformer):
    encoder = worker_of(exported).encoder
    with running(make_app(encoder, "tiny", limits())) as server:
        client = server.client()
        given = client.embeddings.create(model="tiny", input=[text for text in TEXTS if text.strip()])
        instructed = client.embeddings.create(model="tiny", input="one", extra_body={"prompt": "query"})
        refused = server.post(json.dumps({"model": "tiny", "input": "word " * 5000}).encode())
    expected = model.encode([text for text in TEXTS if text.strip()])
    assert np.array([row.embedding for row in given.data]) == pytest.approx(expected, abs=1e-5)
    assert np.array(instructed.data[0].embedding) == pytest.approx(model.encode("one", prompt_name="query"), abs=1e-5)
    assert refused[0] == 400
    assert "too many" in refused[1]


def test_the_server_and_bulk_encoding_do_not_import_each_other():
    server, bulk = ("middleware", "queueing", "app", "serve"), ("vector_files", "encode")
    package = Path(secateur.__file__).parent / "inference"
    for some, others in ((server, bulk), (bulk, server)):
        for module in some:
            source = (package / f"{module}.py").read_text()
            assert not [other for other in others if f"secateur.inference.{other} import" in source], module


def test_options_that_cannot_be_are_refused_before_anything_is_opened(folder: Path, tmp_path: Path):
    for workers in (0, 1):
        with pytest.raises(ConfigError, match="no device of torch"):
            secateur.serve(folder, device="nonsense", workers=workers)
    with pytest.raises(ConfigError, match="leave one of them out"):
        secateur.serve(folder, auth=False, api_key_file=tmp_path / "keys")
    with pytest.raises(ConfigError, match="timeout"):
        make(ServeOptions, {"model": str(folder), "timeout": "inf"})
