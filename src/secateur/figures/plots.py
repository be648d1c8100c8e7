"""The figures: score against cost, training curves, and what a profile holds against depth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from secateur.document import count, shorten
from secateur.figures.style import (
    COLOURS,
    DASHES,
    INK,
    MOST_SERIES,
    NARROW,
    drawing,
    floats,
    gap,
    legend,
    look,
    new_figure,
)
from secateur.results import DepthScoreRow, Matrix, Profile, Training

BOLD: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold"}

# Score against cost ---------------------------------------------------------------------------------------------------


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
    with drawing():
        figure = new_figure(3.6, NARROW)
        axes = figure.subplots()
        lines = []
        for index, name in enumerate(dict.fromkeys(point.series for point in points)):
            own = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
            lines.append(([point.cost for point in own], [100 * point.score for point in own]))
            axes.plot(*lines[-1], linewidth=1.2, **look(index, "linestyle"))
        _draw_points(axes, points)
        front = sorted((point.cost, 100 * point.score) for point in points if point.best)
        if len(front) > 1:
            dashed: dict[str, Any] = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1, "zorder": 1.5}
            axes.plot(*zip(*front, strict=True), label="best at its cost", **dashed)
        axes.margins(x=0.1, y=0.14)
        _finish(figure, axes, points, cost)
        labels = [(point.cost, 100 * point.score, shorten(point.label)) for point in points if point.label]
        _label_points(figure, axes, labels, lines)
    return figure


def size_curve(
    points: Sequence[Point], curve: Callable[[float], float] | None, plateau: float | None, limit: float | None
) -> Figure:
    """Average score (× 100) against parameters, with the fitted curve and its plateau where there are any.

    Args:
        points: As for :func:`frontier`, their cost in parameters.
        curve: Parameters → score.
        plateau: The score that the curve levels off at.
        limit: The size beyond which another point costs more than the threshold.
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
        if limit is not None:
            axes.axvline(limit, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[1], label="beyond: over budget")
        _finish(figure, axes, points, "Parameters, embedding table included")
    return figure


def _draw_points(axes: Any, points: Sequence[Point]) -> None:
    """Markers by series, with error bars: the interval of the score, the range of the cost."""
    series = list(dict.fromkeys(point.series for point in points))
    for index, name in enumerate(series):
        axes.plot([], [], linestyle="none", label=shorten(name), **look(index, "marker"))
    for place, point in enumerate(points):
        style = look(series.index(point.series), "marker")
        axes.plot(point.cost, 100 * point.score, clip_on=False, gid=f"point-{place}", **style)
        bar = {"color": style["color"], "linewidth": 0.9}
        if point.low is not None and point.high is not None:
            axes.vlines(point.cost, 100 * point.low, 100 * point.high, **bar)
        if point.cost_low is not None and point.cost_high is not None:
            axes.hlines(100 * point.score, point.cost_low, point.cost_high, **bar)


def _finish(figure: Figure, axes: Any, points: Sequence[Point], cost: str) -> None:
    """Axes and legend; costs that span more than a factor of 20 are on a logarithmic axis."""
    values = [point.cost for point in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: count(value).replace(".0", "")))
    axes.set_xlabel(cost)
    axes.set_ylabel("Average score (× 100)")
    if len({point.series for point in points}) <= MOST_SERIES:
        legend(figure, axes)


