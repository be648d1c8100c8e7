"""What mteb predicted for each row, as its score on any resampling of the rows.

======================================= ============================ =============================================
task                                    drawn again                  held fixed
======================================= ============================ =============================================
STS                                     pairs
pair classification                     pairs                        (the best threshold is found in each draw)
classification                          test texts                   the 10 fitted classifiers
clustering (V-measure)                  texts                        the 10 clusterings, by mteb's own draws of texts
retrieval, reranking                    queries                      the documents
summarization                           texts, with their summaries
======================================= ============================ =============================================

The formulas are those of the libraries that mteb calls (scipy, sklearn, pytrec_eval), written for counts of rows; on
the rows as they are they give mteb's score, which :func:`.evaluate` checks each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

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
from scipy.stats import pearsonr, spearmanr

from secateur.measures.intervals import Array, Statistic, mean_statistic

_SIMILARITIES = {
    "similarity": ("similarity_scores", 1),
    "cosine": ("cosine_scores", 1),
    "manhattan": ("manhattan_distances", -1),
    "euclidean": ("euclidean_distances", -1),
    "dot": ("dot_scores", 1),
}


@dataclass(frozen=True)
class Predicted:
    """One split of a task: ``units`` things that can be drawn again, called ``unit``, and the score of each draw."""

    unit: str
    units: int
    statistic: Statistic


def predicted(
    task: AbsTask, predictions: Mapping[str, Any], metric: str, random_state: tuple[Any, ...]
) -> list[Predicted] | None:
    """The splits of a task that a model was scored on.

    Args:
        task: As it was evaluated, with its data.
        predictions: The content of the file that mteb wrote for it: subset → split → predictions of the type's form.
        metric: The task's main metric.
        random_state: Of ``task.rng_state`` before the evaluation; a clustering task draws texts by it.

    Returns:
        None for a type of task or a metric whose rows cannot be drawn again: adjusted mutual information, types that
        task folders do not have.
    """
    build = next((build for kind, build in _BUILDERS.items() if isinstance(task, kind)), None)
    if build is None or (isinstance(task, AbsTaskClustering) and metric != "v_measure"):
        return None
    rng = random.Random()  # noqa: S311 - to follow mteb's draws
    rng.setstate(random_state)
    found = []
    for split in task.eval_splits:
        for subset in task.hf_subsets:
            content = predictions.get(subset, {}).get(split)
            if content is None:
                return None
            data = task.dataset.get(subset, task.dataset)
            found.append(build(task, data[split], content, metric, rng))
    return found


# Similarity of pairs --------------------------------------------------------------------------------------------------


def _sts(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Predicted:
    similarity, _, correlation = metric.rpartition("_")
    found = content[_SIMILARITIES[similarity or "similarity"][0]]
    measure = spearman if correlation == "spearman" else pearson
    return Predicted("pairs", len(found), partial(measure, np.asarray(data["score"], float), np.asarray(found)))


def pearson(first: Array, second: Array, counts: Array) -> Array:
    """Pearson's correlation of rows that occur ``counts`` times: (units,) or (draws, units) each → (draws,)."""
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
    """The mean rank of each unit's value in each draw: (draws, units)."""
    _, group = np.unique(values, return_inverse=True)
    starts = np.flatnonzero(np.r_[True, np.diff(group[np.argsort(group, kind="stable")]) > 0])
    size = np.add.reduceat(counts[:, np.argsort(group, kind="stable")], starts, axis=1)
    mean_rank = np.cumsum(size, axis=1) - size + (size + 1) / 2
    ranks: Array = mean_rank[:, group]
    return ranks


