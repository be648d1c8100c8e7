"""Models to compare with that secateur did not make: static embeddings, exports, endpoints, and a study with some."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

import secateur
from conftest import MakeEncoder, example_pairs, tiny_transformer, write_pairs
from quick_checks import quick_checks as quick_checks
from secateur.data import vectors
from secateur.data.embedders import COMMON_KEY, KEY, open_embedder
from secateur.data.vectors import PROBES, fingerprint_model
from secateur.errors import ConfigError, ModelError, SecateurError, StudyFailed, UnsupportedArchitecture
from secateur.models import model_label
from secateur.reporting.run import BASELINE, read_run
from secateur.results import Comparison, Costs, load
from servers import Mood, serving
from servers import mood as mood
from servers import no_waiting as no_waiting
from task_folders import example_rows, write_task


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is timed once; no key of the machine is used."""
    monkeypatch.setattr("secateur.reporting.cost.LEAST_SECONDS", 1e-9)
    for name in (KEY, COMMON_KEY):
        monkeypatch.delenv(name, raising=False)


ROWS = [[9.0, 9.0], [3.0, 4.0], [1.0, 0.0], [0.0, 2.0]]
"""Vectors of an unknown word, and of the words oak, ash and elm."""


def static_folder(folder: Path, normalize: bool = False, **tensors: torch.Tensor) -> Path:
    """What model2vec writes."""
    folder.mkdir(parents=True)
    words = models.WordLevel({"[UNK]": 0, "oak": 1, "ash": 2, "elm": 3}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file({"embeddings": torch.tensor(ROWS), **tensors}, folder / "model.safetensors")
    about = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": normalize, "max_length": 4}
    (folder / "config.json").write_text(json.dumps(about))
    kinds = ["StaticEmbedding", "Normalize"] if normalize else ["StaticEmbedding"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else ".", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def encode(name: Path | str, *texts: str) -> list[list[float]]:
    return open_embedder(name, device="cpu").encode(list(texts), show_progress_bar=False).tolist()


def test_a_static_embedding_is_the_mean_of_its_rows(tmp_path: Path):
    plain = static_folder(tmp_path / "plain")
    # The unknown word does not count, and of a text the first four words do.
    assert encode(plain, "oak ash", "fir elm", "fir", "ash ash elm elm oak oak") == [[2, 2], [0, 2], [0, 0], [0.5, 1]]
    unit = static_folder(tmp_path / "unit", normalize=True)
    assert np.allclose(encode(unit, "oak", "oak ash", "fir"), [[0.6, 0.8], [0.5**0.5, 0.5**0.5], [0, 0]])
    folded = {"mapping": torch.tensor([0, 1, 1, 3]), "weights": torch.tensor([1.0, 1.0, 0.5, 2.0])}
    weighted = static_folder(tmp_path / "weighted", **folded)
    assert np.allclose(encode(weighted, "ash", "oak ash elm"), [[1.5, 2], [1.5, (4 + 2 + 4) / 3]])
    (plain / "modules.json").unlink()  # as the first versions of model2vec wrote it
    assert encode(plain, "oak ash") == [[2, 2]]


def test_a_static_embedding_of_sentence_transformers(tmp_path: Path):
    tokenizer = Tokenizer.from_file(str(static_folder(tmp_path / "plain") / "tokenizer.json"))
    module = StaticEmbedding(tokenizer, torch.tensor(ROWS))
    SentenceTransformer(modules=[module], device="cpu", prompts={"query": "oak "}).save(str(tmp_path / "saved"))
    assert encode(tmp_path / "saved", "ash") == [[1, 0]]
    opened = open_embedder(tmp_path / "saved", device="cpu")
    assert opened.encode_query("ash").tolist() == [2, 2]
    assert fingerprint_model(opened) != fingerprint_model(open_embedder(tmp_path / "plain", device="cpu"))


def test_static_embeddings_that_are_not_whole(tmp_path: Path):
    short = static_folder(tmp_path / "short", embeddings=torch.tensor(ROWS[:3]))
    with pytest.raises(ModelError, match="its tokenizer knows 4 tokens, but its table has 3 rows"):
        open_embedder(short)
    torn = static_folder(tmp_path / "torn", embeddings=torch.full((4, 2), torch.nan))
    with pytest.raises(ModelError, match="8 of its weights are not finite"):
        open_embedder(torn)
    with pytest.raises(UnsupportedArchitecture, match="begins with a StaticEmbedding, not with a transformer"):
        secateur.open_model(static_folder(tmp_path / "plain"))


def test_costs_of_a_static_embedding(tmp_path: Path):
    folder = static_folder(tmp_path / "static")
    (row,) = secateur.cost([folder], repetitions=1).rows
    assert (row.model, row.depth, row.parameters, row.embedding_parameters) == ("static", 0, 8, 8)
    assert row.bytes == sum(file.stat().st_size for file in folder.iterdir())
    assert (row.flops_per_token, row.memory_bytes, row.dtype) == (0, 32, "float32")
    assert row.texts_per_second > 0


def test_an_export_beside_its_folder(make_encoder: MakeEncoder, tmp_path: Path):
    make_encoder("llama", prompts={"query": "find: ", "document": ""}).save(str(tmp_path / "tiny"))
    secateur.export(tmp_path / "tiny", out=tmp_path / "onnx")
    tasks = [write_task(tmp_path / kind, kind, example_rows(kind)) for kind in ("sts", "retrieval")]
    out = tmp_path / "out"
    found = secateur.compare([tmp_path / "tiny", tmp_path / "onnx"], tasks=tasks, out=out)
    folder, export = found.scores[:2], found.scores[2:]
    for own, other in zip(folder, export, strict=True):
        assert other.score == pytest.approx(own.score, abs=1e-3)
        assert other.prompts == own.prompts
    assert found.overlaps[0].overlap > 0.99
    one, other = found.costs
    for name in ("depth", "parameters", "embedding_parameters", "short_tokens", "long_tokens"):
        assert getattr(other, name) == getattr(one, name), name
    assert other.bytes == sum(file.stat().st_size for file in (tmp_path / "onnx").rglob("*") if file.is_file())
    assert load(out, Comparison) == found
    graph = next((tmp_path / "onnx").rglob("*.onnx"))
    graph.write_bytes(graph.read_bytes() + b" ")  # another graph is another model
    with pytest.raises(SecateurError):
        secateur.evaluate([tmp_path / "onnx"], tasks, out=out)


# Endpoints ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sts(tmp_path: Path) -> Path:
    return write_task(tmp_path / "sts", "sts", example_rows("sts"))


def test_what_endpoints_are_called():
    assert model_label("https://api.example/v1#org/large") == "large"
    assert model_label("https://api.example/v1#large?query=a/b: ") == "large"
    assert model_label("http://localhost:8000/v1") == "localhost"


def test_an_endpoint_is_scored_by_its_vectors_and_asked_once(mood: Mood, tmp_path: Path):
    # Lengths that no two pairs share: their cosines have one order.
    rows = [{"sentence1": "x" * (3 + i), "sentence2": "y" * (80 - i), "score": 7 * i % 24} for i in range(24)]
    sts = write_task(tmp_path / "lengths", "sts", {"test": rows})
    one, two = (np.array([[len(row[name]), 10.0] for row in rows]) for name in ("sentence1", "sentence2"))
    cosines = (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)
    name, out = f"{mood.url}#m", tmp_path / "out"
    (row,) = secateur.evaluate([name], [sts], out=out).rows
    assert row.score == pytest.approx(spearmanr(cosines, [row["score"] for row in rows]).statistic, abs=1e-4)
    assert (row.model, row.source, row.prompt) == ("m", name, "")
    assert mood.requests[0][1] == len(PROBES)
    distinct = {text for row in rows for text in (row["sentence1"], row["sentence2"])}
    assert sorted(mood.texts[len(PROBES) :]) == sorted(distinct)
    mood.texts.clear()
    assert secateur.evaluate([name], [sts], out=out).rows == (row,)
    assert sorted(mood.texts) == sorted(PROBES)  # whether it is still the same model
    mood.does = ["another"]
    with pytest.raises(ModelError, match=r"is not the model that the vectors in .* are of .*: name another folder"):
        secateur.evaluate([name], [sts], out=out)
    mood.does = ["another"]
    (other,) = secateur.evaluate([name], [sts], out=out, cache=tmp_path / "cache").rows
    assert other.weights != row.weights


def test_prompts_for_an_endpoint_stand_in_its_name(mood: Mood, tmp_path: Path):
    task = write_task(tmp_path / "find", "retrieval", example_rows("retrieval"))
    (row,) = secateur.evaluate([f"{mood.url}#m?query=query: &document=text: "], [task]).rows
    assert row.prompts == ("", "query: ", "text: ")
    sent = mood.texts[len(PROBES) :]
    assert {text.partition(": ")[0] for text in sent} == {"query", "text"}
    assert len(sent) == sum(len((task / name).read_text().splitlines()) for name in ("queries.jsonl", "corpus.jsonl"))
    with pytest.raises(ModelError, match="is given a prompt for passage"):
        secateur.evaluate([f"{mood.url}#m?passage=text: "], [task])


@pytest.mark.parametrize(
    ("does", "told"),
    [
        (["401"], rf"answers 401 \(no such thing\): set {KEY}"),
        (["404"], r"answers 404 \(no such thing\): an endpoint is named https://host/v1#model-name"),
        (["503"] * 9, r"answers 503 \(no such thing\)"),
        (["429 tomorrow"], "answers 429"),
        (["fewer"], "does not answer with one vector for each of"),
        (["NaN"], "gives a vector with NaN or infinity for"),
        (["wide"], "gives vectors of 3 numbers, and earlier of 2"),
    ],
)
def test_what_an_endpoint_had_given_is_kept(
    does: list[str],
    told: str,
    mood: Mood,
    sts: Path,
    tmp_path: Path,
    no_waiting: None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(vectors, "CHUNK", 8)
    mood.does = ["well", "well", "well", *does]
    with pytest.raises(ModelError, match=told) as failed:
        secateur.evaluate([f"{mood.url}#m"], [sts], out=tmp_path / "out")
    assert "\n" not in str(failed.value)
    given = mood.texts[len(PROBES) : len(PROBES) + 16]
    mood.texts.clear()
    (row,) = secateur.evaluate([f"{mood.url}#m"], [sts], out=tmp_path / "out").rows
    assert np.isfinite(row.score)
    assert not set(given) & set(mood.texts)


def test_one_that_is_gone_does_not_take_others_with_it(mood: Mood, sts: Path, tmp_path: Path):
    static, out = static_folder(tmp_path / "static"), tmp_path / "out"
    with pytest.raises(ModelError, match=r"127.0.0.1:9/v1: cannot be reached \(.*refused"):
        secateur.evaluate([static, "http://127.0.0.1:9/v1#m"], [sts], out=out)
    assert [row.model for row in load(out, secateur.results.Scores).rows] == ["static"]


def test_an_endpoint_costs_nobody_knows_what(mood: Mood, sts: Path, tmp_path: Path):
    name = f"{mood.url}#m"
    with pytest.raises(ConfigError, match="what it costs cannot be measured"):
        secateur.cost([name])
    found = secateur.compare([static_folder(tmp_path / "static"), name], tasks=[sts], out=tmp_path / "out")
    assert [row.model for row in found.costs] == ["static"]
    assert [row.model for row in found.scores] == ["static", "m"]
    assert [row.model for row in found.differences] == ["m"]


@pytest.mark.slow
def test_a_server_scores_as_its_folder_does(make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make_encoder("llama").save(str(tmp_path / "tiny"))
    tasks = [write_task(tmp_path / kind, kind, example_rows(kind)) for kind in ("sts", "retrieval", "classification")]
    monkeypatch.setenv(KEY, "sesame-open")
    with serving(tmp_path / "tiny", tmp_path / "log", key="sesame-open") as address:
        served = secateur.evaluate([f"{address}#tiny"], tasks).rows
    own = secateur.evaluate([tmp_path / "tiny"], tasks).rows
    assert [row.score for row in served] == pytest.approx([row.score for row in own], abs=1e-6)


# A study --------------------------------------------------------------------------------------------------------------


def test_a_study_with_baselines(mood: Mood, sts: Path, tmp_path: Path, quick_checks: None, no_waiting: None):
    tiny = tiny_transformer(tmp_path / "tiny", "llama", depth=2)
    static, endpoint, run = static_folder(tmp_path / "wood-2-none"), f"{mood.url}#org/far", tmp_path / "run"
    data = write_pairs(tmp_path / "words.jsonl", example_pairs(), "find the word")
    options = {"data": [data], "tasks": [sts], "depths": ["1"], "recipes": ["none"], "max_examples": 16}
    options |= {"profile_dtype": "float32", "baselines": [static, endpoint], "out": run}
    mood.does = ["well", *["503"] * 9]  # there when the study begins, and gone when it is needed
    with pytest.raises(StudyFailed, match="answers 503"):
        secateur.study([tiny], **options)
    own = ["tiny-2-zero-shot", "tiny-1-zero-shot"]
    assert {row.model for row in secateur.read_scores(run).rows} == {*own, static.name}
    page = secateur.study(out=run)
    found = {variant.name: variant for variant in read_run(run).variants}
    assert list(found)[-2:] == ["far", static.name]
    for name, depth in (("far", None), (static.name, 0)):
        variant = found[name]
        assert variant.is_baseline
        assert not variant.is_full
        assert (variant.base, variant.recipe, variant.depth, variant.blocks) == (name, BASELINE, depth, None)
        assert set(variant.scores) == {"sts"}
    assert [row.model for row in load(run, Costs).rows] == [*own, static.name]
    with (run / "table.csv").open() as stream:
        rows = {row["variant"]: row for row in csv.DictReader(stream)}
    assert rows["far"]["recipe"] == BASELINE
    assert rows["far"]["parameters"] == ""
    assert rows[static.name]["parameters"] == "8"
    assert static.name in page.read_text()
    asked = len(mood.requests)
    secateur.study(out=run)
    assert len(mood.requests) == asked  # nothing is asked again for what is there
    options["out"] = tmp_path / "other"
    again = shutil.copytree(tiny, tmp_path / "again" / "tiny")
    with pytest.raises(ConfigError, match="two models are called tiny"):
        secateur.study([tiny], **options | {"baselines": [again]})
    with pytest.raises(ModelError, match="no such file or folder"):
        secateur.plan_study([tiny], **options | {"baselines": [tmp_path / "nonesuch"]})
