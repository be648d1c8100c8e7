"""Bootstrap replicates of scores: from what mteb predicted for each row, and differences of two models from them.

Resampled are pairs (STS and pair classification, where the best threshold is found in each replicate), test texts
(classification, with its 10 fitted classifiers), texts (clustering, with its 10 clusterings by mteb's own draws of
texts; summarization, with their summaries), and queries (retrieval and reranking, with the documents).

The formulas are those of the libraries that mteb calls (scipy, sklearn, pytrec_eval), written for counts of rows; on
the rows as they are they give mteb's score, which :func:`.evaluate` checks each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores, mrr
from mteb.abstasks import (
    AbsTask,
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskSummarization,
)
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import entropy, pearsonr, spearmanr

from secateur.errors import DataError
from secateur.evaluation.tasks import splits_of
from secateur.measures.intervals import Array, Statistic, interval, limits_of, mean_statistic
from secateur.results import DifferenceRow, ScoreRow

_SIMILARITIES = {
    "similarity": ("similarity_scores", 1),
    "cosine": ("cosine_scores", 1),
    "manhattan": ("manhattan_distances", -1),
    "euclidean": ("euclidean_distances", -1),
    "dot": ("dot_scores", 1),
}
"""Similarity → its name in mteb's predictions, and its sign."""


def replicates_file(out: Path, name: str) -> Path:
    """Where evaluating into ``out`` keeps the replicates that a row names."""
    return out / "draws" / f"{name}.npy"


def read_replicates(out: str | Path, row: ScoreRow) -> Array | None:
    """The replicates of a score in ``out/scores.json``: (replicates,); None where it was not resampled.

    Raises:
        DataError: The file that the row names is missing or damaged.
    """
    if not row.draws:
        return None
    file = replicates_file(Path(out), row.draws)
    try:
        replicates: Array = np.load(file)
    except (OSError, ValueError, EOFError):
        problem = f"is missing or damaged, the bootstrap replicates of {row.model} on {row.task}"
        raise DataError(file, problem, "evaluate again into the same folder") from None
    return replicates


# Differences ----------------------------------------------------------------------------------------------------------


def is_paired(row: ScoreRow, reference: ScoreRow) -> bool:
    """Whether two scores were resampled alike, on the same rows, so that their replicates can be subtracted."""
    same = ("data", "sample", "metric", "units", "unit", *(("seed",) if row.sample is not None else ()))
    return all(getattr(row, name) == getattr(reference, name) for name in same)


def score_differences(
    rows: Sequence[ScoreRow], reference: str, replicates: Sequence[Array | None]
) -> tuple[DifferenceRow, ...]:
    """Each model's scores minus the reference's, by task, and the mean over the tasks that both have.

    ``replicates`` are those of each row, as :func:`read_replicates` gives them.
    """
    found = {(row.model, row.task): (row, own) for row, own in zip(rows, replicates, strict=True)}
    differences: list[DifferenceRow] = []
    for model in dict.fromkeys(row.model for row in rows if row.model != reference):
        by_task: list[DifferenceRow] = []
        paired: list[Array] = []
        for task in [row.task for row in rows if row.model == model and (reference, row.task) in found]:
            (row, own), (other, theirs) = found[model, task], found[reference, task]
            low = high = None
            unit, units = "", 0
            if own is not None and theirs is not None and is_paired(row, other):
                paired.append(own - theirs)
                least, most = limits_of(row.metric)
                low, high = interval(paired[-1], (least - most, most - least), row.units)
                unit, units = row.unit, row.units
            scores = row.score, other.score, row.score - other.score
            by_task.append(DifferenceRow(model, reference, task, row.metric, *scores, low, high, unit, units))
        differences += by_task
        if len(by_task) > 1:
            mean, base = np.mean([(row.score, row.reference_score) for row in by_task], axis=0).tolist()
            low = high = None
            if len(paired) == len(by_task):
                least, most = np.mean([limits_of(row.metric) for row in by_task], axis=0)
                low, high = interval(
                    np.mean(paired, axis=0), (least - most, most - least), min(row.units for row in by_task)
                )
            scores, count = (mean, base, mean - base), len(by_task)
            differences.append(DifferenceRow(model, reference, "", "mean", *scores, low, high, "tasks", count))
    return tuple(differences)


# Scores as functions of how often each row occurs ---------------------------------------------------------------------


class Resampled(NamedTuple):
    """One split of a task: ``units`` things that can be resampled, called ``unit``, and the score of each replicate."""

    unit: str
    units: int
    statistic: Statistic


def resampled_scores(
    task: AbsTask, predictions: Mapping[str, Any], metric: str, random_state: tuple[Any, ...]
) -> list[Resampled]:
    """The splits of a task that a model was scored on, from the file of predictions that mteb wrote for it.

    ``random_state`` is that of ``task.rng_state`` before the evaluation: a clustering task draws texts by it.

    Raises:
        ValueError: Rows cannot be resampled: for adjusted mutual information, and types that task folders do not have.
    """
    build = next((build for kind, build in _BUILDERS.items() if isinstance(task, kind)), None)
    if build is not None and metric != "ami":
        parts = [(predictions.get(subset, {}).get(split), data) for split, subset, data in splits_of(task)]
        if parts and all(content is not None for content, _ in parts):
            rng = random.Random()  # noqa: S311 - to follow mteb's draws
            rng.setstate(random_state)
            return [build(task, data, content, metric, rng) for content, data in parts]
    raise ValueError(f"the rows of {task.metadata.type} by {metric} cannot be resampled")


