"""Quality against size: a curve that levels off, and the size beyond which another point costs too much.

The curve is q(N) = a - b (N / N0)^(-c), with N parameters, N0 the smallest size measured, and a the plateau: the power
law with an offset of the scaling laws (Kaplan et al. 2020; Hoffmann et al. 2022, eq. 2, in one variable), for a score
in place of a loss. For each exponent c of a grid, a and b follow by linear least squares; the best c is kept. Intervals
are those of the bootstrap over models.

The models are cuts of one base model: those of another have a plateau of their own. A curve is refused, with the
reason, where the points do not support it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from secateur.measures.intervals import CONFIDENCE, Array

FEWEST_SIZES = 5
"""Distinct sizes below which three parameters are not fitted."""
SPAN = 2.0
"""The largest size must be so many times the smallest."""
LEAST_EXPLAINED = 0.5
_EXPONENTS = np.geomspace(0.05, 5.0, 200)
_DRAWS = 1000


@dataclass(frozen=True)
class Saturation:
    """A fitted curve.

    Attributes:
        plateau: a, the score that no size exceeds, and its 95 % interval.
        gain: b, what the smallest size is below the plateau.
        exponent: c.
        smallest: N0, in parameters; ``largest`` is the largest size measured.
        explained: R², the share of the scores' variance that the curve explains.
        error: Standard deviation of the residuals, with 3 parameters fitted.
        points: How many models it was fitted to.
        threshold: Parameters that one more point of 100 may cost.
    """

    plateau: float
    plateau_low: float
    plateau_high: float
    gain: float
    exponent: float
    smallest: float
    largest: float
    explained: float
    error: float
    points: int
    threshold: float

    def score(self, size: float) -> float:
        """The curve at a size in parameters."""
        return self.plateau - self.gain * math.pow(size / self.smallest, -self.exponent)

    def marginal_cost(self, size: float) -> float:
        """Parameters that one more point of 100 costs at a size."""
        slope = self.gain * self.exponent / self.smallest * math.pow(size / self.smallest, -self.exponent - 1)
        return 0.01 / slope

    @property
    def limit(self) -> float | None:
        """The size at which another point begins to cost more than the threshold; None outside the sizes measured."""
        size = self.smallest * (100 * self.threshold * self.gain * self.exponent / self.smallest) ** (
            1 / (self.exponent + 1)
        )
        return size if self.smallest <= size <= self.largest else None


def fit_saturation(sizes: Sequence[float], scores: Sequence[float], threshold: float) -> Saturation | str:
    """Fit the curve, or say why not.

    Args:
        sizes: Parameters of each model.
        scores: Its average score, 0 to 1.
        threshold: Parameters that a point of 100 may cost.
    """
    size, score = np.asarray(sizes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if len(set(sizes)) < FEWEST_SIZES:
        return f"{len(set(sizes))} sizes are too few for a curve of three parameters; it takes {FEWEST_SIZES}"
    if size.max() < SPAN * size.min():
        return f"the largest model is only {size.max() / size.min():.1f} times the smallest"
    relative = size / size.min()
    plateau, gain, exponent, squares = (float(part[0]) for part in _fit(relative, score, np.ones((1, len(size)))))
    total = float(np.sum((score - score.mean()) ** 2))
    if total == 0 or gain <= 0:
        return "the scores do not grow with size"
    explained = 1 - squares / total
    if explained < LEAST_EXPLAINED:
        return f"the scores follow no such curve: it explains {100 * explained:.0f} % of their variance"
    if exponent <= _EXPONENTS[0]:
        return "the scores still grow with the logarithm of the size: no plateau is in sight"
    picked = np.random.default_rng(0).integers(0, len(score), (_DRAWS, len(score)))
    counts = np.stack([np.bincount(row, minlength=len(score)) for row in picked]).astype(np.float64)
    distinct = np.asarray([len(np.unique(relative[row])) for row in picked])
    plateaus = _fit(relative, score, counts[distinct >= 4])[0]  # three parameters on three sizes fit anything
    low, high = map(float, np.quantile(plateaus, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    error = math.sqrt(squares / max(1, len(size) - 3))
    smallest, largest = float(size.min()), float(size.max())
    low, high = min(low, plateau), max(high, plateau)
    return Saturation(
        plateau, low, high, gain, exponent, smallest, largest, explained, error, len(size), threshold
    )  # fmt: skip


def _fit(relative: Array, score: Array, counts: Array) -> tuple[Array, Array, Array, Array]:
    """Least squares for each draw: counts (draws, models) → plateau, gain, exponent, sum of squares, (draws,) each."""
    weight = counts.sum(axis=1)
    mean = counts @ score / weight
    best: tuple[Array, ...] = (
        np.zeros_like(mean),
        np.zeros_like(mean),
        np.zeros_like(mean),
        np.full_like(mean, np.inf),
    )
    for exponent in _EXPONENTS:
        falling = -(relative**-exponent)
        centre = counts @ falling / weight
        variance = counts @ falling**2 / weight - centre**2
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(variance > 1e-12, (counts @ (falling * score) / weight - centre * mean) / variance, 0.0)
        plateau = mean - gain * centre
        squares = np.sum(counts * (score - plateau[:, None] - gain[:, None] * falling) ** 2, axis=1)
        found = plateau, gain, np.full_like(plateau, exponent), squares
        best = tuple(np.where(squares < best[3], new, old) for new, old in zip(found, best, strict=True))
    return best[0], best[1], best[2], best[3]
