"""What a run found: its models over their training seeds, and each cut model against the full one, with intervals.

A *design* is what a study decides on: a base model, the blocks kept, how they were chosen, and the recipe. Its models
differ in the training seed alone, and count as repetitions.

An interval has two parts. That of the rows is the paired bootstrap of :mod:`.intervals`, the draws averaged over the
seeds; without it there is no interval. That of the seeds is the standard error of the mean over them, times the
quantile of Student's t; the variance between seeds is pooled over the designs of a base model and recipe, as in a
one-way analysis of variance, because two or three seeds alone tell it badly. Half-widths are added in quadrature. With
one seed of every design there is no second part, and the interval says nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
from scipy.stats import t

from secateur.evaluation.replicates import is_paired, read_replicates
from secateur.measures.intervals import CONFIDENCE, Array, interval, limits_of, mean_of
from secateur.reporting.run import UNTRAINED, Run, Variant
from secateur.results import CostRow, ScoreRow

SAME = 0.02
"""The loss that must be outside the interval before a cut model is said to be as good as the full one: 2 points."""

Outcome = Literal["better", "same", "undecided", "worse", "unknown"]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval, None where it has none, and its standard error over training seeds."""

    value: float
    low: float | None = None
    high: float | None = None
    seed_error: float | None = None

    @property
    def apart(self) -> int:
        """Of a difference: 1 if above zero, -1 if below it, 0 if the interval does not tell."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return 0
        return 1 if self.low > 0 else -1


@dataclass(frozen=True)
class Design:
    """Models that differ in their training seed alone; one, where there are no others.

    Attributes:
        variants: The models, by seed.
        scores: Task → mean over the models; tasks that every model was scored on.
        average: Mean over the tasks; None where there are none, or one without a number.
        cost: Its models' costs in one row: means, and the extremes of ranges.
    """

    variants: tuple[Variant, ...]
    scores: Mapping[str, Estimate]
    average: Estimate | None
    cost: CostRow | None
    draws: Mapping[str, Array] = field(default_factory=dict, compare=False, repr=False)

    @property
    def first(self) -> Variant:
        """One of its models."""
        return self.variants[0]

    @property
    def name(self) -> str:
        """That of its model; of several, what their names have in common."""
        if len(self.variants) == 1:
            return self.first.name
        return self.first.name.removesuffix(f"-seed{self.first.seed}")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of its trainings."""
        return tuple(sorted({v.seed for v in self.variants if v.seed is not None and v.training is not None}))

    @cached_property
    def rows(self) -> dict[str, ScoreRow]:
        """Task → the row of one model, for what all have in common."""
        return {task: self.first.scores[task] for task in self.scores}


@dataclass(frozen=True)
class Claim:
    """A cut design beside the full model: the difference of average scores, and that of each task.

    A difference is no number where the two were scored on different things.
    """

    design: Design
    reference: Design
    difference: Estimate
    tasks: Mapping[str, Estimate]

    @property
    def is_known(self) -> bool:
        """Whether all tasks of the two were the same things, so that their averages have a difference."""
        return not math.isnan(self.difference.value)

    @property
    def share(self) -> Estimate:
        """The share kept of the full model's average score. Its interval is that of the difference alone."""
        assert self.reference.average is not None
        full = self.reference.average.value
        parts = (self.difference.value, self.difference.low, self.difference.high)
        return Estimate(*(None if part is None else 1 + part / full for part in parts))  # type: ignore[arg-type]

    @property
    def outcome(self) -> Outcome:
        """``same``: no difference outside the error, and no loss of more than :data:`SAME` within it.

        ``undecided``: no difference outside the error, which leaves room for such a loss. ``unknown``: no interval.
        """
        if self.difference.low is None:
            return "unknown"
        if self.difference.apart:
            return "better" if self.difference.apart > 0 else "worse"
        return "same" if self.difference.low >= -SAME else "undecided"

    @property
    def speed(self) -> tuple[float, bool] | None:
        """How many times as fast, in short texts per second, and whether the measured ranges are apart."""
        own, full = self.design.cost, self.reference.cost
        if own is None or full is None or not full.texts_per_second or own.texts_per_second is None:
            return None
        apart = own.speed_low > full.speed_high or own.speed_high < full.speed_low
        return own.texts_per_second / full.texts_per_second, apart

    def won(self, sign: int) -> tuple[str, ...]:
        """Tasks outside the error: those that it wins (1) or loses (-1)."""
        return tuple(task for task, difference in self.tasks.items() if difference.apart == sign)


@dataclass(frozen=True)
class Findings:
    """A run's designs; ``compared`` by name, those with a full model to compare with; and its claims by series."""

    run: Run
    designs: tuple[Design, ...]
    compared: Mapping[str, Claim]
    claims: Mapping[str, tuple[Claim, ...]]