def _combined(combine: Callable[..., Array], statistics: Sequence[Statistic]) -> Statistic:
    return lambda counts: combine([statistic(counts) for statistic in statistics], axis=0)


def _sts(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Resampled:
    similarity, _, correlation = metric.rpartition("_")
    found = np.asarray(content[_SIMILARITIES[similarity or "similarity"][0]])
    measure = spearman if correlation == "spearman" else pearson
    return Resampled("pairs", len(found), partial(measure, np.asarray(data["score"], float), found))


def pearson(first: Array, second: Array, counts: Array) -> Array:
    """Pearson's correlation of rows that occur ``counts`` times: (units,) or (replicates, units) → (replicates,)."""
    total = counts.sum(axis=1, keepdims=True)
    a = first - (counts * first).sum(axis=1, keepdims=True) / total
    b = second - (counts * second).sum(axis=1, keepdims=True) / total
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: Array = (counts * a * b).sum(axis=1) / np.sqrt((counts * a**2).sum(axis=1) * (counts * b**2).sum(axis=1))
    return ratio


def spearman(first: Array, second: Array, counts: Array) -> Array:
    """Spearman's correlation: Pearson's of the ranks, the mean rank where values tie."""
    return pearson(_ranks(first, counts), _ranks(second, counts), counts)


def _ranks(values: Array, counts: Array) -> Array:
    """The mean rank of each unit's value in each replicate: (replicates, units)."""
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(group[order]) > 0])
    size = np.add.reduceat(counts[:, order], starts, axis=1)
    return (np.cumsum(size, axis=1) - size + (size + 1) / 2)[:, group]


