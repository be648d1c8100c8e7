"""How sure a measured number is: one paired bootstrap, for losses and for scores, and a test for early stopping.

Units (rows of a task, batches of a profile) are drawn again with replacement (Efron 1979); the spread of the numbers
that they then give is that of the number. Replicates of two models that were drawn with the same seed can be
subtracted: that some rows are hard for every model cancels. A replicate is how often each unit occurs in it, so that a
score is a function of counts, never of copied rows.

An interval is about other units, not about another training seed, training set of the classifier or k-means start.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import count, takewhile

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm, t

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Numbers as a function of counts: (replicates, units) → (replicates,) or (replicates, numbers)."""

Interval = tuple[float, float] | tuple[None, None]

REPLICATES = 2000
CONFIDENCE = 0.95
MINIMUM_UNITS = 5
"""Units below which a bootstrap means nothing."""
MOST_UNDEFINED = 0.1
"""Share of replicates without a number beyond which the others stand for a part of the rows only."""
ROUNDING = 1e-12
"""Differences of scores below this are rounding."""
_CHUNK = 1 << 21  # counts in memory at once: 16 MB


def resampled_counts(units: int, seed: int, replicates: int = REPLICATES) -> Iterator[Array]:
    """How often each unit occurs in each replicate: (some, units) at a time."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // units)
    for start in range(0, replicates, size):
        rows = min(size, replicates - start)
        picked = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def mean_statistic(values: Sequence[float] | Array) -> Statistic:
    """The mean over units of their values: (units,), or (units, numbers) for several means at once."""
    fixed = np.asarray(values, dtype=np.float64)

    def mean(counts: Array) -> Array:
        return ((counts @ fixed).T / counts.sum(axis=1)).T

    return mean


def observed(statistic: Statistic, units: int) -> float:
    """The number of the units as they are."""
    return float(statistic(np.ones((1, units)))[0])


def resample(statistic: Statistic, units: int, seed: int, replicates: int = REPLICATES) -> Array:
    """Bootstrap replicates: (replicates,) or (replicates, numbers), centred on the number of the units as they are.

    Centring leaves out the bootstrap's own bias, such as that of the best threshold. Deviations are widened, because a
    percentile interval is too narrow for few units: by sqrt(n / (n - 1)) t(n - 1) / z (Hesterberg 2015, section 5.3,
    expanded percentiles); by 1 + 1 / n, found by simulation (``tests/test_intervals.py``), because few units hide that
    their values are skewed; and by sqrt(1 + (bias / standard deviation)²), because a bias that was left out is no less
    uncertain. A replicate on which the number is undefined (all its labels alike) is NaN.
    """
    values = np.concatenate([statistic(counts) for counts in resampled_counts(units, seed, replicates)])
    measured = statistic(np.ones((1, units)))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # undefined on every replicate
        mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    bias = np.divide(mean - measured, spread, out=np.zeros_like(spread), where=spread > 0)
    quantile = (1 + CONFIDENCE) / 2
    few = np.sqrt(units / max(1, units - 1)) * t.ppf(quantile, max(1, units - 1)) / norm.ppf(quantile)
    return measured + (values - mean) * few * (1 + 1 / units) * np.sqrt(1 + bias**2)


def why_no_interval(replicates: Array, units: int) -> str:
    """Why replicates of one number, (replicates,), give no interval; empty where they do."""
    undefined = float(np.isnan(replicates).mean())
    if units < MINIMUM_UNITS:
        return f"{units} are too few, it takes {MINIMUM_UNITS}"
    if undefined > MOST_UNDEFINED:
        return f"undefined on {100 * undefined:.0f} % of the draws"
    return ""


def interval(
    replicates: Array, limits: tuple[float, float] = (-math.inf, math.inf), units: int | None = None
) -> Interval:
    """Percentile interval at :data:`CONFIDENCE`, within what the number can be; undefined replicates left out.

    Where no two replicates differ (no error in n answers), it is that of Clopper and Pearson for so many ``units``, of
    which a share of 1 - 0.025^(1/n) may be at the other end; (None, None) without ``units``.
    """
    known = replicates[~np.isnan(replicates)]
    if known.size and np.ptp(known) > ROUNDING:
        ends = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    elif units is None or not known.size:
        return None, None
    else:
        share = 1 - ((1 - CONFIDENCE) / 2) ** (1 / units)
        ends = known.mean() * (1 - share) + share * np.array(limits)
    low, high = np.clip(ends, *limits)
    return float(low), float(high)


def limits_of(metric: str) -> tuple[float, float]:
    """What a score can be: a correlation from -1, anything else from 0, to 1."""
    return (-1.0 if "pearson" in metric or "spearman" in metric else 0.0), 1.0


def looks(batches: int) -> tuple[int, ...]:
    """After how many of the batches to test for early stopping: 5, 10, 20, …, and all; never with fewer than 5.

    They are fixed before the first batch, and each spends an equal share of the error (Bonferroni).
    """
    doubled = takewhile(lambda look: look < batches, (MINIMUM_UNITS << power for power in count()))
    return (*doubled, batches) if batches >= MINIMUM_UNITS else ()


def has_converged(losses: ArrayLike, looks: int = 1) -> bool:
    """Whether the lowest depth of each half is significantly below every other depth of its half.

    By two-sided paired t-tests over batches. Comparing the lowest with each other one needs no further correction: the
    error is largest where just two depths are near each other (Gutmann and Maymin 1987, "Is the selected population
    the best?"). Both halves must pass, so that they do not add up either.

    Args:
        losses: (batches, depths); fewer than five batches are never enough.
        looks: How many there are in all; over all of them, the probability to stop at a depth that is not the lowest
            is 1 - :data:`CONFIDENCE`.
    """
    values = np.asarray(losses, dtype=np.float64)
    batches, depths = values.shape
    if batches < MINIMUM_UNITS:
        return False
    needed = float(t.ppf(1 - (1 - CONFIDENCE) / (2 * looks), batches - 1))
    for half in (values[:, : depths // 2], values[:, depths // 2 :]):
        if half.shape[1] > 1:
            lowest = int(half.mean(axis=0).argmin())
            above = np.delete(half - half[:, [lowest]], lowest, axis=1)
            if not (above.mean(axis=0) > needed * above.std(axis=0, ddof=1) / batches**0.5).all():
                return False
    return True
