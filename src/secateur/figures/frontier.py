"""Quality against what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from secateur.figures.labels import label_points
from secateur.figures.style import COLOURS, DASHES, INK, MARKERS, MOST_SERIES, NARROW, drawing, legend, new_figure
from secateur.figures.text import shorten


@dataclass(frozen=True)
class Point:
    """One model in :func:`frontier`. ``score`` is an average from 0 to 1, with its interval where it has one.

    ``series`` names the variants that a line joins, ``label`` stands beside the point. ``cost`` is what the horizontal
    axis shows, with the range that was measured; ``best``: no model is as good for less. ``note`` are lines that the
    page shows of the point, the first its name, and ``link`` where it leads.
    """

    series: str
    label: str
    score: float
    low: float | None
    high: float | None
    cost: float
    cost_low: float | None = None
    cost_high: float | None = None
    best: bool = False
    note: tuple[str, ...] = ()
    link: str = ""


def frontier(points: Sequence[Point], cost: str) -> Figure:
    """Average score (× 100) against what it costs: a point per model with its intervals, a line through each series.

    A dashed line joins the best models at their cost (the Pareto front). Each point's element has the id ``point-<i>``.
    """
    series = list(dict.fromkeys(point.series for point in points))
    with drawing():
        figure = new_figure(3.6, NARROW)
        axes = figure.subplots()
        lines = []
        for index, name in enumerate(series):
            own = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
            x, y = [point.cost for point in own], [100 * point.score for point in own]
            axes.plot(x, y, color=COLOURS[index % len(COLOURS)], linestyle=DASHES[index % len(DASHES)], linewidth=1.2)
            lines.append((x, y))
        _draw_points(axes, points)
        front = sorted((point.cost, 100 * point.score) for point in points if point.best)
        if len(front) > 1:
            axes.plot(
                *zip(*front, strict=True),
                color=INK,
                linestyle=(0, (4, 3)),
                linewidth=1,
                zorder=1.5,
                label="best at its cost",
            )
        _cost_axis(axes, [point.cost for point in points])
        axes.set_xlabel(cost)
        axes.set_ylabel("Average score (× 100)")
        axes.margins(x=0.1, y=0.14)
        if len(series) <= MOST_SERIES:
            legend(figure, axes)
        labels = [(point.cost, 100 * point.score, shorten(point.label)) for point in points if point.label]
        label_points(figure, axes, labels, lines)
    return figure


def _draw_points(axes: Any, points: Sequence[Point]) -> None:
    """Markers by series, with error bars: the interval of the score, the range of the cost."""
    series = list(dict.fromkeys(point.series for point in points))
    for index, name in enumerate(series):
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        axes.plot([], [], linestyle="none", label=shorten(name), **look)
    for place, point in enumerate(points):
        index = series.index(point.series)
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
        (drawn,) = axes.plot(point.cost, 100 * point.score, clip_on=False, **look)
        drawn.set_gid(f"point-{place}")
        style = {"color": look["color"], "linewidth": 0.9}
        if point.low is not None and point.high is not None:
            axes.vlines(point.cost, 100 * point.low, 100 * point.high, **style)
        if point.cost_low is not None and point.cost_high is not None:
            axes.hlines(100 * point.score, point.cost_low, point.cost_high, **style)


def size_curve(
    points: Sequence[Point], curve: Callable[[float], float] | None, plateau: float | None, dear: float | None
) -> Figure:
    """Average score (× 100) against parameters over all models, with the fitted curve and its plateau where there are.

    Args:
        points: As for :func:`frontier`, their cost in parameters.
        curve: Parameters → score.
        plateau: The score that the curve levels off at.
        dear: The size beyond which a point costs more than the threshold.
    """
    with drawing():
        figure = new_figure(3.3)
        axes = figure.subplots()
        _draw_points(axes, points)
        sizes = [point.cost for point in points]
        if curve is not None:
            steps = [min(sizes) * (max(sizes) / min(sizes)) ** (i / 100) for i in range(101)]
            axes.plot(steps, [100 * curve(size) for size in steps], color=INK, linewidth=1.3, label="fitted curve")
        if plateau is not None:
            axes.axhline(100 * plateau, color=INK, linewidth=0.9, linestyle=DASHES[2], label="plateau")
        if dear is not None:
            axes.axvline(dear, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[1], label="beyond: too dear")
        _cost_axis(axes, sizes)
        axes.set_xlabel("Parameters, embedding table included")
        axes.set_ylabel("Average score (× 100)")
        if len({point.series for point in points}) <= MOST_SERIES:
            legend(figure, axes)
    return figure


def _cost_axis(axes: Any, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))


def _short_count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