def _label_points(
    figure: Figure,
    axes: Any,
    labels: Sequence[tuple[float, float, str]],
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Put each label (x, y, text) where it hides least: first of all no other label or point, then no line (x, y)."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes must not move once the free places are known
    frame, pixel, renderer = axes.get_window_extent(), figure.dpi / 72, FigureCanvasAgg(figure).get_renderer()
    frame = Bbox.from_extents(frame.x0, frame.y0, figure.bbox.x1, frame.y1 + 12 * pixel)
    covered = []  # pixels on the lines, about every eighth
    for line in lines:
        corners = [
            axes.transData.transform(point) for point in zip(*line, strict=True) if all(map(math.isfinite, point))
        ]
        for start, end in itertools.pairwise(corners):
            covered += np.linspace(start, end, 1 + max(1, int(math.dist(start, end) / 8))).tolist()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (axes.transData.transform(p[:2]) for p in labels)]
    for x, y, text in labels:
        trial = axes.text(x, y, text, **BOLD)
        size = Text.get_window_extent(trial, renderer)
        trial.remove()
        place = axes.transData.transform((x, y))
        best: tuple[float, int, Any, Bbox] | None = None
        for radius, angle in itertools.product((8, 18, 32, 48), (90, 45, 135, 0, 180, 270, 315, 225)):
            # From the point to the middle of the text, in typographic points; its nearest edge is at the radius.
            away = np.round([math.cos(math.radians(angle)), math.sin(math.radians(angle))], 6)
            offset = radius * away + np.sign(away) * (size.width, size.height) / (2 * pixel)
            left, bottom = place + offset * pixel - (size.width / 2, size.height / 2)
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
            hidden = 1e6 * outside + 1e3 * sum(box.padded(2 * pixel).overlaps(other) for other in taken)
            hidden += 10 * sum(box.contains(*pixels) for pixels in covered) + radius
            if best is None or hidden < best[0]:
                best = hidden, radius, offset, box
        assert best is not None
        _, radius, offset, box = best
        arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4} if radius > 10 else None
        style = {"textcoords": "offset points", "ha": "center", "va": "center", "arrowprops": arrow, "zorder": 4}
        axes.annotate(text, (x, y), tuple(offset), annotation_clip=False, **style, **BOLD)
        taken.append(box)


# Training -------------------------------------------------------------------------------------------------------------


def training_curves(trainings: Mapping[str, Training]) -> Figure:
    """Training loss against step, one line per healed model; below, where there are any, its evaluation scores.

    A ring marks the score of the step whose weights were kept.
    """
    scored = any(training.trials for training in trainings.values())
    with drawing():
        figure = new_figure(5.4 if scored else 3.3)
        panels = list(figure.subplots(1 + scored, sharex=True, squeeze=False).flat)
        for index, (name, training) in enumerate(trainings.items()):
            losses = {row.step: gap(row.loss) for row in training.rows}
            scores = {row.step: 100 * gap(row.score) for row in training.trials}
            for axes, curve in zip(panels, (losses, scores), strict=False):
                style = look(index, "linestyle", "marker") | {"markersize": 4.5, "linewidth": 1.4}
                if curve:
                    every = max(1, len(curve) // 8)
                    axes.plot([*curve], [*curve.values()], markevery=every, label=shorten(name), **style)
            if scores:
                kept = {step: score for step, score in scores.items() if step == training.best_step}
                ring = {"marker": "o", "markersize": 11, "fillstyle": "none", "markeredgewidth": 1.6}
                panels[1].plot([*kept], [*kept.values()], linestyle="none", **look(index), **ring)
        panels[0].set_ylabel("Training loss (nats)")
        if scored:
            panels[1].set_ylabel("Evaluation score (× 100)")
        panels[-1].set_xlabel("Step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(trainings) <= MOST_SERIES:
            legend(figure, panels[0])
    return figure


# Profiles -------------------------------------------------------------------------------------------------------------


def profile_figures(profile: Profile, choice: Mapping[str, int] | None = None) -> dict[str, Figure]:
    """Every figure that a profile allows: ``curve``, ``cka``, ``angles`` and ``solved``, by these names.

    Args:
        profile: The table to draw.
        choice: Name of a choice → depth, such as ``{"small": 7, "large": 24}``; these depths are marked.
    """
    marked: dict[int, list[str]] = {}
    for name, depth in sorted((choice or {}).items(), key=lambda item: item[1]):
        marked.setdefault(depth, []).append(name)
    marks = {depth: f"{shorten(', '.join(names))}: {depth}" for depth, names in marked.items()}
    drawn = {"curve": _loss_curve(profile, marks)}
    if len(profile.cka) > 1:
        drawn["cka"] = _depth_map(profile.cka, 1, "Linear CKA", marks, cmap="cividis", vmax=1.0)
    if len(profile.angular) > 2:  # colours run the other way, so that alike is light in both maps
        title = "Angular distance (share of π)"
        drawn["angles"] = _depth_map(profile.angular, 0, title, marks, cmap="cividis_r", vmin=0.0)
    panels = _panels(profile)
    if len(panels) > 1:
        drawn["solved"] = _solved_by_depth(profile.depth, panels)
    return drawn


def _loss_curve(profile: Profile, marks: Mapping[int, str]) -> Figure:
    """The loss of the untrained model against depth with its 95 % interval; beneath, Block Influence and rank."""
    depths, losses = [row.depth for row in profile.rows], floats([row.loss for row in profile.rows])
    with drawing():
        figure = new_figure(4.6)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1, 1))
        low, high = (floats([getattr(row, end) for row in profile.rows]) for end in ("loss_low", "loss_high"))
        top.fill_between(depths, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        top.plot(depths, losses, color=COLOURS[0], marker="o", markersize=3)
        top.margins(y=0.13)
        middle.bar(depths, floats([row.block_influence for row in profile.rows]), color=COLOURS[2], width=0.7)
        ranks = floats([row.effective_rank for row in profile.rows])
        bottom.plot(depths, ranks, color=COLOURS[3], linestyle=DASHES[1])
        for axes, title in ((top, "Loss (nats)"), (middle, "Block\nInfluence"), (bottom, "Effective\nrank")):
            axes.set_ylabel(title)
            for depth in marks:
                axes.axvline(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2], zorder=0.5)
        _depth_axis(bottom, profile.depth)
        figure.align_ylabels()
        by_depth = dict(zip(depths, losses, strict=True))
        labels = [
            (float(depth), by_depth[depth], mark)
            for depth, mark in marks.items()
            if math.isfinite(by_depth.get(depth, math.nan))
        ]
        if labels:
            top.plot(*zip(*[(x, y) for x, y, _ in labels], strict=True), "D", color=COLOURS[1], markersize=7, zorder=3)
        _label_points(figure, top, labels, [(depths, losses)])
    return figure