def find(run: Run) -> Findings:
    """Average over seeds, and compare each cut design with its full model.

    Raises:
        DataError: A file of draws that a table names is missing or damaged.
    """
    groups = _grouped(run.variants)
    spreads = _seed_spreads(groups)
    designs = tuple(_design(group, spreads) for group in groups)
    references = {design.name: _reference(design, designs) for design in designs}
    compared = {
        design.name: _claim(design, reference, spreads)
        for design in designs
        if (reference := references[design.name]) is not None and reference is not design
    }
    claims: dict[str, list[Claim]] = {}
    for claim in compared.values():
        if not claim.design.first.is_full and claim.reference.average and claim.reference.average.value:
            claims.setdefault(claim.design.first.series, []).append(claim)
    # A base model's untrained cuts are no claim where trained ones are.
    trained = {own[0].design.first.base for own in claims.values() if own[0].design.first.recipe != UNTRAINED}
    kept = {
        series: tuple(own)
        for series, own in claims.items()
        if own[0].design.first.recipe != UNTRAINED or own[0].design.first.base not in trained
    }
    return Findings(run, designs, compared, kept)


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, score) points that no other beats: cheaper and as good, or better and as cheap."""
    best, kept = -math.inf, []
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[index][1] > best:
            best = points[index][1]
            kept.append(index)
    return kept


# Seeds ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Spread:
    """Pooled variance between seeds, of one score, and its degrees of freedom; itself, not its numbers, is its name."""

    variance: float
    freedom: int


def _grouped(variants: Iterable[Variant]) -> list[tuple[Variant, ...]]:
    groups: dict[object, list[Variant]] = {}
    for variant in variants:
        blocks = variant.origin.kept if variant.origin else variant.depth
        # Without a seed, models that are otherwise alike are not known to be repetitions.
        other = variant.name if variant.seed is None or variant.depth is None else ""
        groups.setdefault((variant.base, variant.state, blocks, other), []).append(variant)
    return [tuple(group) for group in groups.values()]


def _shared(group: Sequence[Variant]) -> list[str]:
    """Tasks that all models of a design have."""
    return [task for task in group[0].scores if all(task in variant.scores for variant in group)]


def _averages(group: Sequence[Variant], tasks: Sequence[str]) -> list[float] | None:
    """Each model's mean over the tasks; None where a score is missing."""
    rows = [[variant.scores[task].score for task in tasks] for variant in group]
    if not tasks or any(score is None for row in rows for score in row):
        return None
    return [sum(row) / len(row) for row in rows]


def _seed_spreads(groups: Sequence[Sequence[Variant]]) -> dict[tuple[str, str, str], _Spread]:
    """(base, recipe, task) → the spread over seeds; task is empty for the average over tasks."""
    squares: dict[tuple[str, str, str], list[tuple[float, int]]] = {}
    for group in groups:
        tasks = _shared(group)
        for task, of in (*((task, [task]) for task in tasks), ("", tasks)):
            values = _averages(group, of)
            if values and len(values) > 1:
                part = float(np.var(values)) * len(values), len(values) - 1
                squares.setdefault((group[0].base, group[0].recipe, task), []).append(part)
    return {
        key: _Spread(sum(square for square, _ in parts) / sum(n for _, n in parts), sum(n for _, n in parts))
        for key, parts in squares.items()
    }


def _seeds(
    group: Sequence[Variant], task: str, spreads: Mapping[tuple[str, str, str], _Spread]
) -> tuple[_Spread, int] | None:
    """The spread between a design's seeds and how many there are; None: not known, or no training."""
    spread = spreads.get((group[0].base, group[0].recipe, task))
    return (spread, len(group)) if spread else None


def _student(parts: Iterable[tuple[_Spread, int] | None]) -> tuple[float | None, float]:
    """Standard error and half-width at 95 % of a sum or difference of means over seeds.

    Means that share a pooled variance share its degrees of freedom, as in an analysis of variance; of different ones
    they are put together by Welch and Satterthwaite's formula.
    """
    shares: dict[_Spread, float] = {}
    for spread, models in (part for part in parts if part is not None):
        shares[spread] = shares.get(spread, 0.0) + 1 / models
    if not shares:
        return None, 0.0
    variances = [(spread.variance * share, spread.freedom) for spread, share in shares.items()]
    variance = sum(value for value, _ in variances)
    if variance == 0:
        return 0.0, 0.0
    freedom = variance**2 / sum(value**2 / n for value, n in variances)
    return math.sqrt(variance), float(t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)


def _estimate(
    value: float, draws: Array | None, seeds: Iterable[tuple[_Spread, int] | None], limits: tuple[float, float]
) -> Estimate:
    """A value with its interval, within what it can be."""
    error, half = _student(seeds)
    low, high = interval(draws) if draws is not None else (None, None)
    if low is None or high is None:
        return Estimate(value, seed_error=error)
    ends = np.clip([value - math.hypot(value - low, half), value + math.hypot(high - value, half)], *limits)
    return Estimate(value, float(ends[0]), float(ends[1]), error)


