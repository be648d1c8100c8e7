"""The runtime on small graphs that onnx builds by hand: no torch on either side but where it is the reference."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from onnx import TensorProto, helper, numpy_helper
from sentence_transformers.util import quantize_embeddings
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from secateur import runtime
from secateur.errors import ConfigError, DataError, ModelError
from secateur.runtime.core import TextRefused
from secateur.runtime.encoder import FORMATS, quantize

LETTERS = "abcdefghijklmnopqrstuvwxyz :é"
WIDTH = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose vector is the mean of its letters' rows in a table, prompts left out."""
    folder = tmp_path_factory.mktemp("runtime") / "letters"
    (folder / "onnx").mkdir(parents=True)
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(["<pad>", *LETTERS])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(folder / "tokenizer.json"))
    onnx.save(letter_graph(table()), folder / "onnx" / "model.onnx")
    manifest = {
        "kind": "export",
        "backend": "onnx",
        "precision": "float32",
        "quantization": None,
        "graph": "onnx/model.onnx",
        "dimension": WIDTH,
        "max_length": 20,
        "truncation_side": "right",
        "vectors": "float32",
        "ranges": [[-1.0] * WIDTH, [1.0] * WIDTH],
        "prompts": {"query": "q: ", "document": ""},
        "default_prompt_name": None,
        "padding": 0,
        "special": [0],
    }
    (folder / "export.json").write_text(json.dumps(manifest))
    return folder


def table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((len(LETTERS) + 1, WIDTH)).astype(np.float32)


def letter_graph(rows: np.ndarray) -> onnx.ModelProto:
    i64, f32 = TensorProto.INT64, TensorProto.FLOAT
    shape = ["batch", "length"]
    inputs = [helper.make_tensor_value_info(name, i64, shape) for name in ("input_ids", "attention_mask")]
    inputs.append(helper.make_tensor_value_info("prompt_length", i64, [1]))
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["token_embeddings"]),
        helper.make_node("CumSum", ["attention_mask", "one_axis"], ["place"]),
        helper.make_node("Greater", ["place", "prompt_length"], ["is_text"]),
        helper.make_node("Cast", ["is_text"], ["text"], to=f32),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=f32),
        helper.make_node("Mul", ["text", "mask"], ["weights"]),
        helper.make_node("Unsqueeze", ["weights", "last"], ["column"]),
        helper.make_node("Mul", ["token_embeddings", "column"], ["weighted"]),
        helper.make_node("ReduceSum", ["weighted", "middle"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["column", "middle"], ["count"], keepdims=0),
        helper.make_node("Max", ["count", "small"], ["divisor"]),
        helper.make_node("Div", ["total", "divisor"], ["sentence_embedding"]),
    ]
    constants = {"table": rows, "one_axis": np.int64(1), "last": np.array([2]), "middle": np.array([1])}
    constants |= {"small": np.array([1e-9], np.float32), "prompt_length": np.zeros(1, np.int64)}
    outputs = [helper.make_tensor_value_info("sentence_embedding", f32, ["batch", WIDTH])]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "letters", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def mean_of_letters(text: str, limit: int = 20, prompt: str = "") -> np.ndarray:
    ids = [LETTERS.index(letter) + 1 for letter in (prompt + text)[:limit]][len(prompt) :]
    return table()[ids].mean(axis=0) if ids else np.zeros(WIDTH, np.float32)


TEXTS = ["one", "", "a longer text, which is cut".replace(",", ""), "zebra", "é", "one", "x" * 100]


@pytest.mark.parametrize("batching", [{}, {"batch_size": 2}, {"batch_tokens": 1}, {"batch_size": 1}])
def test_each_text_gets_its_own_vector_whatever_it_is_batched_with(folder: Path, batching: dict[str, int]):
    vectors = runtime.load(folder).encode(TEXTS, **batching)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, [mean_of_letters(text) for text in TEXTS], atol=1e-6)


def test_one_text_gives_one_row_and_no_texts_give_none(folder: Path):
    encoder = runtime.load(folder)
    np.testing.assert_allclose(encoder.encode("abc"), mean_of_letters("abc"), atol=1e-6)
    assert encoder.encode([]).shape == (0, WIDTH)


def test_a_prompt_goes_before_each_text_and_is_not_pooled(folder: Path):
    encoder = runtime.load(folder)
    expected = [mean_of_letters(text, prompt="q: ") for text in TEXTS]
    np.testing.assert_allclose(encoder.encode(TEXTS, prompt_name="query"), expected, atol=1e-6)
    for name in (None, "document"):  # sentence-transformers takes the prompt, too
        np.testing.assert_allclose(encoder.encode(TEXTS, prompt="q: ", prompt_name=name), expected, atol=1e-6)
    with pytest.raises(ConfigError, match=r"no prompt 'passage'.*query, document"):
        encoder.encode(TEXTS, prompt_name="passage")


@pytest.mark.parametrize("form", FORMATS)
def test_vectors_in_fewer_bits_are_those_of_sentence_transformers(folder: Path, form: str):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((40, WIDTH)).astype(np.float32)
    vectors[:, 3] = 0.5  # a dimension without a range
    ranges = np.stack([vectors[:20].min(axis=0), vectors[:20].max(axis=0)])
    expected = quantize_embeddings(vectors, precision=form, ranges=ranges)
    found = quantize(vectors, form, ranges)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    from_encoder = runtime.load(folder).encode(["abc"], precision=form)
    assert from_encoder.dtype == expected.dtype


