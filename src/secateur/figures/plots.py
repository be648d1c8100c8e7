"""The figures: score against cost, training curves, and what a scout and a profile hold against depth."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from secateur.document import count, shorten
from secateur.figures.style import (
    COLOURS,
    DASHES,
    INK,
    MOST_SERIES,
    NARROW,
    depth_axis,
    drawing,
    floats,
    gap,
    label_points,
    legend,
    look,
    new_figure,
)
from secateur.results import DepthScoreRow, Matrix, Profile, Scout, Training

# Score against cost ---------------------------------------------------------------------------------------------------


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full model", {"color": COLOURS[0], "marker": "s", "markersize": 8}),
    "cut": ("cut", {"color": COLOURS[2], "marker": "o"}),
    "rejected": ("cut, significantly worse", {"color": COLOURS[1], "marker": "X", "markerfacecolor": "none"}),
    "baseline": ("baseline", {"color": COLOURS[3], "marker": "D"}),
}
"""What a model is to the verdict → its name in the legend, and its look."""


@dataclass(frozen=True)
class Point:
    """One model in :func:`.frontier`.

    ``score`` is an average from 0 to 1, with its interval where it has one. ``series`` names the variants that a line
    joins, ``label`` stands beside the point. ``cost`` is what the horizontal axis shows, with the range that was
    measured; ``best``: no model is as good for less. ``kind`` is one of :data:`.KINDS`; ``marked``: the recommended
    one.
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
    kind: str = "cut"
    marked: bool = False


def frontier(points: Sequence[Point], cost: str) -> Figure:
    """Average score (× 100) against what it costs: a point per model with its intervals, a line through each series.

    A dashed line joins the best models at their cost (the Pareto front). Costs that span more than a factor of 20 are
    on a logarithmic axis.
    """
    with drawing():
        figure = new_figure(3.7)
        axes = figure.subplots()
        for name in dict.fromkeys(point.series for point in points):
            own = sorted((point.cost, 100 * point.score) for point in points if point.series == name)
            axes.plot(*zip(*own, strict=True), linewidth=0.8, alpha=0.5, color=INK)
        _draw_points(axes, points)
        front = sorted((point.cost, 100 * point.score) for point in points if point.best)
        if len(front) > 1:
            label, dashes = "best at its cost", (0, (4, 3))
            axes.plot(*zip(*front, strict=True), label=label, color=INK, linestyle=dashes, linewidth=1, zorder=1.5)
        axes.margins(x=0.1, y=0.14)
        values = [point.cost for point in points]
        if min(values) > 0 and max(values) > 20 * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0(?!\d)", "", count(value))))
        axes.set_xlabel(cost)
        axes.set_ylabel("Average score (× 100)")
        legend(figure, axes)
        told = sorted(points, key=lambda point: (not point.marked, -len(point.label)))
        label_points(axes, [(p.cost, 100 * p.score, shorten(p.label, 26)) for p in told if p.label])
    return figure


def _draw_points(axes: Any, points: Sequence[Point]) -> None:
    """Markers by kind, with error bars: the interval of the score, the range of the cost; a ring around the marked."""
    for kind, (name, style) in KINDS.items():
        if any(point.kind == kind for point in points):
            axes.plot([], [], linestyle="none", label=name, **style)
    for point in points:
        style = KINDS[point.kind][1]
        axes.plot(point.cost, 100 * point.score, clip_on=False, **style)
        bar = {"color": style["color"], "linewidth": 0.9}
        if point.low is not None and point.high is not None:
            axes.vlines(point.cost, 100 * point.low, 100 * point.high, **bar)
        if point.cost_low is not None and point.cost_high is not None:
            axes.hlines(100 * point.score, point.cost_low, point.cost_high, **bar)
    chosen = [(point.cost, 100 * point.score) for point in points if point.marked]
    if chosen:
        ring: dict[str, Any] = {"markersize": 15, "fillstyle": "none", "markeredgewidth": 2, "clip_on": False}
        axes.plot(*zip(*chosen, strict=True), "o", color=INK, label="recommended", **ring)


# Scouts ---------------------------------------------------------------------------------------------------------------


