"""Backends: the same vectors, converted once, kept, and never others in silence; on tiny random models."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from conftest import LETTERS
from forked import forked_encoders as forked_encoders
from secateur import encode
from secateur.cli import app
from secateur.errors import ConfigError, MissingPackage, ModelError
from secateur.exporting import convert
from secateur.inference import backends
from secateur.inference.backends import choose, open_encoder
from secateur.inference.encoders import Opening
from secateur.measures.metrics import paired_cosines
from test_encode import MIXED, interrupted, same, tiny_encoder, vectors_of, write_lines

pytest.importorskip("openvino")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with a conversion for OpenVINO that has been measured; to be read only."""
    folder = shutil.copytree(original, tmp_path_factory.mktemp("converted") / "tiny")
    choose(Opening(str(folder), backend="openvino", device="cpu"), 0.9999)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "tiny")


@pytest.fixture
def ready(converted: Path, tmp_path: Path) -> Path:
    """A copy of the model with its conversion, said to be far quicker than PyTorch, as no timing may decide here."""
    folder = shutil.copytree(converted, tmp_path / "ready")
    for record in (folder / "conversions").glob("*.json"):
        record.write_text(json.dumps({"float32": {"cosine": 0.999999, "gain": 100.0}}))
    return folder


@pytest.fixture
def reference(original: Path) -> SentenceTransformer:
    return SentenceTransformer(str(original), device="cpu")


def kept(model: Path) -> list[str]:
    """Names of conversions, without what tells what they were made of."""
    return sorted("-".join(path.name.split("-")[:2]) for path in (model / "conversions").glob("*/"))


@pytest.mark.parametrize("backend", ["torch", "onnx", "openvino"])
def test_the_vectors_are_those_of_the_model_whatever_runs_it(
    model: Path, converted: Path, reference: SentenceTransformer, tmp_path: Path, backend: str
):
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    file = write_lines(tmp_path / "a.jsonl", MIXED)
    folder = converted if backend == "openvino" else model
    done = encode(folder, [file], out=tmp_path / "v.npy", backend=backend, dtype="float32", prompt_name="query")
    assert (done.backend, done.dtype) == (backend, "float32")
    same(vectors_of(done.file), reference.encode(list(MIXED), prompt_name="query"))
    encoder = open_encoder(Opening(str(folder), backend=backend, dtype="float32", device="cpu"))
    together = encoder.encode_texts(MIXED)
    alone = np.concatenate([encoder.encode_texts([text]) for text in MIXED])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    same(together, reference.encode(list(MIXED)))