def test_what_is_no_text_is_refused_by_its_place(folder: Path):
    encoder = runtime.load(folder)
    with pytest.raises(DataError, match="number 1 is a int, not a text"):
        encoder.encode(["a", 7])
    with pytest.raises(DataError, match="number 0 holds half of a surrogate pair"):
        encoder.encode(["a\ud800"])
    with pytest.raises(ConfigError, match="bfloat16 is not for an export of onnx in float32"):
        runtime.load(folder, dtype="bfloat16")
    with pytest.raises(ConfigError, match="no such form of vectors as 'int4'"):
        encoder.encode(["a"], precision="int4")
    for no_texts in ({"a": 1}, None, 5, b"a", {"a", "b"}, pd.DataFrame({"text": ["a", "b"]})):
        with pytest.raises(DataError, match="not texts: give one text, or a list of them"):
            encoder.encode(no_texts)
    for no_prompt, says in ((5, "is a int, not a text"), ("a\udcff", "holds half of a surrogate pair")):
        with pytest.raises(DataError, match=f"prompt: {says}"):
            encoder.encode(["a"], prompt=no_prompt)


@pytest.mark.parametrize("side", ["right", "left"])
def test_of_a_long_text_as_much_is_read_as_makes_its_tokens(folder: Path, tmp_path: Path, side: str):
    """Blanks of which the tokenizer makes nothing hide the letters."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(Regex(" +"), "")
    tokenizer.save(str(copy / "tokenizer.json"))
    manifest = json.loads((copy / "export.json").read_text())
    (copy / "export.json").write_text(json.dumps(manifest | {"truncation_side": side}))
    blanks, letters = " " * 50_000, "abcdefghijklmnopqrst"
    texts = {
        f"{letters}{'x' * 50_000}": letters if side == "right" else "x" * 20,
        f"{'x' * 50_000}{letters}": letters if side == "left" else "x" * 20,
        f"{blanks}{letters}{blanks}": letters,
        f"abc{blanks}def": "abcdef",
        f"one{blanks}": "one",
        "short": "short",
    }
    found = runtime.load(copy).encode(list(texts))
    np.testing.assert_allclose(found, [mean_of_letters(text) for text in texts.values()], atol=1e-6)


def test_of_a_text_that_is_far_too_long_the_start_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    encoder, seen = runtime.load(folder), []
    read = encoder.read
    monkeypatch.setattr(encoder, "read", lambda texts, *rest: seen.extend(map(len, texts)) or read(texts, *rest))
    with pytest.raises(TextRefused, match="tokens are too many: the model reads at most 20"):
        encoder.tokenize(["x" * 1_000_000], truncate=False)
    assert sum(seen) < 10_000
    (exact,) = encoder.tokenize(["x" * 20], truncate=False)
    assert len(exact) == 20


def test_vectors_that_are_not_finite_are_refused(folder: Path, tmp_path: Path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    rows = table()
    rows[LETTERS.index("z") + 1] = np.inf
    onnx.save(letter_graph(rows), copy / "onnx" / "model.onnx")
    encoder = runtime.load(copy)
    assert np.isfinite(encoder.encode(["abc", ""])).all()
    with pytest.raises(ModelError, match="copy: gives vectors that are not finite"):
        encoder.encode(["abc", "zebra"], precision="int8")


def test_a_folder_that_is_no_export_is_refused(folder: Path, tmp_path: Path):
    says = f"model {tmp_path}: {tmp_path / 'export.json'}: no such file: give a folder that secateur export wrote"
    with pytest.raises(ModelError, match=f"^{re.escape(says)}$"):
        runtime.load(tmp_path)
    with pytest.raises(ModelError, match=r"nobody-here.*no such file"):
        runtime.load("~nobody-here/exported")
    (tmp_path / "export.json").write_text('{"kind": "profile"}')
    with pytest.raises(ModelError, match="is no manifest of an export"):
        runtime.load(tmp_path)
    manifest = json.loads((folder / "export.json").read_text())
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="no such file"):
        runtime.load(tmp_path)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"half a gra")
    with pytest.raises(ModelError, match="ONNX Runtime cannot open it"):
        runtime.load(tmp_path)
    (tmp_path / "export.json").write_text(json.dumps(manifest | {"backend": "abacus"}))
    with pytest.raises(ModelError, match="for the backend 'abacus'"):
        runtime.load(tmp_path)
    del manifest["padding"]
    (tmp_path / "export.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="has no 'padding'"):
        runtime.load(tmp_path)


ALONE = """
import sys, time
start = time.perf_counter()

class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in set(sys.argv[2].split()):
            raise ImportError(f"{name} is forbidden")

sys.meta_path.insert(0, Forbid())
from secateur import runtime
vector = runtime.load(sys.argv[1]).encode("abc")
assert vector.shape == (12,)
outside = {name.split(".")[0] for name, module in sys.modules.items() if getattr(module, "__file__", None)}
print(" ".join(sorted(outside - set(sys.stdlib_module_names))))
"""


def test_it_runs_with_tokenizers_numpy_and_onnxruntime_alone(folder: Path):
    forbidden = "torch transformers sentence_transformers safetensors pydantic pandas scipy huggingface_hub yaml"
    command = [sys.executable, "-c", ALONE, str(folder), forbidden]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert {"secateur", "numpy", "tokenizers", "onnxruntime"} <= set(done.stdout.split())