def _pairs(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Resampled:
    rows = data[0] if len(data) == 1 else data  # mteb's older data sets: all pairs in one row
    labels = np.asarray(rows[task.label_column_name], dtype=np.float64)
    similarity, _, measure = metric.rpartition("_")
    chosen = list(_SIMILARITIES.values()) if similarity == "max" else [_SIMILARITIES[similarity]]
    scores = [sign * np.asarray(content[key], dtype=np.float64) for key, sign in chosen]
    statistics = [partial(binary_metric, measure, labels, found) for found in scores]
    return Resampled("pairs", len(labels), _combined(np.max, statistics))


def binary_metric(measure: str, labels: Array, scores: Array, counts: Array) -> Array:
    """``ap``, or ``accuracy``, ``f1``, ``precision`` or ``recall`` at the best threshold as mteb finds it.

    Of labels (units,), 0 or 1, and scores (units,), higher for 1: (replicates,), NaN where one has no positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])  # a threshold cannot split tied scores
    resampled = counts[:, order]
    positives = np.cumsum(resampled * labels[order], axis=1)[:, ends]
    taken = np.cumsum(resampled, axis=1)[:, ends]
    total, positive = taken[:, -1:], positives[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(positives / taken)
        recall = positives / positive
        if measure == "ap":
            return (np.diff(recall, axis=1, prepend=0.0) * precision).sum(axis=1)
        inside = taken < total  # mteb leaves out the threshold below all rows
        if measure == "accuracy":
            correct = positives + (total - positive) - (taken - positives)
            return np.where(inside & (taken > 0), correct / total, 0.0).max(axis=1)
        f1 = np.where(inside & (positives > 0), 2 * precision * recall / (precision + recall), 0.0)
    at = f1.argmax(axis=1)[:, None]
    chosen: Array = np.take_along_axis({"f1": f1, "precision": precision, "recall": recall}[measure], at, axis=1)[:, 0]
    return np.where(f1.max(axis=1) > 0, chosen, np.where(positive[:, 0] > 0, 0.0, np.nan))


def _classified(task: AbsTask, data: Any, content: Sequence[Any], metric: str, rng: random.Random) -> Resampled:
    gold = np.asarray(data[task.label_column_name])
    experiments = [np.asarray(labels) for labels in content]
    if metric == "accuracy":
        return Resampled("test texts", len(gold), mean_statistic(np.mean([own == gold for own in experiments], axis=0)))
    if metric.startswith("ap"):
        parts = [partial(binary_metric, "ap", gold.astype(float), own.astype(float)) for own in experiments]
    else:
        parts = [partial(averaged_metric, metric, gold, own) for own in experiments]
    return Resampled("test texts", len(gold), _combined(np.mean, parts))


def averaged_metric(metric: str, gold: NDArray[Any], found: NDArray[Any], counts: Array) -> Array:
    """``f1``, ``precision`` or ``recall``, macro or ``_weighted``, as sklearn has them."""
    labels, codes = np.unique(np.r_[gold, found], return_inverse=True)
    n, k = len(gold), len(labels)

    def by_label(rows: NDArray[np.int64], of: NDArray[np.int64]) -> Array:
        """How often each label occurs among some of the rows: (replicates, labels)."""
        return counts @ csr_array((np.ones(len(rows)), (rows, of)), shape=(n, k))

    every, hit = np.arange(n), np.flatnonzero(codes[:n] == codes[n:])
    hits, right, said = by_label(hit, codes[hit]), by_label(every, codes[:n]), by_label(every, codes[n:])
    below = {"precision": said, "recall": right, "f1": (said + right) / 2}[metric.removesuffix("_weighted")]
    values = np.divide(hits, below, out=np.zeros_like(hits), where=below > 0)
    weights = right if metric.endswith("_weighted") else ((right + said) > 0).astype(float)
    return (values * weights).sum(axis=1) / weights.sum(axis=1)


def _clustered(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Resampled:
    rows = list(range(len(data)))
    if task.max_fraction_of_documents_to_embed is not None:
        rows = rng.sample(rows, k=int(task.max_fraction_of_documents_to_embed * len(data)))
    elif task.max_document_to_embed is not None:
        rows = rng.sample(rows, k=min(len(data), task.max_document_to_embed))
    column = data[task.label_column_name]
    labels = [column[row] if isinstance(column[row], list) else [column[row]] for row in rows]
    statistics: list[Statistic] = []
    for level, experiments in enumerate(content.values()):
        valid = np.array([i for i, label in enumerate(labels) if len(label) > level])
        _, gold = np.unique([labels[i][level] for i in valid], return_inverse=True)
        for assigned in experiments:
            drawn = np.array(rng.choices(range(len(valid)), k=task.max_documents_per_cluster))
            statistics.append(v_measure_of(valid[drawn], gold[drawn], np.asarray(assigned), len(rows)))
    return Resampled("texts", len(rows), _combined(np.mean, statistics))


def v_measure_of(units: NDArray[Any], gold: NDArray[Any], found: NDArray[Any], total: int) -> Statistic:
    """V-measure (Rosenberg and Hirschberg 2007) of one clustering, as sklearn has it.

    Of each clustered text, ``units`` says which of ``total`` units it is, ``gold`` its class, ``found`` its cluster.
    """
    both = gold * (int(found.max()) + 1) + found

    def spread(cells: NDArray[np.int64], counts: Array) -> Array:
        """The entropy in nats of the distribution over classes, clusters or both: (replicates,)."""
        # Of a table of classes × clusters, at most so many cells occur as there are units.
        _, cells = np.unique(cells, return_inverse=True)
        table = counts @ csr_array((np.ones(len(units)), (units, cells)), shape=(total, int(cells.max()) + 1))
        return np.asarray(entropy(table, axis=1))

    def statistic(counts: Array) -> Array:
        by_class, by_cluster, by_both = (spread(cells, counts) for cells in (gold, found, both))
        shared = by_class + by_cluster - by_both
        homogeneity = np.divide(shared, by_class, out=np.ones_like(shared), where=by_class > 0)
        completeness = np.divide(shared, by_cluster, out=np.ones_like(shared), where=by_cluster > 0)
        added = homogeneity + completeness
        return np.divide(2 * homogeneity * completeness, added, out=np.zeros_like(added), where=added > 0)

    return statistic


def _ranked(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Resampled:
    relevant = {query: found for query, found in data["relevant_docs"].items() if query in content}
    results = content
    if task.ignore_identical_ids:
        results = {q: {d: score for d, score in found.items() if d != q} for q, found in content.items()}
    name, _, cutoff = ("recall_at_1" if metric == "accuracy" else metric).partition("_at_")
    if name == "mrr":
        by_query = dict(zip(results, mrr(relevant, results, [int(cutoff)])[f"MRR@{cutoff}"], strict=True))
    else:
        scores = calculate_retrieval_scores(results, relevant, [int(cutoff)], task.skip_first_result).all_scores
        key = {"ndcg": "ndcg_cut_", "map": "map_cut_", "recall": "recall_", "precision": "P_", "hit_rate": "success_"}
        by_query = {query: scores[query][key[name] + cutoff] for query in relevant}
    return Resampled("queries", len(relevant), mean_statistic([by_query[query] for query in relevant]))


def _summarized(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Resampled:
    similarity, _, correlation = metric.rpartition("_")
    measure = spearmanr if correlation == "spearman" else pearsonr
    found = content[_SIMILARITIES[similarity or "similarity"][0]]
    values = [measure(gold, own).statistic for gold, own in zip(content["human_scores"], found, strict=True)]
    return Resampled("texts", len(values), mean_statistic(values))


_BUILDERS: dict[type[AbsTask], Callable[..., Resampled]] = {
    AbsTaskSTS: _sts,
    AbsTaskPairClassification: _pairs,
    AbsTaskClassification: _classified,
    AbsTaskClustering: _clustered,
    AbsTaskRetrieval: _ranked,
    AbsTaskSummarization: _summarized,
}