def _limits(group: Sequence[Variant], tasks: Sequence[str]) -> tuple[float, float]:
    """What the mean of a design's scores can be."""
    limits = [limits_of(group[0].scores[task].metric) for task in tasks]
    return float(np.mean([low for low, _ in limits])), float(np.mean([high for _, high in limits]))


# Designs and claims ---------------------------------------------------------------------------------------------------


def _design(group: tuple[Variant, ...], spreads: Mapping[tuple[str, str, str], _Spread]) -> Design:
    tasks = _shared(group)
    draws = {task: drawn for task in tasks if (drawn := _draws(group, task)) is not None}
    scores: dict[str, Estimate] = {}
    for task in tasks:
        values = _averages(group, [task])
        if values:
            seeds = [_seeds(group, task, spreads)]
            scores[task] = _estimate(float(np.mean(values)), draws.get(task), seeds, _limits(group, [task]))
        else:
            scores[task] = Estimate(math.nan)
    values = _averages(group, tasks)
    every = mean_of(list(draws.values())) if draws and len(draws) == len(tasks) else None
    average = None
    if values:
        average = _estimate(float(np.mean(values)), every, [_seeds(group, "", spreads)], _limits(group, tasks))
    return Design(group, scores, average, _cost(group), draws)


def _draws(group: Sequence[Variant], task: str) -> Array | None:
    """The draws of the mean over a design's models; None where they are not of the same things."""
    rows = [variant.scores[task] for variant in group]
    if any(not row.draws or not is_paired(row, rows[0]) for row in rows):
        return None
    read = [read_replicates(variant.results[task], row) for variant, row in zip(group, rows, strict=True)]
    drawn = [draws for draws in read if draws is not None]
    return mean_of(drawn) if len(drawn) == len(group) else None


def _reference(design: Design, designs: Iterable[Design]) -> Design | None:
    """The full model to compare with: of the same base and recipe, else as it came.

    None where the run has none, or where it was not scored on the same tasks: averages would not compare.
    """
    own = design.first
    full = [other for other in designs if other.first.base == own.base and other.first.is_full]
    same = [other for other in full if other.first.recipe == own.recipe]
    for other in same or [other for other in full if other.first.recipe == UNTRAINED]:
        if other.average is not None and design.average is not None and other.scores.keys() == design.scores.keys():
            return other
    return None


def _claim(design: Design, reference: Design, spreads: Mapping[tuple[str, str, str], _Spread]) -> Claim:
    assert design.average is not None
    assert reference.average is not None
    tasks, parts = {}, []
    for task in design.scores:
        drawn = _difference_draws(design, reference, task)
        seeds = [_seeds(each.variants, task, spreads) for each in (design, reference)]
        tasks[task] = _difference(design, reference, [task], drawn, seeds)
        parts.append(drawn)
    known = [drawn for drawn in parts if drawn is not None]
    every = mean_of(known) if known and len(known) == len(parts) else None
    seeds = [_seeds(each.variants, "", spreads) for each in (design, reference)]
    return Claim(design, reference, _difference(design, reference, list(tasks), every, seeds), tasks)


def _difference(
    design: Design,
    reference: Design,
    tasks: Sequence[str],
    draws: Array | None,
    seeds: Iterable[tuple[_Spread, int] | None],
) -> Estimate:
    """Of the mean over tasks; no number where the two were scored on different things."""
    values = [_averages(each.variants, tasks) for each in (design, reference)]
    if values[0] is None or values[1] is None or not all(_are_same(design, reference, task) for task in tasks):
        return Estimate(math.nan)
    low, high = _limits(design.variants, tasks)
    return _estimate(float(np.mean(values[0]) - np.mean(values[1])), draws, seeds, (low - high, high - low))


def _difference_draws(design: Design, reference: Design, task: str) -> Array | None:
    if task not in design.draws or task not in reference.draws or not _are_same(design, reference, task):
        return None
    difference: Array = design.draws[task] - reference.draws[task]
    return difference


def _are_same(design: Design, reference: Design, task: str) -> bool:
    """Whether all models of the two were scored on the same things."""
    rows = [variant.scores[task] for each in (design, reference) for variant in each.variants]
    return all(is_paired(row, rows[0]) for row in rows)


_LOWEST, _HIGHEST = ("speed_low", "long_speed_low"), ("speed_high", "long_speed_high")


def _cost(group: Sequence[Variant]) -> CostRow | None:
    rows = [variant.cost for variant in group if variant.cost is not None]
    if len(rows) < 2:
        return rows[0] if rows else None
    together: dict[str, Any] = {}
    for name in (item.name for item in fields(CostRow)):
        values = [getattr(row, name) for row in rows]
        if all(isinstance(value, (int, float)) for value in values) and len(set(values)) > 1:
            mean = min(values) if name in _LOWEST else max(values) if name in _HIGHEST else float(np.mean(values))
            together[name] = round(mean) if all(isinstance(value, int) for value in values) else mean
    return replace(rows[0], **together)
