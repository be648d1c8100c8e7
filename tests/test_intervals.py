"""The bootstrap against theory, and every score of counted rows against the library's own score of copied rows."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from mteb.abstasks import AbsTaskPairClassification
from scipy.stats import binomtest, pearsonr, spearmanr
from sklearn.metrics import f1_score, precision_score, recall_score, v_measure_score

from secateur.evaluation.predictions import (
    _averaged_metric,
    _v_measure,
    binary_metric,
    mean_statistic,
    pearson,
    spearman,
)
from secateur.measures.intervals import interval, mean_of, resample, resampled_counts, whole


def covers(successes: int, trials: int) -> bool:
    """Whether so many successes are what a chance of 95 % gives, with a chance of 1 in 10,000 to be wrong."""
    return binomtest(successes, trials, 0.95).pvalue > 1e-4


def in_interval(statistic, units: int, truth: float, seed: int) -> bool:
    low, high = interval(resample(statistic, units, seed, draws=500))
    return low <= truth <= high


@pytest.mark.parametrize("units", [12, 100])
def test_intervals_of_a_mean_cover(units: int):
    rng = np.random.default_rng(units)
    samples = rng.beta(2, 2, (400, units))
    assert covers(sum(in_interval(mean_statistic(s), units, 0.5, i) for i, s in enumerate(samples)), 400)


def test_intervals_of_a_paired_difference_cover_and_are_narrower_than_unpaired_ones():
    rng, hits, widths = np.random.default_rng(1), 0, []
    for seed in range(400):
        difficulty = rng.normal(0, 1, 50)
        first, second = (difficulty + shift + rng.normal(0, 0.3, 50) for shift in (0.5, 0.4))
        one, two, other = (
            resample(mean_statistic(values), 50, draw, draws=500)
            for values, draw in ((first, seed), (second, seed), (second, seed + 10_000))
        )
        low, high = interval(one - two)
        hits += low <= 0.1 <= high
        widths.append((high - low) / np.ptp(interval(one - other)))
    assert covers(hits, 400)
    assert np.median(widths) < 0.5


def test_intervals_of_a_rank_correlation_cover():
    # Spearman's correlation of two normal variables with Pearson's r is 6/pi asin(r/2) (Pearson 1907).
    rng, hits, truth = np.random.default_rng(2), 0, 6 / np.pi * np.arcsin(0.6 / 2)
    for seed in range(300):
        first = rng.normal(size=150)
        second = 0.6 * first + 0.8 * rng.normal(size=150)
        hits += in_interval(partial(spearman, first, second), 150, truth, seed)
    # Near a skewed statistic a percentile interval is allowed a percent or two.
    assert 0.91 <= hits / 300 <= 0.985


def test_intervals_of_average_precision_cover():
    rng = np.random.default_rng(3)

    def draw(size: int) -> tuple[np.ndarray, np.ndarray]:
        labels = (rng.random(size) < 0.4).astype(float)
        return labels, labels + rng.normal(0, 1, size)

    truth = float(binary_metric("ap", *draw(400_000), np.ones((1, 400_000)))[0])
    hits = sum(in_interval(partial(binary_metric, "ap", *draw(200)), 200, truth, seed) for seed in range(300))
    assert 0.91 <= hits / 300 <= 0.985


def test_draws_are_reproducible_and_centred():
    statistic = mean_statistic(np.arange(30.0))
    draws = resample(statistic, 30, seed=5)
    assert np.array_equal(draws, resample(statistic, 30, seed=5))
    assert not np.array_equal(draws, resample(statistic, 30, seed=6))
    assert draws.mean() == pytest.approx(whole(statistic, 30)) == 14.5
    assert draws.std() == pytest.approx(np.arange(30.0).std(ddof=1) / np.sqrt(30), rel=0.1)
    assert mean_of([draws, draws - 2]).mean() == pytest.approx(13.5)


def test_counts_are_of_units_drawn_with_replacement():
    counts = np.concatenate(list(resampled_counts(7, seed=0, draws=3000)))
    assert counts.shape == (3000, 7)
    assert set(counts.sum(axis=1)) == {7.0}
    assert counts.var() == pytest.approx(6 / 7, rel=0.05)  # of a binomial of 7 draws with a chance of 1/7


# A score of counts is the library's score of rows that are copied so often -------------------------------------------

N = 40
RNG = np.random.default_rng(9)
COUNTS = np.concatenate(list(resampled_counts(N, seed=1, draws=25)))
ROWS = [np.repeat(np.arange(N), row.astype(int)) for row in COUNTS]
SCORES = RNG.normal(size=N).round(1)  # with ties
LABELS = (SCORES + RNG.normal(size=N) > 0).astype(int)


def same(statistic, expected) -> None:
    assert statistic(COUNTS) == pytest.approx([expected(rows) for rows in ROWS], abs=1e-9)


def test_correlations_of_counts_are_scipys():
    gold = RNG.integers(0, 6, N).astype(float)
    same(partial(spearman, gold, SCORES), lambda rows: spearmanr(gold[rows], SCORES[rows]).statistic)
    same(partial(pearson, gold, SCORES), lambda rows: pearsonr(gold[rows], SCORES[rows]).statistic)


@pytest.mark.parametrize("measure", ["ap", "accuracy", "f1", "precision", "recall"])
@pytest.mark.parametrize("sign", [1, -1])
def test_binary_metrics_of_counts_are_mtebs(measure: str, sign: int):
    task = type("Pairs", (AbsTaskPairClassification,), {"__init__": lambda self: None})()
    same(
        partial(binary_metric, measure, LABELS.astype(float), sign * SCORES),
        lambda rows: task._compute_metrics_values(SCORES[rows].tolist(), LABELS[rows], sign > 0)[measure],
    )


@pytest.mark.parametrize("average", ["macro", "weighted"])
@pytest.mark.parametrize("score", [f1_score, precision_score, recall_score])
def test_averaged_metrics_of_counts_are_sklearns(score, average: str):
    gold, found = RNG.integers(0, 5, N), RNG.integers(0, 6, N)
    name = score.__name__.removesuffix("_score") + ("_weighted" if average == "weighted" else "")
    same(
        partial(_averaged_metric, name, gold, found),
        lambda rows: score(gold[rows], found[rows], average=average, zero_division=0),
    )


def test_v_measure_of_counts_is_sklearns():
    units = RNG.integers(0, N, 200)  # mteb's own draws of texts
    gold, found = RNG.integers(0, 4, N)[units], RNG.integers(0, 3, N)[units]

    def expected(rows: np.ndarray) -> float:
        again = np.concatenate([np.flatnonzero(units == row) for row in rows])
        return v_measure_score(gold[again], found[again])

    same(_v_measure(units, gold, found, N), expected)
