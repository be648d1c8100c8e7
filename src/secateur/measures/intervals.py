"""How sure a measured number is: the paired bootstrap, the one way for losses and for scores.

The rows of a task, or the batches of a profile, are one draw from those that there could have been. Drawn again with
replacement (Efron 1979), they give other numbers, whose spread is that of the number. Two models (or two depths) that
are resampled by the same draws can be subtracted draw by draw: what rows have in common (some are hard for every
model) cancels in the difference, as it should.

A draw is kept as how often each unit occurs in it, so that a score is a function of counts and never of copied rows.

Limits. The interval is about what other units of the same number would have given, not what another training seed,
another training set of the classifier or another k-means start would have. Where there are too few units, or where a
number is often undefined, there is no interval (:func:`doubt` says why).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, t

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""Numbers as a function of counts: (draws, units), how often each unit occurs, → (draws,) or (draws, numbers)."""

Interval = tuple[float, float] | tuple[None, None]

DRAWS = 2000
CONFIDENCE = 0.95
FEWEST = 5
"""Units below which a bootstrap means nothing."""
MOST_UNDEFINED = 0.1
"""Share of draws without a number beyond which the others stand for a part of the rows only."""
ROUNDING = 1e-12
"""Differences of scores below this are rounding."""
_CHUNK = 1 << 21  # counts held at once: 16 MB


def resampled_counts(units: int, seed: int, draws: int = DRAWS) -> Iterator[Array]:
    """How often each unit occurs in each draw: (some draws, units) at a time; the same for the same arguments."""
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // units)
    for start in range(0, draws, size):
        rows = min(size, draws - start)
        picked = rng.integers(0, units, (rows, units)) + units * np.arange(rows)[:, None]
        yield np.bincount(picked.ravel(), minlength=rows * units).reshape(rows, units).astype(np.float64)


def mean_statistic(values: Sequence[float] | Array) -> Statistic:
    """The mean over units of their values: (units,), or (units, numbers) for several means at once."""
    fixed = np.asarray(values, dtype=np.float64)

    def mean(counts: Array) -> Array:
        means: Array = ((counts @ fixed).T / counts.sum(axis=1)).T
        return means

    return mean


def whole(statistic: Statistic, units: int) -> float:
    """The score of the rows as they are."""
    return float(statistic(np.ones((1, units)))[0])


def resample(
    statistic: Statistic, units: int, seed: int, draws: int = DRAWS, limits: tuple[float, float] | None = None
) -> Array:
    """Numbers of units drawn again: (draws,) or (draws, numbers), centred on the number of the units as they are.

    Centring leaves out the bootstrap's own bias, such as that of the best threshold or of an entropy on fewer distinct
    rows. Deviations are widened, because a percentile interval is too narrow for few units: by sqrt(n / (n - 1))
    t(n - 1) / z, the quantiles at :data:`CONFIDENCE` (Hesterberg 2015, section 5.3, there as expanded percentiles); by
    1 + 1 / n, found by simulation, because few units hide that their values are skewed; and by sqrt(1 + (bias /
    standard deviation)²), because a bias that was left out is no less uncertain. The simulations are in
    ``tests/test_intervals.py``: from five units on, 93 % of the intervals or more hold the expected number (91 % for
    average precision).

    A draw on which the number is undefined (all its labels alike) is NaN.

    Args:
        statistic: What is computed.
        units: How many units there are.
        seed: Of the drawing.
        draws: How often.
        limits: What the number can be, of a single number. Where units that are all alike give no spread (no error in
            n answers), the rule of three does: so many units may be at the other end.
    """
    values = np.concatenate([statistic(counts) for counts in resampled_counts(units, seed, draws)])
    measured = statistic(np.ones((1, units)))[0]
    if limits is not None and _is_constant(values):
        return _by_rule_of_three(float(measured), units, seed, draws, limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # undefined on every draw
        mean, spread = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    bias = np.divide(mean - measured, spread, out=np.zeros_like(spread), where=spread > 0)
    quantile = (1 + CONFIDENCE) / 2
    few = np.sqrt(units / max(1, units - 1)) * t.ppf(quantile, max(1, units - 1)) / norm.ppf(quantile)
    centred: Array = measured + (values - mean) * few * (1 + 1 / units) * np.sqrt(1 + bias**2)
    return centred


def _by_rule_of_three(measured: float, units: int, seed: int, draws: int, limits: tuple[float, float]) -> Array:
    """Draws where no unit differs from the others: the share of units that do may be 1 - u^(1/n) (Clopper-Pearson)."""
    rng = np.random.default_rng(seed)
    share = 1 - rng.random(draws) ** (1 / units)
    low, high = limits
    far = np.where(rng.random(draws) < 0.5, low, high)
    end = low if measured >= high - ROUNDING else high if measured <= low + ROUNDING else far
    values: Array = measured + share * (end - measured)
    return values


def doubt(draws: Array, units: int) -> str:
    """Why draws of one number, (draws,), give no interval; empty where they do."""
    undefined = float(np.isnan(draws).mean())
    if units < FEWEST:
        return f"{units} are too few, it takes {FEWEST}"
    if undefined > MOST_UNDEFINED:
        return f"undefined on {100 * undefined:.0f} % of the draws"
    return "all of them are alike" if _is_constant(draws) else ""


def interval(draws: Array, limits: tuple[float, float] = (-math.inf, math.inf)) -> Interval:
    """Percentile interval of draws at :data:`CONFIDENCE`, within what the number can be; undefined draws left out.

    Returns:
        Its ends; (None, None) where no two draws differ, which tells nothing of other rows.
    """
    if _is_constant(draws):
        return None, None
    ends = np.nanquantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.clip(ends, *limits)
    return float(low), float(high)


def _is_constant(draws: Array) -> bool:
    known = draws[~np.isnan(draws)]
    return known.size == 0 or bool(np.ptp(known) <= ROUNDING)


def limits_of(metric: str) -> tuple[float, float]:
    """What a score can be: a correlation from -1, anything else from 0, to 1."""
    return (-1.0 if "pearson" in metric or "spearman" in metric else 0.0), 1.0


def mean_of(draws: Sequence[Array]) -> Array:
    """Draws of the mean of several scores, drawn independently of each other."""
    mean: Array = np.mean(draws, axis=0)
    return mean
