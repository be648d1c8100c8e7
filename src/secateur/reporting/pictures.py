"""The pictures of a report: the figures of a run, each with what is said about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from matplotlib.figure import Figure

from secateur.document import Picture, byte_size, count, duration, plural, speed
from secateur.figures.plots import Point, frontier, frontier_figure, profile_figures, training_curves
from secateur.figures.style import svg
from secateur.reporting.findings import RunGroup, Summary, pareto
from secateur.reporting.run import Run, Scouted
from secateur.reporting.verdict import Recommendation

MOST_LABELS = 24
"""Points beyond which only the best are labelled."""
MILLION = 1e6


def _picture(key: str, title: str, caption: str, figure: Figure) -> Picture:
    return Picture(key, title, caption, svg(figure, key, title), figure)


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


def cost_pictures(summary: Summary, found: Recommendation) -> list[Picture]:
    """Average score against each cost that was measured."""
    drawn = []
    for name, cost in _COSTS.items():
        points = _points(summary, found, cost)
        if not points:
            continue
        caption = "Each point is a model, numbers are layers kept, and lines join cuts of one kind."
        if any(point.low is not None for _, point in points):
            caption += " Vertical bars are 95 % intervals of scores; paired differences are known more precisely."
        caption += f" Horizontal bars reach from {cost.bars}." if cost.bars else ""
        key, title = f"score-{name.lower()}", f"Average score against {name.lower()}"
        drawn.append(_picture(key, title, caption, frontier([point for _, point in points], cost.axis)))
    return drawn


def _points(summary: Summary, found: Recommendation, measure: _Cost) -> list[tuple[RunGroup, Point]]:
    """A point for each group that is scored and has that cost."""
    told = [item.group for item in (found.ship, found.runner_up) if item]
    shown: list[tuple[RunGroup, Point]] = []
    for group in summary.groups:
        cost, average, first = group.cost, group.average, group.first
        if cost is None or average is None or not getattr(cost, measure.fields[0]):  # 0: not measured
            continue
        kind = summary.kind(group)
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
            kind=kind,
            marked=found.ship is not None and group is found.ship.group,
        )
        shown.append((group, point))
    sign = -1 if measure is _COSTS["Speed"] else 1  # more of it is better
    best = set(pareto([(sign * point.cost, point.score) for _, point in shown]))
    few = len(shown) <= MOST_LABELS
    return [
        (group, replace(point, best=index in best, label=point.label if few or index in best or point.marked else ""))
        for index, (group, point) in enumerate(shown)
    ]


def size_sentences(summary: Summary, threshold: float) -> list[str]:
    """For each base model with cuts of several sizes: beyond which of them a point of score costs too much.

    ``threshold``: million parameters that a point of score may cost. The size is that where the score less the price
    of the parameters is highest: to any larger one, a point costs more than the threshold.
    """
    sizes: dict[str, dict[int, float]] = {}
    for group in summary.groups:
        if group.cost and group.average and not group.first.is_baseline:
            own, size = sizes.setdefault(group.first.base, {}), group.cost.parameters
            own[size] = max(own.get(size, 0.0), group.average.value)
    said = []
    for base, own in sizes.items():
        best = max(own, key=lambda size: (100 * own[size] - size / (threshold * MILLION), -size))
        if len(own) > 1:
            is_largest = best == max(own)
            where = f"up to the largest size, {count(best)}" if is_largest else f"beyond {count(best)}"
            price = f"{'less' if is_largest else 'more'} than {threshold:g} M"
            said.append(f"{base}: {where} parameters, one more point of score costs {price}, by the averages measured.")
    return said


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
    figure = frontier_figure(scout, chosen, tolerance)
    return _picture(f"frontier-{number}", f"What every depth is worth: {scouted.name}", caption, figure)


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
    about = {
        "curve": (f"Loss by depth: {name}", curve),
        "solved": (f"Tasks by depth: {name}", solved),
        "cka": (f"Similarity of depths: {name}", cka),
        "angles": (f"Angles between depths: {name}", angles),
    }
    figures = profile_figures(profile, choice)
    return {kind: _picture(f"{kind}-{number}", *about[kind], figure) for kind, figure in figures.items()}


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
    return _picture("training", title, caption, training_curves(trainings))
