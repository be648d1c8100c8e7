"""The pictures of a report: the figures of a run, each with what is said about it.

The curve of quality against size is q(N) = a - b (N / N0)^(-c), with N parameters, N0 the smallest size measured, and a
the plateau: the power law with an offset of the scaling laws (Kaplan et al. 2020; Hoffmann et al. 2022, eq. 2, in one
variable), for a score in place of a loss. For each exponent c of a grid, a and b follow by linear least squares; the
best c is kept. The interval of the plateau is that of the bootstrap over models. The models are cuts of one base model:
those of another have a plateau of their own. A curve is refused, with the reason, where the points do not support it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from secateur.document import Picture, byte_size, count, duration, loss, percent, plural, score, span, speed
from secateur.figures.plots import KINDS, frontier, frontier_figure, profile_figures, size_curve, training_curves
from secateur.figures.style import Point, svg
from secateur.measures.intervals import CONFIDENCE, Array
from secateur.reporting.findings import Summary, pareto
from secateur.reporting.run import Run, Scouted
from secateur.reporting.verdict import Recommendation
from secateur.results import DepthScoreRow, Profile

MOST_LABELS = 24
"""Points beyond which only the best are labelled."""
MOST_PROFILES = 8
"""Profiles drawn in the page; the others' figures are in their own folders."""
MILLION = 1e6


def _picture(
    key: str, title: str, caption: str, told: Sequence[str], figure: Figure, points: Sequence[Point] = ()
) -> Picture:
    """A figure with its content in words, for those who do not see it; of very many items the first."""
    more = f"; and {len(told) - MOST_LABELS} more, in the table" if len(told) > MOST_LABELS else ""
    text = "; ".join(told[:MOST_LABELS]) + more
    return Picture(key, title, caption, svg(figure, key, title, text, points), figure)


# Score against cost ---------------------------------------------------------------------------------------------------


class _Cost(NamedTuple):
    """How a cost's axis is called, how it is printed, its fields in :class:`.CostRow` (of itself, and of its range, if
    it has one), and what that range is.
    """

    axis: str
    show: Callable[[float], str]
    fields: tuple[str, ...]
    bars: str = ""


_SPEED, _LATENCY = ("texts_per_second", "speed_low", "speed_high"), ("latency_p50", "latency_p50", "latency_p95")
_COSTS = {
    "Speed": _Cost("Short texts per second (right is faster)", speed, _SPEED, "the slowest to the fastest round"),
    "Parameters": _Cost("Parameters (left is smaller)", count, ("parameters",)),
    "Bytes": _Cost("Bytes on disk (left is smaller)", byte_size, ("bytes",)),
    "Latency": _Cost(
        "Seconds for one short text (left is faster)", duration, _LATENCY, "the median to the 95th percentile"
    ),
}


def cost_pictures(summary: Summary, found: Recommendation) -> dict[str, Picture]:
    """Average score against each cost that was measured, by what it is called."""
    drawn = {}
    for name, cost in _COSTS.items():
        points = [point for _, point in _points(summary, found, cost)]
        if not points:
            continue
        told = [
            f"{point.note[0]} ({'recommended ' * point.marked}{KINDS[point.kind][0]}): {score(point.score)} at "
            f"{cost.show(point.cost)}"
            for point in sorted(points, key=lambda point: (not point.marked, not point.best))
        ]
        caption = "Each point is a model, numbers are layers kept, and lines join cuts of one kind."
        if any(point.low is not None for point in points):
            caption += " Vertical bars are 95 % intervals of scores; paired differences are known more precisely."
        caption += f" Horizontal bars reach from {cost.bars}." if cost.bars else ""
        key, title = f"score-{name.lower()}", f"Average score against {name.lower()}"
        drawn[name] = _picture(key, title, caption, told, frontier(points, cost.axis), points)
    return drawn


