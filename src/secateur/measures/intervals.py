"""How sure a score is: the paired bootstrap.

The rows of a task are one draw from the rows that it could have had. Drawn again with replacement (Efron 1979), they
give other scores, whose spread is that of the score. Two models that are resampled by the same draws can be subtracted
draw by draw: what rows have in common (some are hard for every model) cancels in the difference, as it should.

A draw is kept as how often each unit occurs in it, so that a score is a function of counts and never of copied rows.

Limits. The interval tells what other rows would have given, not what another training seed, another training set of
the classifier or another k-means start would have. A score of exactly 1 has no spread here, though 3 errors in n rows
would not be surprising (the rule of three). Fewer than :data:`FEWEST` units have no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""A score as a function of counts: (draws, units), how often each unit occurs, → (draws,)."""

DRAWS = 2000
CONFIDENCE = 0.95
FEWEST = 5
"""Units below which a bootstrap means nothing."""
_CHUNK = 1 << 21  # counts held at once: 16 MB


def resampled_counts(units: int, seed: int, draws: int = DRAWS) -> Iterator[Array]:
    """How often each unit occurs in each draw: (some draws, units) at a time; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // units)
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        picked = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def whole(statistic: Statistic, units: int) -> float:
    """The score of the rows as they are."""
    return float(statistic(np.ones((1, units)))[0])


def resample(statistic: Statistic, units: int, seed: int, draws: int = DRAWS) -> Array:
    """Scores of rows drawn again: (draws,), centred on the score of the rows as they are.

    Deviations are widened by sqrt(n / (n - 1)) t(n - 1) / z, the quantiles at :data:`CONFIDENCE`, because a percentile
    interval is that much too narrow for few rows (Hesterberg 2015, section 5.3, there as expanded percentiles).
    Centring leaves out the bootstrap's own bias, such as that of the best threshold or of an entropy on fewer
    distinct rows. A draw on which the score is undefined (all its labels alike) is NaN.
    """
    values = np.concatenate([statistic(counts) for counts in resampled_counts(units, seed, draws)])
    quantile = (1 + CONFIDENCE) / 2
    widening = np.sqrt(units / (units - 1)) * t.ppf(quantile, units - 1) / norm.ppf(quantile)
    centred: Array = whole(statistic, units) + (values - np.nanmean(values)) * widening
    return centred


def interval(draws: Array, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile interval of draws, undefined ones left out."""
    low, high = np.nanquantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def mean_of(draws: Sequence[Array]) -> Array:
    """Draws of the mean of several scores, drawn independently of each other."""
    mean: Array = np.mean(draws, axis=0)
    return mean
