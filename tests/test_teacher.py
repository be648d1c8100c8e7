"""Teachers: models, and servers of the OpenAI embeddings API: our own in its own process, and one that misbehaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from conftest import MakeEncoder
from secateur.errors import ConfigError, ModelError
from secateur.healing import teacher as teachers
from secateur.healing.teacher import CHUNK, COMMON_KEY, KEY, PROBES, Teacher, connect, embed, keep_vectors, open_teacher
from secateur.options import HealOptions, make

TEXTS = ["a hedge", "a longer hedge, cut back.", "q", "葉 🌿"]


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (KEY, COMMON_KEY):
        monkeypatch.delenv(name, raising=False)


def teacher_of(name: object, **given: object) -> Teacher:
    options = make(HealOptions, {"model": "m", "data": ["d"], "out": "o", "teacher": str(name)} | given)
    return open_teacher(options)


def counted(dimension: int = 3) -> tuple[Teacher, list[list[str]]]:
    """A teacher of known vectors, and what it was asked."""
    asked: list[list[str]] = []

    def encode(texts: list[str], prompt: str) -> np.ndarray:
        asked.append(texts)
        return np.array([[len(prompt), len(text), 1 + sum(map(ord, text))] for text in texts], dtype=np.float32)

    return Teacher("counted", "f" * 64, encode), asked


def test_a_text_is_encoded_once_and_found_by_itself_and_its_prompt(tmp_path: Path):
    teacher, asked = counted()
    vectors = keep_vectors(teacher, {"": ["a", "bb", "a"], "find: ": ["bb"]}, tmp_path)
    assert asked == [[*PROBES], ["a", "bb"], ["bb"]]
    rows = np.concatenate([vectors.rows(["bb", "a"], ""), vectors.rows(["bb"], "find: ")])
    assert vectors.read(rows).tolist() == [[0, 2, 197], [0, 1, 98], [6, 2, 197]]
    asked.clear()
    again = keep_vectors(teacher, {"": ["ccc", "a"]}, tmp_path)
    assert asked == [[*PROBES], ["ccc"]]
    assert again.read(again.rows(["ccc", "a", "ccc"], ""))[:, 1].tolist() == [3, 1, 3]
    with pytest.raises(KeyError):
        again.rows(["never seen"], "")


def test_what_a_killed_run_had_encoded_is_kept(tmp_path: Path):
    teacher, asked = counted()
    texts = [f"text {i}" for i in range(CHUNK + 5)]

    def dies(texts: list[str], prompt: str) -> np.ndarray:
        if "text 1024" in texts:
            raise KeyboardInterrupt
        return teacher.encode(texts, prompt)

    with pytest.raises(KeyboardInterrupt):
        keep_vectors(Teacher(teacher.name, teacher.fingerprint, dies), {"": texts}, tmp_path)
    asked.clear()
    told: list[tuple[str, int, int]] = []
    vectors = keep_vectors(teacher, {"": texts}, tmp_path, lambda *step: told.append(step))
    assert asked == [[*PROBES], texts[CHUNK:]]
    assert told == [("teacher", 0, 5), ("teacher", 5, 5)]
    assert vectors.read(vectors.rows(texts, ""))[:, 1].tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_vectors_that_say_nothing_are_refused_and_not_kept(bad: float, tmp_path: Path):
    teacher, _ = counted()

    def encode(texts: list[str], prompt: str) -> np.ndarray:
        vectors = teacher.encode(texts, prompt)
        vectors[[text == "bb" for text in texts]] = bad
        return vectors

    with pytest.raises(ModelError, match='NaN, infinity, or all zeros for "bb"'):
        keep_vectors(Teacher("bad", teacher.fingerprint, encode), {"": ["a", "bb"]}, tmp_path)
    vectors = keep_vectors(teacher, {"": ["bb"]}, tmp_path)
    assert vectors.read(vectors.rows(["bb"], "")).tolist() == [[0, 2, 197]]


def test_a_teacher_of_one_vector_is_refused_before_the_texts(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder("bert")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.LayerNorm):
                layer.weight.zero_()
                layer.bias.fill_(0.5)
    with pytest.raises(ModelError, match="gives different texts the same vector"):
        teacher_of(save(model, tmp_path / "model"), device="cpu")
    asked: list[list[str]] = []

    def same(texts: list[str], prompt: str) -> np.ndarray:
        asked.append(texts)
        return np.full((len(texts), 3), 0.5, dtype=np.float32)

    with pytest.raises(ModelError, match="the same vector for 3 different texts"):
        keep_vectors(Teacher("server", "f" * 64, same), {"": TEXTS}, tmp_path / "kept")
    assert asked == [[*PROBES]]


def test_another_model_behind_the_same_name_is_noticed(tmp_path: Path):
    teacher, _ = counted()
    keep_vectors(teacher, {"": ["a"]}, tmp_path)
    other = Teacher(teacher.name, teacher.fingerprint, lambda texts, _: -teacher.encode(texts, ""))
    with pytest.raises(ModelError, match=r"is not the model that the vectors in .* \(cosine -1.000"):
        keep_vectors(other, {"": ["a"]}, tmp_path)
    wider = Teacher(teacher.name, teacher.fingerprint, lambda texts, _: np.ones((len(texts), 4), dtype=np.float32))
    with pytest.raises(ModelError, match="vectors of 4 numbers, and earlier of 3"):
        keep_vectors(wider, {"": ["a"]}, tmp_path)


def save(model: SentenceTransformer, folder: Path) -> Path:
    model.save(str(folder))
    return folder


def test_a_model_teaches_by_its_own_pooling_and_prompts(make_encoder: MakeEncoder, tmp_path: Path):
    model = make_encoder("llama", prompts={"own": "own: "})
    teacher = teacher_of(save(model, tmp_path / "model"), device="cpu")
    vectors = keep_vectors(teacher, {"": TEXTS, "ask; ": TEXTS}, tmp_path / "kept")
    for prompt in ("", "ask; "):
        expected = model.encode(TEXTS, prompt=prompt)
        assert np.allclose(vectors.read(vectors.rows(TEXTS, teacher.context(prompt))), expected, atol=1e-5)
    model.default_prompt_name = "own"
    by_default = teacher_of(save(model, tmp_path / "prompted"), device="cpu")
    assert np.allclose(by_default.encode(TEXTS, ""), model.encode(TEXTS, prompt="own: "), atol=1e-5)
    with pytest.raises(ConfigError, match="names a server's model"):
        teacher_of(tmp_path / "model", teacher_model="x")


@pytest.mark.slow
def test_our_own_server_teaches_as_the_model_does(make_encoder: MakeEncoder, tmp_path: Path, monkeypatch):
    model = make_encoder("llama")
    folder, log = save(model, tmp_path / "tiny"), tmp_path / "log"
    command = [sys.executable, "-m", "secateur", "serve", str(folder), "--port", "0", "--device", "cpu"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream, env=os.environ | {"SECATEUR_API_KEYS": "sesame-open"})
    try:
        wait_until(lambda: '"serving"' in log.read_text() or process.poll() is not None)
        address = f"{json.loads(log.read_text().splitlines()[0])['address']}/v1"
        with pytest.raises(ModelError, match=f"answers 401 .*: set {KEY}"):
            teacher_of(address)
        monkeypatch.setenv(KEY, "sesame-open")
        teacher = teacher_of(address)
        vectors = keep_vectors(teacher, {"find: ": TEXTS}, tmp_path / "kept")
        expected = model.encode([f"find: {text}" for text in TEXTS])
        assert np.allclose(vectors.read(vectors.rows(TEXTS, "find: ")), expected, atol=1e-5)
        with pytest.raises(ModelError, match=r"answers 404 .no such model; this server has tiny"):
            teacher_of(address, teacher_model="nonesuch").encode(["a"], "")
    finally:
        process.terminate()
        process.wait(20)


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
    times: list[float] = field(default_factory=list)
    url: str = ""

    def embed(self, texts: list[str] = TEXTS, **options: object) -> np.ndarray:
        return embed(connect(self.url).with_options(**({"timeout": 5} | options)), "m", texts)


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
            act = state.does.pop(0) if state.does else "well"
            rows = [{"index": i, "embedding": [float(len(text)), 1.0]} for i, text in enumerate(texts)]
            if act == "429":
                self.answer(429, b'{"error": {"message": "slow down"}}', {"Retry-After": "0.3"})
            elif act == "429 tomorrow":
                self.answer(429, b"", {"Retry-After": "86400"})
            elif act in ("400", "500", "503"):
                self.answer(int(act), b'{"error": {"message": "no such thing"}}')
            elif act == "moved":
                self.answer(307, b"", {"Location": f"{state.url}/elsewhere"})
            elif act == "truncated":
                self.answer(200, json.dumps({"data": rows}).encode()[:-5])
            elif act == "broken off":
                self.answer(200, json.dumps({"data": rows}).encode()[:-5], {"Content-Length": "999"})
            elif act == "413 over 2" and len(texts) > 2:
                state.does.insert(0, act)
                self.answer(413, b"")
            elif act == "fewer":
                self.answer(200, json.dumps({"data": rows[:-1]}).encode())
            elif act == "more":
                self.answer(200, json.dumps({"data": [*rows, rows[0]]}).encode())
            elif act == "ragged":
                rows[0]["embedding"] = [1.0]
                self.answer(200, json.dumps({"data": rows}).encode())
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
                state.does[:0] = [act] if act == "413 over 2" else []
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


LENGTHS = [[7, 1], [25, 1], [1, 1], [3, 1]]


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts, where the server does not say how long."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)


def test_what_may_pass_is_asked_for_again(mood: Mood, no_waiting: None):
    mood.does = ["500", "broken off", "slow", "503"]
    assert mood.embed(timeout=0.3).tolist() == LENGTHS
    assert len(mood.requests) == 5
    mood.does = ["503"] * 3
    with pytest.raises(ModelError, match=r"answers 503 \(no such thing\)"):
        mood.embed(max_retries=2)
    assert not mood.does
    mood.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ModelError, match=r"127.0.0.1:9/v1: gives no valid answer \(Connection error.\): with --cache"):
        mood.embed(max_retries=1)


def test_a_server_is_left_alone_for_as_long_as_it_wants(mood: Mood):
    mood.does = ["429"]
    assert mood.embed().tolist() == LENGTHS
    assert mood.times[1] - mood.times[0] >= 0.3
    mood.does = ["429 tomorrow"]
    with pytest.raises(ModelError, match=r"answers 429 .*, and wants to be asked again in or at 86400"):
        mood.embed()


def test_requests_are_small_enough_for_the_server(mood: Mood, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(teachers, "REQUEST_TEXTS", 3)
    mood.does = ["413 over 2"]
    assert mood.embed().tolist() == LENGTHS
    assert [count for _, count in mood.requests] == [3, 2, 1, 1]


@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("fewer", "one vector for each of 4 texts"),
        ("more", r"one vector for each of 4 texts \(.*5 vectors"),
        ("ragged", "one vector for each of 4 texts"),
        ("text", "one vector for each of 4 texts"),
        ("endless", "one vector for each of 4 texts"),
        ("HTML", 'answers with no JSON \\("<!doctype html><title>Welcome to the portal'),
        ("truncated", "gives no valid answer"),
        ("deep", "gives no valid answer"),
        ("400", r"answers 400 \(no such thing\)"),
        ("moved", "answers 307"),
    ],
)
def test_a_wrong_answer_is_told_at_once(act: str, told: str, mood: Mood):
    mood.does = [act]
    with pytest.raises(ModelError, match=told):
        mood.embed()
    assert len(mood.requests) == 1


def test_vectors_of_nan_from_a_server_are_not_kept(mood: Mood, tmp_path: Path):
    mood.does = ["well", "NaN"]
    with pytest.raises(ModelError, match='NaN, infinity, or all zeros for "a hedge"'):
        keep_vectors(teacher_of(mood.url, teacher_model="m"), {"": TEXTS}, tmp_path)
    vectors = keep_vectors(teacher_of(mood.url, teacher_model="m"), {"": TEXTS}, tmp_path)
    assert vectors.read(vectors.rows(TEXTS, "")).tolist() == LENGTHS


def test_keys_and_addresses(mood: Mood, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match=r"teacher_model: the server has 2 models \(one, two\)"):
        teacher_of(mood.url)
    mood.embed(["a"])
    monkeypatch.setenv(COMMON_KEY, "common")
    mood.embed(["a"])
    assert connect("http://far.example/v1").api_key == "none"
    assert connect("https://far.example/v1").api_key == "common"
    monkeypatch.setenv(KEY, "own")
    mood.embed(["a"])
    assert [key for key, _ in mood.requests] == ["Bearer none", "Bearer common", "Bearer own"]
    for address in ("http://me:secret@far.example/v1", "http:///v1"):
        with pytest.raises(ConfigError) as told:
            connect(address)
        assert "secret" not in str(told.value)