def _points(summary: Summary, found: Recommendation, measure: _Cost) -> list[tuple[str, Point]]:
    """For each group that is scored and has that cost, the base model and a point."""
    told = [item.group for item in (found.ship, found.runner_up) if item]
    shown: list[tuple[str, Point]] = []
    for group in summary.groups:
        cost, average, first = group.cost, group.average, group.first
        if cost is None or average is None or not getattr(cost, measure.fields[0]):  # 0: not measured
            continue
        within, origin = span(average.low, average.high), first.origin
        layers = f"{first.depth} of {first.blocks} layers" if first.blocks else "not of this study"
        tokens = f", {first.vocabulary.row.tokens:,} tokens" if first.vocabulary else ""
        sizes = f"{count(cost.parameters)} parameters; {byte_size(cost.bytes)}"
        latency = f"; {duration(cost.latency_p50)} for one" if cost.latency_p50 else ""
        note = (
            group.name,
            f"{layers}{tokens}; score {score(average.value)}{f' ({within})' if within else ''}",
            f"{sizes}; {speed(cost.texts_per_second)} texts/s{latency}",
            (origin.history or (origin.provenance.command,))[-1] if origin else "",
        )
        kind = found.kind(group)
        value, low, high = ([getattr(cost, name) for name in measure.fields] + [None, None])[:3]
        point = Point(
            series=first.series,
            label=group.name if group in told or kind in ("full", "baseline") else str(first.depth or ""),
            score=average.value,
            low=average.low,
            high=average.high,
            cost=value,
            cost_low=low,
            cost_high=high,
            note=tuple(line for line in note if line),
            link=summary.run.link(first),
            kind=kind,
            marked=found.ship is not None and group is found.ship.group,
        )
        shown.append((first.base, point))
    sign = -1 if measure is _COSTS["Speed"] else 1  # more of it is better
    best = set(pareto([(sign * point.cost, point.score) for _, point in shown]))
    few = len(shown) <= MOST_LABELS
    return [
        (base, replace(point, best=index in best, label=point.label if few or index in best or point.marked else ""))
        for index, (base, point) in enumerate(shown)
    ]


# Score against size ---------------------------------------------------------------------------------------------------

FEWEST_SIZES = 5
"""Distinct sizes below which three parameters are not fitted."""
LEAST_RATIO = 2.0
"""The largest size must be so many times the smallest."""
LEAST_EXPLAINED = 0.5
_EXPONENTS = np.geomspace(0.05, 5.0, 200)
_DRAWS = 1000


def size_pictures(summary: Summary, found: Recommendation, threshold: float) -> list[Picture]:
    """For each base model a curve through its series with the most sizes, the first of equally many.

    ``threshold``: million parameters that a point of score may cost.
    """
    series: dict[str, dict[str, list[Point]]] = {}
    for base, point in _points(summary, found, _COSTS["Parameters"]):
        series.setdefault(base, {}).setdefault(point.series, []).append(replace(point, label=""))
    pictures: list[Picture] = []
    for base, own in series.items():
        points = max(own.values(), key=len)
        if len(points) < 2 or len(pictures) == MOST_PROFILES:
            continue
        fitted = fit_saturation([p.cost for p in points], [p.score for p in points], threshold * MILLION)
        drawn = (None, None, None) if isinstance(fitted, str) else (fitted.score, fitted.plateau, fitted.limit)
        said = f"No curve is fitted: {fitted}." if isinstance(fitted, str) else fitted.sentence
        caption = f"{points[0].series}: {plural(len(points), 'model')}. {said}"
        told = [f"{count(point.cost)} parameters: {score(point.score)}" for point in points]
        key, title = f"saturation-{len(pictures) + 1}", f"Score against size: {base}"
        pictures.append(_picture(key, title, caption, told, size_curve(points, *drawn), points))
    return pictures