def _depth_axis(axes: Any, depth: int) -> None:
    axes.set_xlabel(f"Depth (blocks kept, of {depth})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, depth + 0.5)


def _depth_map(matrix: Matrix, first: int, title: str, marks: Mapping[int, str], **colours: Any) -> Figure:
    """A number for each pair of depths, the lowest of which is ``first``; marked depths are ruled and named above."""
    values = np.array([floats(row) for row in matrix])
    edges = np.arange(len(values) + 1) + first - 0.5
    with drawing():
        figure = new_figure(4.0, NARROW)
        axes = figure.subplots()
        # As an image within the figure: cells of 80 depths as paths would be a megabyte. Edges hide the seams.
        mesh = axes.pcolormesh(edges, edges, values, edgecolors="face", linewidth=0.2, rasterized=True, **colours)
        axes.set_aspect("equal")
        axes.grid(visible=False)
        for place, (depth, mark) in enumerate(marks.items()):
            for rule in (axes.axvline, axes.axhline):
                rule(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2])
            crowded = any(0 < abs(depth - other) < edges[-1] / 4 for other in marks)
            across = "center" if not crowded else "right" if place == 0 else "left"
            place_above: dict[str, Any] = {"xytext": (0, 3), "textcoords": "offset points", "annotation_clip": False}
            axes.annotate(mark, (depth, edges[-1]), ha=across, **place_above, **BOLD)
        for axis, label in ((axes.xaxis, axes.set_xlabel), (axes.yaxis, axes.set_ylabel)):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            label("Depth")
        bar: Any = figure.colorbar(mesh, ax=axes, label=title, shrink=0.9)
        bar.outline.set_visible(False)
        bar.solids.set(edgecolor="face", rasterized=True)
    return figure


@dataclass(frozen=True)
class _Curve:
    """One measure against depth; ``low`` and ``high`` are NaN where it has no interval."""

    name: str
    depths: list[int]
    values: list[float]
    low: list[float]
    high: list[float]
    falls: bool = False

    @property
    def best(self) -> int:
        """Place of the best value."""
        return int(np.nanargmin(np.array(self.values) * (1 if self.falls else -1)))

    @property
    def first(self) -> int:
        """Place of the first value inside the interval of the best."""
        bound = self.high[self.best] if self.falls else self.low[self.best]
        inside = (i for i, v in enumerate(self.values) if (v <= bound if self.falls else v >= bound))
        return next(inside, self.best)