def _pairs(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Predicted:
    rows = data[0] if len(data) == 1 else data  # mteb's older data sets: all pairs in one row
    labels = np.asarray(rows[task.label_column_name], dtype=np.float64)
    similarity, _, measure = metric.rpartition("_")
    chosen = list(_SIMILARITIES.values()) if similarity == "max" else [_SIMILARITIES[similarity]]
    scores = [sign * np.asarray(content[key], dtype=np.float64) for key, sign in chosen]

    def best(counts: Array) -> Array:
        values: Array = np.max([binary_metric(measure, labels, found, counts) for found in scores], axis=0)
        return values

    return Predicted("pairs", len(labels), best)


def binary_metric(measure: str, labels: Array, scores: Array, counts: Array) -> Array:
    """``ap``, or ``accuracy``, ``f1``, ``precision`` or ``recall`` at the best threshold as mteb finds it.

    Args:
        measure: One of these.
        labels: (units,), 0 or 1.
        scores: (units,), higher for 1.
        counts: (draws, units).

    Returns:
        (draws,). NaN where a draw has no positive.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.r_[np.diff(scores[order]) != 0, True])  # a threshold cannot split tied scores
    drawn = counts[:, order]
    positives, taken = np.cumsum(drawn * labels[order], axis=1), np.cumsum(drawn, axis=1)
    positives, taken = positives[:, ends], taken[:, ends]
    total, positive = taken[:, -1:], positives[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.nan_to_num(positives / taken)
        recall = positives / positive
        if measure == "ap":
            gained = np.diff(recall, axis=1, prepend=0.0)
            average: Array = (gained * precision).sum(axis=1)
            return average
        inside = taken < total  # mteb leaves out the threshold below all rows
        if measure == "accuracy":
            correct = positives + (total - positive) - (taken - positives)
            best: Array = np.where(inside & (taken > 0), correct / total, 0.0).max(axis=1)
            return best
        f1 = np.where(inside & (positives > 0), 2 * precision * recall / (precision + recall), 0.0)
    at = f1.argmax(axis=1)[:, None]
    chosen: Array = np.take_along_axis({"f1": f1, "precision": precision, "recall": recall}[measure], at, axis=1)[:, 0]
    return np.where(f1.max(axis=1) > 0, chosen, np.where(positive[:, 0] > 0, 0.0, np.nan))


# Tables of labels -----------------------------------------------------------------------------------------------------


def _tally(rows: NDArray[np.int64], cells: NDArray[np.int64], units: int, counts: Array) -> Array:
    """Counts of units → counts of cells, (draws, cells that occur): each entry puts its unit's count into its cell.

    Of a table of classes × clusters, at most so many cells occur as there are units.
    """
    _, cells = np.unique(cells, return_inverse=True)
    entries = csr_array((np.ones(len(rows)), (rows, cells)), shape=(units, int(cells.max()) + 1))
    table: Array = counts @ entries
    return table


def _classified(task: AbsTask, data: Any, content: Sequence[Any], metric: str, rng: random.Random) -> Predicted:
    gold = np.asarray(data[task.label_column_name])
    experiments = [np.asarray(labels) for labels in content]
    if metric.startswith("ap"):
        statistics: list[Statistic] = [
            partial(binary_metric, "ap", gold.astype(float), labels.astype(float)) for labels in experiments
        ]
    elif metric == "accuracy":
        statistics = [mean_statistic(np.mean([labels == gold for labels in experiments], axis=0))]
    else:
        statistics = [partial(averaged_metric, metric, gold, labels) for labels in experiments]

    def mean(counts: Array) -> Array:
        values: Array = np.mean([statistic(counts) for statistic in statistics], axis=0)
        return values

    return Predicted("test texts", len(gold), mean)


def averaged_metric(metric: str, gold: NDArray[Any], found: NDArray[Any], counts: Array) -> Array:
    """``f1``, ``precision`` or ``recall``, macro or ``_weighted``, as sklearn has them."""
    labels, codes = np.unique(np.r_[gold, found], return_inverse=True)
    n, k = len(gold), len(labels)

    def by_label(rows: NDArray[np.int64], of: NDArray[np.int64]) -> Array:
        """How often each label occurs among some of the rows: (draws, labels)."""
        table: Array = counts @ csr_array((np.ones(len(rows)), (rows, of)), shape=(n, k))
        return table

    every, hit = np.arange(n), np.flatnonzero(codes[:n] == codes[n:])
    hits, right, said = by_label(hit, codes[hit]), by_label(every, codes[:n]), by_label(every, codes[n:])
    below = {"precision": said, "recall": right, "f1": (said + right) / 2}[metric.removesuffix("_weighted")]
    values = np.divide(hits, below, out=np.zeros_like(hits), where=below > 0)
    weights = right if metric.endswith("_weighted") else ((right + said) > 0).astype(float)
    average: Array = (values * weights).sum(axis=1) / weights.sum(axis=1)
    return average


def _clustered(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Predicted:
    rows = list(range(len(data)))
    if task.max_fraction_of_documents_to_embed is not None:
        rows = rng.sample(range(len(data)), k=int(task.max_fraction_of_documents_to_embed * len(data)))
    elif task.max_document_to_embed is not None:
        rows = rng.sample(range(len(data)), k=min(len(data), task.max_document_to_embed))
    column = data[task.label_column_name]
    labels = [column[row] if isinstance(column[row], list) else [column[row]] for row in rows]
    statistics: list[Statistic] = []
    for level, experiments in enumerate(content.values()):
        valid = np.array([i for i, label in enumerate(labels) if len(label) > level])
        _, gold = np.unique([labels[i][level] for i in valid], return_inverse=True)
        for assigned in experiments:
            drawn = np.array(rng.choices(range(len(valid)), k=task.max_documents_per_cluster))
            statistics.append(v_measure_of(valid[drawn], gold[drawn], np.asarray(assigned), len(rows)))

    def mean(counts: Array) -> Array:
        values: Array = np.mean([statistic(counts) for statistic in statistics], axis=0)
        return values

    return Predicted("texts", len(rows), mean)


def v_measure_of(units: NDArray[Any], gold: NDArray[Any], found: NDArray[Any], total: int) -> Statistic:
    """V-measure (Rosenberg and Hirschberg 2007) of one clustering, as sklearn has it; ``units`` says who is who."""
    cells = gold * (int(found.max()) + 1) + found

    def statistic(counts: Array) -> Array:
        by_class, by_cluster, by_both = (_entropy(_tally(units, own, total, counts)) for own in (gold, found, cells))
        shared = by_class + by_cluster - by_both
        homogeneity = np.divide(shared, by_class, out=np.ones_like(shared), where=by_class > 0)
        completeness = np.divide(shared, by_cluster, out=np.ones_like(shared), where=by_cluster > 0)
        both = homogeneity + completeness
        measure: Array = np.divide(2 * homogeneity * completeness, both, out=np.zeros_like(both), where=both > 0)
        return measure

    return statistic


def _entropy(table: Array) -> Array:
    """Of the distribution in each row, in nats."""
    shares = table / table.sum(axis=1, keepdims=True)
    entropy: Array = -np.where(shares > 0, shares * np.log(np.where(shares > 0, shares, 1.0)), 0.0).sum(axis=1)
    return entropy


# One score for each unit ----------------------------------------------------------------------------------------------


def _ranked(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Predicted:
    relevant = {query: found for query, found in data["relevant_docs"].items() if query in content}
    results = content
    if task.ignore_identical_ids:
        results = {q: {d: score for d, score in found.items() if d != q} for q, found in content.items()}
    name, _, cutoff = ("recall_at_1" if metric == "accuracy" else metric).partition("_at_")
    queries = [query for query in relevant if query in results]
    if name == "mrr":
        found = dict(zip(results, mrr(relevant, results, [int(cutoff)])[f"MRR@{cutoff}"], strict=True))
        return Predicted("queries", len(queries), mean_statistic([found[query] for query in queries]))
    scores = calculate_retrieval_scores(results, relevant, [int(cutoff)], task.skip_first_result).all_scores
    key = {"ndcg": "ndcg_cut_", "map": "map_cut_", "recall": "recall_", "precision": "P_", "hit_rate": "success_"}
    return Predicted("queries", len(queries), mean_statistic([scores[query][key[name] + cutoff] for query in queries]))


def _summarized(task: AbsTask, data: Any, content: Mapping[str, Any], metric: str, rng: random.Random) -> Predicted:
    similarity, _, correlation = metric.rpartition("_")
    measure = spearmanr if correlation == "spearman" else pearsonr
    found = content[_SIMILARITIES[similarity or "similarity"][0]]
    values = [measure(gold, own).statistic for gold, own in zip(content["human_scores"], found, strict=True)]
    return Predicted("texts", len(values), mean_statistic(values))


_BUILDERS: dict[type[AbsTask], Callable[..., Predicted]] = {
    AbsTaskSTS: _sts,
    AbsTaskPairClassification: _pairs,
    AbsTaskClassification: _classified,
    AbsTaskClustering: _clustered,
    AbsTaskRetrieval: _ranked,
    AbsTaskSummarization: _summarized,
}