def test_what_is_converted_is_kept_and_used_by_small_jobs(model: Path, ready: Path, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    done = encode(model, [file], out=tmp_path / "a.npy")
    assert (done.backend, done.dtype) == ("torch", "float32")
    assert not (model / "conversions").exists(), "a small job does not wait for a conversion"
    before = sorted((ready / "conversions").rglob("*"))
    done = encode(ready, [file], out=tmp_path / "b.npy")
    assert (done.backend, done.dtype) == ("openvino", "float32")
    assert done.told == "openvino float32: 100.0 times as fast as torch float32, cosine at least 1.00000"
    assert sorted((ready / "conversions").rglob("*")) == before
    same(vectors_of(tmp_path / "b.npy"), vectors_of(tmp_path / "a.npy"))


def test_a_kept_conversion_that_does_not_keep_the_cosine_is_not_taken(ready: Path, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    (record,) = (ready / "conversions").glob("*.json")
    record.write_text(json.dumps({"float32": {"cosine": 0.99, "gain": 100.0}}))
    assert encode(ready, [file], out=tmp_path / "a.npy").backend == "torch"
    assert encode(ready, [file], out=tmp_path / "b.npy", min_cosine=0.98).backend == "openvino"


def test_a_large_job_waits_for_a_conversion(model: Path, reference, tmp_path: Path, monkeypatch):
    """Where a conversion is said to take no time."""
    monkeypatch.setattr(backends, "CONVERSION_SECONDS", 0.0)
    monkeypatch.setattr(backends, "PARAMETER_SECONDS", 0.0)
    texts = [f"{i} {'word ' * (i % 40)}" for i in range(2100)]
    done = encode(model, [write_lines(tmp_path / "a.jsonl", texts)], out=tmp_path / "v.npy", prompt_name="query")
    assert "openvino-float32" in kept(model)  # and ONNX, where that was no faster than PyTorch
    (record,) = (model / "conversions").glob("openvino-*.json")
    measured = json.loads(record.read_text())
    assert set(measured) == {"bfloat16", "float32"}, "both are measured, of one conversion"
    if done.backend == "openvino":
        assert measured[done.dtype]["cosine"] >= 0.9999
        assert f"{measured[done.dtype]['gain']:.1f} times as fast" in done.told
    same(vectors_of(done.file), reference.encode(texts, prompt_name="query"))


def test_int8_is_let_in_by_a_lower_cosine_and_calibrated_on_the_texts(model: Path, reference, tmp_path: Path):
    pytest.importorskip("nncf")
    rng = random.Random(0)
    texts = ["".join(rng.choices(LETTERS, k=rng.randint(5, 40))) for _ in range(40)]
    file = write_lines(tmp_path / "a.jsonl", texts)
    done = encode(model, [file], out=tmp_path / "v.npy", backend="openvino", dtype="int8", min_cosine=0.5)
    assert (done.backend, done.dtype, kept(model)) == ("openvino", "int8", ["openvino-int8"])
    assert paired_cosines(vectors_of(done.file), reference.encode(texts)).min() > 0.8
    (manifest,) = (model / "conversions").glob("*/export.json")
    assert json.loads(manifest.read_text())["provenance"]["data"][0]["rows"] == 40


def test_a_server_tries_what_may_be_quicker_than_what_is_kept(ready: Path):
    pytest.importorskip("nncf")
    chosen = choose(Opening(str(ready), device="cpu"), 0.98)
    assert "100.0 times" not in chosen.told, "what was measured for a run was not after every prompt"
    assert {"openvino-float32", "openvino-int8"} <= set(kept(ready))  # and others, where int8 is not the quickest
    again = choose(Opening(str(ready), device="cpu"), 0.98)
    assert again.opening == chosen.opening or chosen.opening.backend == "torch"


def test_what_is_not_installed(model: Path, ready: Path, tmp_path: Path, monkeypatch):
    found = convert.find_spec
    monkeypatch.setattr(convert, "find_spec", lambda name: None if name == "openvino" else found(name))
    with pytest.raises(MissingPackage, match=r"pip install 'secateur\[openvino\]'"):
        choose(Opening(str(model), backend="openvino", device="cpu"), 0.9999)
    with pytest.raises(MissingPackage, match=r"pip install 'secateur\[openvino\]'"):
        choose(Opening(str(model), backend="openvino", dtype="float32", device="cpu"), 0.9999)
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    assert encode(ready, [file], out=tmp_path / "v.npy").backend == "torch"


def test_a_conversion_that_fails_is_told_once_and_not_tried_again(model: Path, reference, monkeypatch):
    tried = []

    def fail(*_: object) -> None:
        tried.append(1)
        raise RuntimeError("no such operation\nand more")

    monkeypatch.setattr(convert, "_write_openvino", fail)
    monkeypatch.setattr(convert, "_write_onnx", fail)
    chosen = choose(Opening(str(model), device="cpu"), 0.9999)
    assert chosen.opening.backend == "torch"
    assert "openvino bfloat16 failed (no such operation)" in chosen.told
    before = len(tried)
    assert "failed before (no such operation)" in choose(Opening(str(model), device="cpu"), 0.9999).told
    assert len(tried) == before
    assert kept(model) == []
    with pytest.raises(ModelError, match=r"cannot be converted for openvino .*no such operation"):
        choose(Opening(str(model), backend="openvino", device="cpu"), 0.9999)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_conversion_that_gives_other_vectors_is_never_used(model: Path, monkeypatch, dtype: str):
    monkeypatch.setattr("secateur.exporting.export.longest_text", lambda _: 60)  # the model cuts at 64
    with pytest.raises(ModelError, match=r"cannot be converted for openvino .*least cosine"):
        choose(Opening(str(model), backend="openvino", dtype=dtype, device="cpu"), 0.9999)
    assert kept(model) == []


def test_a_model_that_changed_does_not_get_the_vectors_of_its_old_conversion(ready: Path, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two and more"])
    (old,) = (ready / "conversions").glob("*/")
    opened = SentenceTransformer(str(ready), device="cpu")
    with torch.no_grad():
        for block in opened[0].auto_model.layers:
            block.mlp.down_proj.weight.mul_(-3)
    opened.save(str(ready))
    expected = opened.encode(["one", "two and more"])
    small = encode(ready, [file], out=tmp_path / "a.npy")
    assert small.backend == "torch"
    same(vectors_of(small.file), expected)
    (left := old.with_name(f"{old.name}.partial")).mkdir()  # of a conversion that was killed
    again = encode(ready, [file], out=tmp_path / "b.npy", backend="openvino", dtype="float32")
    same(vectors_of(again.file), expected)
    assert not old.exists() and not left.exists(), "nobody needs it any more"
    assert kept(ready) == ["openvino-float32"]


def test_where_the_model_cannot_be_written_the_conversion_is_in_the_cache(model: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (model / "conversions").write_text("a file is in the way, for root may write anywhere")
    chosen = choose(Opening(str(model), backend="openvino", dtype="float32", device="cpu"), 0.9999)
    assert Path(chosen.encoder.name).is_relative_to(tmp_path / "cache" / "secateur")


def test_where_nothing_can_be_written_pytorch_is_taken_unless_another_is_named(model: Path, monkeypatch):
    (model / "conversions").write_text("a file is in the way, for root may write anywhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "conversions"))
    chosen = choose(Opening(str(model), device="cpu"), 0.9999)
    assert chosen.opening.backend == "torch"
    assert "openvino float32 failed (output" in chosen.told
    with pytest.raises(ModelError, match=r"cannot be converted for openvino \(output .*Not a directory"):
        choose(Opening(str(model), backend="openvino", device="cpu"), 0.9999)


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}])
def test_a_resumed_run_keeps_what_it_had_decided(ready: Path, reference, tmp_path: Path, options: dict):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    interrupted(ready, file, tmp_path / "v.npy", **options)
    (record,) = (ready / "conversions").glob("*.json")
    record.unlink()  # so that a new run would take PyTorch
    done = encode(ready, [file], out=tmp_path / "v.npy", **options)
    assert (done.backend, done.dtype) == ("openvino", "float32")
    same(vectors_of(done.file), reference.encode(["one", "two"]))


@pytest.mark.usefixtures("forked_encoders")
def test_workers_elsewhere_take_what_was_decided(ready: Path, reference, tmp_path: Path):
    texts = [f"{i} and so on" for i in range(20)]
    done = encode(ready, [write_lines(tmp_path / "a.jsonl", texts)], out=tmp_path / "v.npy", processes=2)
    assert done.backend == "openvino"
    same(vectors_of(done.file), reference.encode(texts))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backend": "torch", "dtype": "int8"}, "dtype: int8 is not for torch"),
        ({"backend": "openvino", "dtype": "stored"}, "dtype: stored is for torch, not for openvino"),
        ({"backend": "tensorrt"}, "backend: 'tensorrt' is not valid"),
        ({"min_cosine": 2}, "min_cosine"),
    ],
)
def test_what_does_not_go_together(model: Path, tmp_path: Path, options: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        encode(model, [write_lines(tmp_path / "a.jsonl", ["one"])], out=tmp_path / "v.npy", **options)


def test_nothing_on_the_backend_that_keeps_the_cosine_is_an_error(ready: Path):
    with pytest.raises(ModelError, match=r"nothing that was tried keeps a cosine of 1 .*--backend torch"):
        choose(Opening(str(ready), backend="openvino", device="cpu"), 1.0)


def test_the_command_says_what_it_took(ready: Path, tmp_path: Path):
    file = write_lines(tmp_path / "a.jsonl", ["one", "two"])
    told = CliRunner().invoke(app, ["encode", str(ready), str(file), "-o", str(tmp_path / "v.npy")])
    assert "openvino float32: 100.0 times as fast as torch float32" in told.stderr