def _panels(profile: Profile) -> dict[str, list[_Curve]]:
    """Title of a panel → its curves: the contrastive loss, task scores by kind, and next-token loss."""
    rows, depths = profile.rows, [row.depth for row in profile.rows]
    panels: dict[str, list[_Curve]] = {}
    if any(row.loss is not None for row in rows):
        losses, low, high = (floats([getattr(row, name) for row in rows]) for name in ("loss", "loss_low", "loss_high"))
        panels["Contrastive loss (nats)"] = [_Curve("loss", depths, losses, low, high, falls=True)]
    by_kind: dict[str, dict[str, list[DepthScoreRow]]] = {}
    for score in profile.task_scores:
        by_kind.setdefault(score.kind, {}).setdefault(score.task, []).append(score)
    for kind, tasks in by_kind.items():
        title = f"{kind}: {shorten(next(iter(tasks)), 26)}" if len(tasks) == 1 else f"{kind} ({len(tasks)} tasks)"
        for task, own in tasks.items():
            scores, low, high = (
                [100 * v for v in floats([getattr(row, name) for row in own])] for name in ("score", "low", "high")
            )
            panels.setdefault(title, []).append(_Curve(task, [row.depth for row in own], scores, low, high))
    if any(row.next_token_loss is not None for row in rows):
        values, none = floats([row.next_token_loss for row in rows]), [math.nan] * len(depths)
        panels["Next-token loss (nats)"] = [_Curve("next token", depths, values, none, none, falls=True)]
    return panels


def _solved_by_depth(depth: int, panels: Mapping[str, Sequence[_Curve]]) -> Figure:
    """Where in depth each kind of task is solved: a panel each, on the same axis, with 95 % intervals as bands.

    A full mark is on the best depth, a hollow one on the first that lies within the interval of the best.
    """
    rows = -(-len(panels) // 2)
    with drawing():
        figure = new_figure(0.55 + 1.55 * rows, 6.4)
        grid = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
        for place, (axes, (title, curves)) in enumerate(zip(grid, panels.items(), strict=False)):
            axes.set_title(title, loc="left", fontsize=8.5, fontweight="bold")
            for index, curve in enumerate(curves):
                style = look(index, "linestyle")
                axes.fill_between(curve.depths, curve.low, curve.high, color=style["color"], alpha=0.18, linewidth=0)
                axes.plot(curve.depths, curve.values, linewidth=1.4, **style)
                for mark, face in ((curve.first, "white"), (curve.best, style["color"])):
                    dot = look(index, "marker") | {"markerfacecolor": face, "markersize": 5, "linestyle": "none"}
                    axes.plot(curve.depths[mark], curve.values[mark], zorder=3, **dot)
            _depth_axis(axes, depth)
            axes.set_xlabel(axes.get_xlabel() if place >= len(panels) - 2 else "")
            axes.tick_params(labelbottom=place >= len(panels) - 2)
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.margins(y=0.2)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        dot = {"color": INK, "marker": "o", "linestyle": "none", "markersize": 5}
        handles = [Line2D([], [], markerfacecolor=face, **dot) for face in (INK, "none")]
        names = ["best depth", "first depth within its 95 % interval"]
        figure.legend(handles, names, loc="outside upper left", ncols=2, fontsize=8.5, handletextpad=0.2)
        for axes, curves in zip(grid, panels.values(), strict=False):
            labels = []
            for curve in curves:
                name = f"{shorten(curve.name, 22)}: " if len(curves) > 1 else ""
                for mark in dict.fromkeys((curve.best, curve.first)):
                    text = f"{name if mark == curve.best else ''}{curve.depths[mark]}"
                    labels.append((float(curve.depths[mark]), curve.values[mark], text))
            _label_points(figure, axes, labels, [(curve.depths, curve.values) for curve in curves])
    return figure
