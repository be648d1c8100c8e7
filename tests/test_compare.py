from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from sentence_transformers.util import cos_sim
from sklearn.neighbors import NearestNeighbors
from tokenizers import Tokenizer

from conftest import MakeEncoder
from secateur.errors import ConfigError, DataError, ModelError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.replicates import read_replicates, score_differences
from secateur.evaluation.tasks import open_task
from secateur.measures.metrics import nearest_rows
from secateur.models.open_model import open_model
from secateur.reporting.compare import compare, overlap
from secateur.results import Comparison, ScoreRow, load
from task_folders import example_rows, sentences, write_task


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is timed once, however short it is."""
    monkeypatch.setattr("secateur.reporting.cost.LEAST_SECONDS", 1e-9)


@pytest.fixture
def folders(make_encoder: MakeEncoder, tmp_path: Path) -> list[Path]:
    """A model, the same again, and another."""
    found = []
    for name, seed in (("full", 0), ("same", 0), ("other", 1)):
        make_encoder("llama", depth=1, seed=seed).save(str(tmp_path / name), create_model_card=False)
        found.append(tmp_path / name)
    return found


def test_models_side_by_side(folders: list[Path], tmp_path: Path):
    tasks = [write_task(tmp_path / type_, type_, example_rows(type_)) for type_ in ("sts", "retrieval")]
    out = tmp_path / "out"
    found = compare(folders, tasks=tasks, neighbours=5, out=out, timed=False)
    assert load(out, Comparison) == found
    assert (found.reference, found.models) == ("full", ("full", "same", "other"))
    assert [(row.model, row.task) for row in found.rows] == [
        (model, task) for model in ("same", "other") for task in ("sts", "retrieval", "")
    ]
    opened = compare(folders, tasks=[open_task(task) for task in tasks], timed=False)
    assert (opened.differences, opened.overlaps) == (found.differences, ())
    scores = {(row.model, row.task): row for row in evaluate(folders, tasks, out=out).rows}
    for row in found.rows:
        if row.task:
            own, reference = scores[row.model, row.task], scores["full", row.task]
            expected = own.score - reference.score
            draws = read_replicates(out, own) - read_replicates(out, reference)
            if row.model == "other":
                assert (row.low, row.high) == pytest.approx(tuple(np.nanquantile(draws, [0.025, 0.975])))
        else:
            expected = np.mean([r.difference for r in found.rows if r.task and r.model == row.model])
        assert row.difference == pytest.approx(expected)
        assert row.model == "same" or row.low <= row.difference <= row.high
    same = [row for row in found.rows if row.model == "same"]
    # That none of 24 rows differs does not tell that no other row would: not an interval from 0 to 0.
    hidden = 1 - binomtest(24, 24).proportion_ci(0.95).low
    for row, most in zip(same, (2, 1, 1.5), strict=True):  # correlations are from -1 to 1
        assert (row.difference, row.apart) == (0, False)
        assert (-row.low, row.high) == pytest.approx((most * hidden, most * hidden))
    same_overlap, other_overlap = (row.overlap for row in found.overlaps)
    assert other_overlap < same_overlap == 1
    assert {row.model for row in found.changed} == {"other"}
    assert found.overlaps[0].neighbours == 5


def test_texts_alone(folders: list[Path], tmp_path: Path):
    texts = sentences(40)
    (tmp_path / "texts.txt").write_text("\n".join([*texts, texts[0]]))
    found = compare([folders[0], folders[2]], texts=[tmp_path / "texts.txt"], neighbours=4, timed=False)
    assert (found.differences, found.scores, found.costs) == ((), (), ())
    assert found.overlaps[0].texts == 40
    vectors = [open_model(folder).encode(texts) for folder in (folders[0], folders[2])]
    whole, other = (cos_sim(own, own).numpy() for own in vectors)
    shares = []
    for place in range(40):
        rest = np.delete(np.arange(40), place)
        chance = whole[place, rest].mean()
        nearest, theirs = (rest[np.argsort(-of[place, rest])[:4]] for of in (whole, other))
        shares.append((whole[place, theirs] - chance).sum() / (whole[place, nearest] - chance).sum())
    assert found.overlaps[0].similarity == pytest.approx(np.mean(shares), abs=1e-5)
    html = found._repr_html_()  # what a notebook shows
    assert [html.count(part) for part in ("<table", "<p>overlaps</p>", "<th>lost</th>")] == [2, 1, 1]
    assert html.count("<tr>") == len(found.overlaps) + len(found.changed)
    assert [item.name for item in found.provenance.data] == ["texts.txt"]
    shares = [row.overlap for row in found.changed]
    assert shares == sorted(shares)
    for row in found.changed:
        assert len(row.lost) == len(row.gained) == round(4 * (1 - row.overlap)) > 0
        assert row.text in texts
        assert not {row.text} & {*row.lost, *row.gained}
        assert not {*row.lost} & {*row.gained}
    assert compare(folders[:2], texts=[tmp_path / "texts.txt"], max_texts=10, timed=False).overlaps[0].texts == 10
    # The ten nearest of ten others are the same whatever the model.
    few = compare([folders[0], folders[2]], texts=tmp_path / "texts.txt", max_texts=11, timed=False).overlaps[0]
    assert (few.texts, few.neighbours) == (11, 5)
    assert few.overlap < 1


def test_costs_are_there_and_kept_vectors_are_used(folders: list[Path], tmp_path: Path):
    (tmp_path / "texts.txt").write_text("\n".join(sentences(12)))
    options = {"texts": [tmp_path / "texts.txt"], "cache": tmp_path / "cache"}
    found = compare(folders[1:], **options)
    assert [row.model for row in found.costs] == ["same", "other"]
    assert compare(folders[1:], **options, timed=False).overlaps == found.overlaps
    assert len(list((tmp_path / "cache").rglob("*.keys.npy"))) == 2


def test_neighbours_are_sklearns_and_overlap_is_their_share():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 8)).astype(np.float32)
    found = nearest_rows(vectors, 7)
    theirs = NearestNeighbors(n_neighbors=8, metric="cosine").fit(vectors).kneighbors(vectors)[1][:, 1:]
    assert np.array_equal(found, theirs)
    assert overlap(np.array([[1, 2, 3, 4]]), np.array([[4, 9, 2, 8]])).tolist() == [0.5]


def test_scores_on_other_rows_have_no_interval():
    rows = [
        ScoreRow("a", "t", "STS", "spearman", 0.5, 10, 1.0, units=10, unit="pairs", data="x"),
        ScoreRow("b", "t", "STS", "spearman", 0.7, 10, 1.0, units=10, unit="pairs", data="y"),
        ScoreRow("b", "u", "STS", "spearman", 0.7, 10, 1.0),
    ]
    draws = [np.linspace(0, 1, 9), np.linspace(0, 2, 9), None]
    (found,) = score_differences(rows, "a", draws)
    assert (found.low, found.high, found.apart, found.units) == (None, None, False, 0)
    assert found.difference == pytest.approx(0.2)


def test_models_that_answer_every_row_alike_differ_by_as_much_as_so_many_rows_can_hide():
    known = {"units": 20, "unit": "queries", "data": "x"}
    rows = [ScoreRow(m, t, "Retrieval", "ndcg", 0.5, 20, 1.0, **known) for m in ("a", "b") for t in ("t", "u")]
    hidden = 1 - binomtest(20, 20).proportion_ci(0.95).low
    for found in score_differences(rows, "a", [np.linspace(0, 1, 9)] * 4):
        assert (found.low, found.high) == pytest.approx((-hidden, hidden))


def test_what_cannot_be_compared_is_refused(folders: list[Path], tmp_path: Path):
    (tmp_path / "two.txt").write_text("a\nb\n")
    for models, options, says in (
        (folders[:1], {"tasks": ["t"]}, "at least 2 items"),
        (folders, {}, "--tasks or --texts"),
        (folders, {"texts": [tmp_path / "two.txt"]}, "2 distinct texts"),
        (folders, {"tasks": ["t"], "names": ["a", "a", "b"]}, "two models are called"),
        ([folders[0], folders[0]], {"tasks": ["t"]}, "two models are called"),
        (folders, {"tasks": ["t"], "neighbours": 0}, "neighbours: 0 is not valid"),
        (folders, {"tasks": ["t"], "neighbours": -1}, "neighbours: -1 is not valid"),
        (folders, {"tasks": ["t"], "max_texts": 1}, "max_texts: 1 is not valid"),
        (folders, {"tasks": ["t"], "batch_size": 0}, "batch_size: 0 is not valid"),
        (folders, {"texts": [tmp_path / "two.txt"], "sample": 9}, "sample: is a number of rows of tasks"),
        ([*folders, ""], {"tasks": ["t"]}, "models.3: '' is not valid: a name or a path is expected"),
    ):
        with pytest.raises(ConfigError, match=says):
            compare(models, **options)
    with pytest.raises(DataError, match="neither a task folder"):
        compare(folders, tasks=["no-such-task"])


def test_vectors_that_are_no_numbers_have_no_neighbours(folders: list[Path], tmp_path: Path):
    tokenizer = Tokenizer.from_file(str(folders[0] / "tokenizer.json"))
    tokenizer.no_padding()
    rows = torch.ones(tokenizer.get_vocab_size(), 32)
    rows[tokenizer.token_to_id("z")] = 3e38  # two of these are more than float32 holds
    SentenceTransformer(modules=[StaticEmbedding(tokenizer, rows)], device="cpu").save(str(tmp_path / "huge"))
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree zz\n")
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(ModelError, match=r'huge: gives a vector with NaN or infinity for "three zz"'):
            compare([folders[0], tmp_path / "huge"], texts=tmp_path / "texts.txt", cache=cache, timed=False)