def frontier_figure(scout: Scout, chosen: int | None, tolerance: float) -> Figure:
    """Mean score (× 100) of a scout's depths, with 95 % intervals.

    A thick bar is the interval of the difference to the full depth, drawn where the score is: a depth is within the
    tolerance where all of its bar is above the lower edge of the band.

    Args:
        scout: The table to draw. Depths that were not trained are hollow.
        chosen: The depth that is marked; None: none is.
        tolerance: Points by which the band goes below the full depth's score.
    """
    rungs = [row for row in scout.rows if row.score is not None]
    points = [(row.depth, 100 * row.score) for row in rungs]
    full = points[-1][1]
    own = [(row.depth, 100 * row.low, 100 * row.high) for row in rungs if row.low is not None]
    paired = [row for row in rungs if row.difference_low is not None]
    difference = [(row.depth, full + 100 * row.difference_low, full + 100 * row.difference_high) for row in paired]
    marked = [point for point in points if point[0] == chosen]
    with drawing():
        figure = new_figure(3.9)
        axes = figure.subplots()
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], linewidth=1, alpha=0.6)
        dot: dict[str, Any] = {"color": COLOURS[0], "marker": "o", "linestyle": "none", "zorder": 3}
        for trained, face, name in ((True, COLOURS[0], "trained"), (False, "white", "scored, not trained")):
            shown = [point for row, point in zip(rungs, points, strict=True) if row.trained is trained]
            if shown:
                axes.plot(*zip(*shown, strict=True), markerfacecolor=face, label=name, **dot)
        thin: dict[str, Any] = {"linewidth": 0.9, "label": "95 % interval: score"}
        thick: dict[str, Any] = {"linewidth": 4.5, "alpha": 0.4, "label": "95 % interval: difference"}
        for bars, style in ((own, thin), (difference, thick)):
            if bars:
                places, low, high = zip(*bars, strict=True)
                axes.vlines(places, low, high, COLOURS[0], **style)
        axes.axhline(full, color=COLOURS[2], linewidth=1, label="score of the full depth")
        band = f"up to {tolerance:g} below it"
        axes.axhspan(full - tolerance, full, label=band, color=COLOURS[2], alpha=0.22, linewidth=0)
        for point in marked:
            axes.plot(*point, "o", color=COLOURS[1], zorder=4, markersize=13, fillstyle="none", markeredgewidth=2)
        axes.set_ylabel("Mean score (× 100)")
        depth_axis(axes, scout.depth)
        legend(figure, axes)
        label_points(axes, [(*point, f"chosen: {chosen}") for point in marked])
    return figure


# Training -------------------------------------------------------------------------------------------------------------


def training_curves(trainings: Mapping[str, Training]) -> Figure:
    """Training loss against step, one line per healed model; below, where there are any, its evaluation scores.

    A ring marks the score of the step whose weights were kept.
    """
    scored = any(training.evaluations for training in trainings.values())
    with drawing():
        figure = new_figure(5.4 if scored else 3.3)
        panels = list(figure.subplots(1 + scored, sharex=True, squeeze=False).flat)
        for index, (name, training) in enumerate(trainings.items()):
            losses = {row.step: gap(row.loss) for row in training.rows}
            scores = {row.step: 100 * gap(row.score) for row in training.evaluations}
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
    panels = _panels_of(profile)
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
        depth_axis(bottom, profile.depth)
        figure.align_ylabels()
        found = {depth: loss for depth, loss in zip(depths, losses, strict=True) if math.isfinite(loss)}
        labels = [(float(depth), found[depth], mark) for depth, mark in marks.items() if depth in found]
        if labels:
            top.plot(*zip(*[(x, y) for x, y, _ in labels], strict=True), "D", color=COLOURS[1], markersize=7, zorder=3)
        label_points(top, labels)
    return figure


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
        for depth in marks:
            for rule in (axes.axvline, axes.axhline):
                rule(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2])
        for axis, label in ((axes.xaxis, axes.set_xlabel), (axes.yaxis, axes.set_ylabel)):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            label("Depth")
        bar: Any = figure.colorbar(mesh, ax=axes, label=title, shrink=0.9)
        bar.outline.set_visible(False)
        bar.solids.set(edgecolor="face", rasterized=True)
        label_points(axes, [(depth, edges[-1], mark) for depth, mark in marks.items()])
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


def _panels_of(profile: Profile) -> dict[str, list[_Curve]]:
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
            depth_axis(axes, depth)
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
            label_points(axes, labels)
    return figure
