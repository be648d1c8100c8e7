"""Teachers: models, and servers of the OpenAI embeddings API: our own in its own process, and one that misbehaves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from conftest import MakeEncoder
from secateur.data.embedders import COMMON_KEY, KEY, connect
from secateur.data.vectors import CHUNK, PROBES
from secateur.errors import ModelError
from secateur.healing.teacher import Teacher, keep_vectors, open_teacher
from secateur.options import HealOptions, make
from servers import Mood, serving
from servers import mood as mood
from servers import no_waiting as no_waiting

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


@pytest.mark.slow
def test_our_own_server_teaches_as_the_model_does(make_encoder: MakeEncoder, tmp_path: Path, monkeypatch):
    model = make_encoder("llama")
    with serving(save(model, tmp_path / "tiny"), tmp_path / "log", key="sesame-open") as address:
        with pytest.raises(ModelError, match=f"answers 401 .*: set {KEY}"):
            teacher_of(address)
        monkeypatch.setenv(KEY, "sesame-open")
        teacher = teacher_of(address)
        vectors = keep_vectors(teacher, {"find: ": TEXTS}, tmp_path / "kept")
        expected = model.encode([f"find: {text}" for text in TEXTS])
        assert np.allclose(vectors.read(vectors.rows(TEXTS, "find: ")), expected, atol=1e-5)
        with pytest.raises(ModelError, match=r"answers 404 .no such model; this server has tiny"):
            teacher_of(f"{address}#nonesuch").encode(["a"], "")


LENGTHS = [[7, 10], [25, 10], [1, 10], [3, 10]]


def test_what_may_pass_is_asked_for_again(mood: Mood, no_waiting: None):
    mood.does = ["500", "broken off", "slow", "503"]
    assert mood.embed(TEXTS, timeout=0.3).tolist() == LENGTHS
    assert len(mood.requests) == 5
    mood.does = ["503"] * 3
    with pytest.raises(ModelError, match=r"answers 503 \(no such thing\)"):
        mood.embed(TEXTS, max_retries=2)
    assert not mood.does
    mood.url = "http://127.0.0.1:9/v1"
    with pytest.raises(ModelError, match=r"127.0.0.1:9/v1: cannot be reached \(.*refused\)$"):
        mood.embed(TEXTS)  # at once
    mood.url = "http://127.0.0.1:99999/v1"
    with pytest.raises(ModelError, match=r"127.0.0.1:99999/v1: cannot be reached \(Port out of range 0-65535\)$"):
        mood.embed(TEXTS)


def test_a_server_is_left_alone_for_as_long_as_it_wants(mood: Mood):
    mood.does = ["429"]
    assert mood.embed(TEXTS).tolist() == LENGTHS
    assert mood.times[1] - mood.times[0] >= 0.3
    mood.does = ["429 tomorrow"]
    with pytest.raises(ModelError, match="answers 429"):
        mood.embed(TEXTS)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        ("fewer", "one vector for each of 4 texts"),
        ("more", r"one vector for each of 4 texts \(.*5 vectors"),
        ("ragged", "one vector for each of 4 texts"),
        ("text", "one vector for each of 4 texts"),
        ("endless", "one vector for each of 4 texts"),
        ("HTML", "one vector for each of 4 texts .*: an endpoint is named"),
        ("truncated", "gives no valid answer"),
        ("deep", "gives no valid answer"),
        ("400", r"answers 400 \(no such thing\)"),
        ("moved", "answers 307"),
    ],
)
def test_a_wrong_answer_is_told_at_once(act: str, told: str, mood: Mood):
    mood.does = [act]
    with pytest.raises(ModelError, match=told):
        mood.embed(TEXTS)
    assert len(mood.requests) == 1


def test_vectors_of_nan_from_a_server_are_not_kept(mood: Mood, tmp_path: Path):
    mood.does = ["well", "NaN"]
    with pytest.raises(ModelError, match='a vector with NaN or infinity for "a longer hedge'):
        keep_vectors(teacher_of(f"{mood.url}#m"), {"": TEXTS}, tmp_path)
    vectors = keep_vectors(teacher_of(f"{mood.url}#m"), {"": TEXTS}, tmp_path)
    assert vectors.read(vectors.rows(TEXTS, "")).tolist() == LENGTHS


def test_keys_and_addresses(mood: Mood, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelError, match=r"has 2 models \(one, two\): name one: http.*/v1#NAME"):
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
        with pytest.raises(ModelError) as told:
            connect(address)
        assert "secret" not in str(told.value)
