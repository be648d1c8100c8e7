"""The bootstrap against theory, and every score of counted rows against the library's own score of copied rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from mteb.abstasks import AbsTaskPairClassification
from scipy.stats import binomtest, pearsonr, spearmanr
from sklearn.metrics import f1_score, precision_score, recall_score, v_measure_score

from secateur.evaluation.replicates import (
    averaged_metric,
    binary_metric,
    pearson,
    spearman,
    v_measure_of,
)
from secateur.measures.intervals import (
    Statistic,
    has_converged,
    interval,
    limits_of,
    looks,
    mean_statistic,
    observed,
    resample,
    resampled_counts,
    why_no_interval,
)


def covers(successes: int, trials: int) -> bool:
    """Whether so many successes are what a chance of 95 % gives, with a chance of 1 in 10,000 to be wrong."""
    return binomtest(successes, trials, 0.95).pvalue > 1e-4


def _skewed(rng: np.random.Generator, units: int) -> Statistic:
    return mean_statistic(rng.gamma(4, 0.25, units))


def _answers(rng: np.random.Generator, units: int) -> Statistic:
    return mean_statistic((rng.random(units) < 0.9).astype(float))


def _ndcg(rng: np.random.Generator, units: int) -> Statistic:
    """Half of the queries find everything, a fifth nothing."""
    kind = rng.random(units)
    return mean_statistic(np.select([kind < 0.5, kind < 0.7], [1.0, 0.0], rng.random(units)))


def _spearman(rng: np.random.Generator, units: int) -> Statistic:
    first = rng.normal(size=units)
    return partial(spearman, first, 0.6 * first + 0.8 * rng.normal(size=units))


def _pairs(measure: str, rng: np.random.Generator, units: int) -> Statistic:
    labels = (rng.random(units) < 0.4).astype(float)
    return partial(binary_metric, measure, labels, labels + rng.normal(size=units))


def _macro_f1(rng: np.random.Generator, units: int) -> Statistic:
    gold = rng.integers(0, 3, units)
    return partial(averaged_metric, "f1", gold, np.where(rng.random(units) < 0.7, gold, (gold + 1) % 3))


SCORES_OF: dict[str, tuple[Callable[[np.random.Generator, int], Statistic], str, float | None]] = {
    "losses": (lambda rng, units: mean_statistic(rng.normal(size=units)), "", 0.0),
    "skewed losses": (_skewed, "", 1.0),
    "right answers": (_answers, "accuracy", 0.9),
    "ndcg": (_ndcg, "ndcg_at_10", 0.65),
    # Of two normal variables with Pearson's r it is 6/pi asin(r/2) (Pearson 1907).
    "spearman": (_spearman, "spearman", 6 / np.pi * np.arcsin(0.6 / 2)),
    "ap": (partial(_pairs, "ap"), "ap", None),
    "accuracy at the best threshold": (partial(_pairs, "accuracy"), "accuracy", None),
    "macro f1": (_macro_f1, "f1", None),
}
"""What is drawn, its metric, and its expectation; None where that depends on the number of units."""


@pytest.mark.slow
@pytest.mark.parametrize("units", [5, 10, 20, 100])
@pytest.mark.parametrize("name", SCORES_OF)
def test_intervals_hold_the_expected_number_at_93_percent_or_more(name: str, units: int):
    make, metric, expected = SCORES_OF[name]
    rng = np.random.default_rng([*name.encode(), units])
    if expected is None:
        expected = float(np.nanmean([observed(make(rng, units), units) for _ in range(2000)]))
    limits = limits_of(metric) if metric else None
    hits = given = 0
    for seed in range(1000):
        draws = resample(make(rng, units), units, seed, replicates=400)
        if np.isnan(draws).all() or why_no_interval(draws, units):
            continue
        low, high = interval(draws, limits, units) if limits else interval(draws)
        assert low is not None and high is not None
        assert limits is None or limits[0] <= low <= high <= limits[1]
        given, hits = given + 1, hits + (low <= expected <= high)
    assert given > 150
    # The bootstrap finds a tenth less spread of average precision at 20 pairs than there is (as the page on
    # statistics in docs/explanation says).
    assert hits / given >= (0.91 if name == "ap" else 0.93)


def test_intervals_of_a_paired_difference_cover_and_are_narrower_than_unpaired_ones():
    rng, hits, widths = np.random.default_rng(1), 0, []
    for seed in range(400):
        difficulty = rng.normal(0, 1, 50)
        first, second = (difficulty + shift + rng.normal(0, 0.3, 50) for shift in (0.5, 0.4))
        one, two, other = (
            resample(mean_statistic(values), 50, draw, replicates=500)
            for values, draw in ((first, seed), (second, seed), (second, seed + 10_000))
        )
        low, high = interval(one - two)
        hits += low <= 0.1 <= high
        widths.append((high - low) / np.ptp(interval(one - other)))
    assert covers(hits, 400)
    assert np.median(widths) < 0.5


def test_no_error_in_n_answers_is_an_interval_of_clopper_and_pearson():
    draws = resample(mean_statistic(np.ones(20)), 20, seed=0)
    exact = binomtest(20, 20).proportion_ci(0.95)
    assert interval(draws, (0.0, 1.0), 20) == pytest.approx((exact.low, exact.high))
    assert interval(draws) == (None, None)  # what losses can be is not known


def test_a_difference_to_a_score_without_errors_is_that_of_the_rows():
    """The uncertainty of one row less must not be added: a loss would seem smaller, or chance."""
    perfect, other = np.ones(20), np.repeat([1.0, 0.0], [14, 6])
    found = resample(mean_statistic(other), 20, seed=0) - resample(mean_statistic(perfect), 20, seed=0)
    assert interval(found) == pytest.approx(interval(resample(mean_statistic(other - perfect), 20, seed=0)))
    assert interval(found)[1] < 0


def test_few_units_and_undefined_draws_are_doubted():
    assert "4 are too few" in why_no_interval(resample(mean_statistic(np.arange(4.0)), 4, seed=0), 4)
    labels = np.array([1.0, 0, 0, 0, 0, 0])  # a third of the draws has no positive
    assert "undefined on 3" in why_no_interval(
        resample(partial(binary_metric, "ap", labels, np.arange(6.0)), 6, seed=0), 6
    )
    assert why_no_interval(resample(mean_statistic(np.arange(5.0)), 5, seed=0), 5) == ""


def test_draws_are_reproducible_and_centred():
    statistic = mean_statistic(np.arange(30.0))
    draws = resample(statistic, 30, seed=5)
    assert np.array_equal(draws, resample(statistic, 30, seed=5))
    assert not np.array_equal(draws, resample(statistic, 30, seed=6))
    assert draws.mean() == pytest.approx(observed(statistic, 30)) == 14.5
    assert draws.std() == pytest.approx(np.arange(30.0).std(ddof=1) / np.sqrt(30), rel=0.12)


def test_counts_are_of_units_drawn_with_replacement():
    counts = np.concatenate(list(resampled_counts(7, seed=0, replicates=3000)))
    assert counts.shape == (3000, 7)
    assert set(counts.sum(axis=1)) == {7.0}
    assert counts.var() == pytest.approx(6 / 7, rel=0.05)  # of a binomial of 7 draws with a chance of 1/7


# Early stopping: how often it is wrong, by simulation, and that it stops where it can ---------------------------------

BATCHES = 40


def stops_at(losses: torch.Tensor) -> int | None:
    """After how many batches a profile of these losses (batches, depths) would be converged."""
    tests = looks(len(losses))
    return next((n for n in tests if has_converged(losses[:n], len(tests))), None)


def test_looks_are_fixed_by_the_number_of_batches():
    assert looks(4) == ()
    assert looks(5) == (5,)
    assert looks(20) == (5, 10, 20)
    assert looks(60) == (5, 10, 20, 40, 60)


@pytest.mark.slow
@pytest.mark.parametrize("rivals", [1, 7], ids=["two near depths", "eight near depths"])
@pytest.mark.parametrize("gap", [1e-6, 0.1, 0.3])
def test_over_all_looks_a_wrong_depth_is_converged_on_once_in_twenty_at_most(rivals: int, gap: float):
    generator = torch.Generator().manual_seed(round(1000 * gap) + rivals)
    means = torch.full((16,), 50.0).double()  # far above
    means[[3, 11]] = 1 - gap  # the lowest of each half
    means[4 : 4 + rivals] = 1.0
    means[[12]] = 1.0
    wrong, tries = 0, 1000
    for _ in range(tries):
        shared = 3 * torch.randn(BATCHES, 1, generator=generator).double()
        losses = means + shared + torch.randn(BATCHES, 16, generator=generator).double()
        stop = stops_at(losses)
        if stop is not None:
            found = losses[:stop].mean(dim=0)
            wrong += (int(found[:8].argmin()), int(found[8:].argmin())) != (3, 3)
    assert wrong / tries <= 0.05


def test_what_batches_share_does_not_keep_it_from_stopping_and_ties_do():
    generator = torch.Generator().manual_seed(0)
    shared = 3 * torch.randn(BATCHES, 1, generator=generator).double()
    apart = torch.tensor([1.0, 0.9, 2.0, 1.9]) + shared + 0.02 * torch.randn(BATCHES, 4, generator=generator)
    assert stops_at(apart) == 5
    assert stops_at(shared.expand(-1, 4)) is None  # all depths are equal
    assert not has_converged(apart[:4]), "four batches are not nothing"
    assert has_converged(apart[:, :1]), "a single depth has no rival"


# A score of counts is the library's score of rows that are copied so often -------------------------------------------

N = 40
RNG = np.random.default_rng(9)
COUNTS = np.concatenate(list(resampled_counts(N, seed=1, replicates=25)))
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
        partial(averaged_metric, name, gold, found),
        lambda rows: score(gold[rows], found[rows], average=average, zero_division=0),
    )


def test_v_measure_of_counts_is_sklearns():
    units = RNG.integers(0, N, 200)  # mteb's own draws of texts
    gold, found = RNG.integers(0, 4, N)[units], RNG.integers(0, 3, N)[units]

    def expected(rows: np.ndarray) -> float:
        again = np.concatenate([np.flatnonzero(units == row) for row in rows])
        return v_measure_score(gold[again], found[again])

    same(v_measure_of(units, gold, found, N), expected)