@dataclass(frozen=True)
class Saturation:
    """A fitted curve: a is ``plateau``, with its 95 % interval, b is ``gain``, c ``exponent``, N0 ``smallest``.

    ``largest`` is the largest size measured; ``explained`` is R², the share of the scores' variance that the curve
    explains; ``error`` the standard deviation of the residuals, with 3 parameters fitted to ``points`` models;
    ``threshold`` how many parameters one more point of 100 may cost.
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
        steepness = 100 * self.threshold * self.gain * self.exponent / self.smallest
        size = self.smallest * math.pow(steepness, 1 / (self.exponent + 1))
        return size if self.smallest <= size <= self.largest else None

    @property
    def sentence(self) -> str:
        """What the fit says, with its formula."""
        base, cost = f"(parameters / {count(self.smallest)})", f"costs {{}} than {count(self.threshold)} parameters."
        said = (
            f"Fitted by least squares to {plural(self.points, 'model')}: score = {score(self.plateau)} − "
            f"{score(self.gain)} × {base}^(−{self.exponent:.2f}); it explains {percent(self.explained)} of "
            f"the variance, residuals have a standard deviation of {score(self.error)} points. Plateau: "
            f"{score(self.plateau)} ({span(self.plateau_low, self.plateau_high)}, bootstrap over models)."
        )
        if self.limit is not None:
            return f"{said} Beyond {count(self.limit)} parameters, another point {cost.format('more')}"
        if self.marginal_cost(self.largest) <= self.threshold:
            return f"{said} At every size measured, another point {cost.format('less')}"
        return f"{said} Already at the smallest size measured, another point {cost.format('more')}"


def fit_saturation(sizes: Sequence[float], scores: Sequence[float], threshold: float) -> Saturation | str:
    """Fit the curve, or say why not: ``sizes`` in parameters, ``scores`` from 0 to 1, ``threshold`` as for a curve."""
    size, score = np.asarray(sizes, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    smallest, largest = float(size.min()), float(size.max())
    if len(set(sizes)) < FEWEST_SIZES:
        return f"{len(set(sizes))} sizes are too few for a curve of three parameters; it takes {FEWEST_SIZES}"
    if largest < LEAST_RATIO * smallest:
        return f"the largest model is only {largest / smallest:.1f} times the smallest"
    relative = size / smallest
    plateau, gain, exponent, squares = (float(part[0]) for part in _fit(relative, score, np.ones((1, len(size)))))
    total = float(np.sum((score - score.mean()) ** 2))
    if total == 0 or gain <= 0:
        return "the scores do not grow with size"
    explained, error = 1 - squares / total, math.sqrt(squares / max(1, len(size) - 3))
    if explained < LEAST_EXPLAINED:
        return f"the scores follow no such curve: it explains {100 * explained:.0f} % of their variance"
    if exponent <= _EXPONENTS[0]:
        return "the scores still grow with the logarithm of the size: no plateau is in sight"
    picked = np.random.default_rng(0).integers(0, len(size), (_DRAWS, len(size)))
    counts = np.stack([np.bincount(row, minlength=len(size)) for row in picked]).astype(np.float64)
    distinct = np.asarray([len(np.unique(relative[row])) for row in picked])
    plateaus = _fit(relative, score, counts[distinct >= 4])[0]  # three parameters on three sizes fit anything
    low, high = map(float, np.quantile(plateaus, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]))
    fitted = (plateau, min(low, plateau), max(high, plateau), gain, exponent)
    return Saturation(*fitted, smallest, largest, explained, error, len(size), threshold)


def _fit(relative: Array, score: Array, counts: Array) -> tuple[Array, ...]:
    """Least squares for each draw: counts (draws, models) → plateau, gain, exponent, sum of squares, (draws,) each."""
    weight = counts.sum(axis=1)
    mean = counts @ score / weight
    best: tuple[Array, ...] = (mean, mean, mean, np.full_like(mean, np.inf))
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
    return best


# Scouts, profiles and trainings --------------------------------------------------------------------------------------


def scout_picture(scouted: Scouted, number: int, tolerance: float) -> Picture:
    """What every depth is worth: the score of each rung."""
    scout, chosen = scouted.table, scouted.chosen
    trained = plural(sum(row.trained for row in scout.rows), "depth")
    caption = (
        f"Score of {scout.model} at each depth after one training of {trained} at once. Thin bars are 95 % intervals "
        "of the score, thick ones those of its difference to the full depth. Where all of a thick bar is above the "
        f"lower edge of the band, at most {tolerance:g} points are lost."
        + (f" Chosen: {chosen} of {scout.depth} layers." if chosen is not None else "")
    )
    told = [f"depth {row.depth}: {score(row.score)}" for row in scout.rows]
    figure = frontier_figure(scout, chosen, tolerance)
    return _picture(f"frontier-{number}", f"What every depth is worth: {scouted.name}", caption, told, figure)


def profile_pictures(run: Run, name: str, number: int) -> dict[str, Picture]:
    """The figures of one profile: ``curve`` and, where it has them, ``solved``, ``cka`` and ``angles``."""
    profile, choice = run.profiles[name], run.choices.get(name, {})
    marks = ", ".join(f"“{label}” at {depth}" for label, depth in sorted(choice.items(), key=lambda item: item[1]))
    curve = (
        f"Contrastive loss of the untrained {profile.model} after each layer, {plural(profile.batches, 'batch')} of "
        f"{profile.batch_size}, scale {profile.scale:g}, {profile.pooling} pooling; the band is its 95 % interval. "
        + (f"Chosen: {marks}." if marks else "")
    )
    solved = (
        "Scores of the untrained model at each depth, task by task, and its next-token loss if it generates text; "
        "scores × 100, bands are 95 % intervals."
    )
    cka = "Linear CKA of the vectors at all pairs of depths: 1 is the same up to rotation and scale."
    angles = (
        "Angular distance of the last token’s states at all pairs of depths, from the embeddings (0) on. "
        "Light squares along the diagonal are runs of layers that turn the states little."
    )
    losses = [f"depth {row.depth}: {loss(row.loss)}" for row in profile.rows]
    likeness = [[-(value or 0.0) for value in row] for row in profile.angular]
    told = {
        "curve": (f"Loss by depth: {name}", curve, losses),
        "solved": (f"Tasks by depth: {name}", solved, _best_depths(profile)),
        "cka": (f"Similarity of depths: {name}", cka, [f"{_farthest(profile.cka, 1)} the least alike."]),
        "angles": (f"Angles between depths: {name}", angles, [f"{_farthest(likeness, 0)} the farthest apart."]),
    }
    figures = profile_figures(profile, choice)
    return {kind: _picture(f"{kind}-{number}", *told[kind], figure) for kind, figure in figures.items()}


def _best_depths(profile: Profile) -> list[str]:
    """In words: the depth at which each task scores best."""
    best: dict[str, DepthScoreRow] = {}
    for row in profile.task_scores:
        if row.task not in best or row.score > best[row.task].score:
            best[row.task] = row
    sentences = [f"{task} is best at depth {row.depth} ({score(row.score)})" for task, row in best.items()]
    lens = [(row.next_token_loss, row.depth) for row in profile.rows if row.next_token_loss is not None]
    return sentences + ([f"the next-token loss is lowest at depth {min(lens)[1]}"] if lens else [])


def _farthest(likeness: Sequence[Sequence[float | None]], first: int) -> str:
    """In words: the two depths that are the least alike."""
    pairs = [(value, i, j) for i, row in enumerate(likeness) for j, value in enumerate(row) if value is not None]
    if not pairs:
        return "No two depths can be compared; none are"
    _, i, j = min(pairs)
    return f"Depths {i + first} and {j + first} are"


def training_picture(run: Run) -> Picture | None:
    """Losses, and evaluation scores where there are any."""
    trainings = {name: training for name, training in run.trainings.items() if training.rows}
    if not trainings:
        return None
    title = "Training loss"
    caption = f"Loss of each {'training' if run.scouts else 'healed model'}, the mean since the step logged before."
    if any(item.evaluations for item in trainings.values()):
        title += " and evaluation scores"
        caption += (
            " Below, its evaluation scores, each the mean over the held-out data; a ring marks the step whose weights "
            "were kept."
        )
    told = []
    for name, item in trainings.items():
        best = [row for row in item.evaluations if row.step == item.best_step]
        kept = [f"; the weights of step {row.step} were kept, with a score of {score(row.score)}" for row in best]
        told.append(f"{name} ends at {loss(item.rows[-1].loss)}{''.join(kept[:1])}")
    return _picture("training", title, caption, told, training_curves(trainings))
