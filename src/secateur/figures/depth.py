"""What a profile holds, against depth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from secateur.figures.labels import label_points
from secateur.figures.style import COLOURS, DASHES, INK, MARKERS, NARROW, drawing, new_figure, number
from secateur.figures.text import shorten
from secateur.results import DepthScoreRow, Matrix, Profile


def loss_curve(profile: Profile, choice: Mapping[str, int] | None = None) -> Figure:
    """The loss of the untrained model against depth, with the chosen depths marked.

    Beneath, on the same axis: Block Influence and effective rank. The band is the 95 % bootstrap interval of the mean
    over batches, where the profile has one.

    Args:
        profile: The table to draw.
        choice: Name of a choice → depth, such as ``{"small": 7, "large": 24}``.
    """
    choice = choice or {}
    depths = [row.depth for row in profile.rows]
    losses = [number(row.loss) for row in profile.rows]
    with drawing():
        figure = new_figure(4.6)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1, 1))
        low, high = ([number(value) for value in ends] for ends in zip(*_loss_intervals(profile), strict=True))
        top.fill_between(depths, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        top.plot(depths, losses, color=COLOURS[0], marker="o", markersize=3)
        top.margins(y=0.13)
        middle.bar(depths, [number(row.block_influence) for row in profile.rows], color=COLOURS[2], width=0.7)
        bottom.plot(depths, [number(row.effective_rank) for row in profile.rows], color=COLOURS[3], linestyle=DASHES[1])
        for axes, title in ((top, "Loss (nats)"), (middle, "Block\nInfluence"), (bottom, "Effective\nrank")):
            axes.set_ylabel(title)
            for depth in sorted(set(choice.values())):
                axes.axvline(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2], zorder=0.5)
        bottom.set_xlabel(f"Depth (blocks kept, of {profile.depth})")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        bottom.set_xlim(0.5, profile.depth + 0.5)
        figure.align_ylabels()
        by_depth = {row.depth: loss for row, loss in zip(profile.rows, losses, strict=True)}
        marked: dict[int, list[str]] = {}
        for name, depth in choice.items():
            marked.setdefault(depth, []).append(name)
        labels = [
            (float(depth), by_depth[depth], f"{shorten(', '.join(names))}: {depth}")
            for depth, names in sorted(marked.items())
            if math.isfinite(by_depth.get(depth, math.nan))
        ]
        if labels:
            top.plot(*zip(*[(x, y) for x, y, _ in labels], strict=True), "D", color=COLOURS[1], markersize=7, zorder=3)
        label_points(figure, top, labels, [(depths, losses)])
    return figure


def cka_map(profile: Profile, choice: Mapping[str, int] | None = None) -> Figure:
    """Linear CKA between all pairs of depths: which depths see texts alike. Chosen depths are ticked.

    Args:
        profile: With its CKA.
        choice: Name of a choice → depth.
    """
    return _depth_map(profile.cka, 1, "Linear CKA", "cividis", choice or {}, highest=1.0)


def angle_map(profile: Profile, choice: Mapping[str, int] | None = None) -> Figure:
    """Angular distance of the last token's states between all pairs of depths, from the embeddings (0) on.

    Colours run the other way than in :func:`cka_map`, so that alike is light in both.

    Args:
        profile: With its angular distances.
        choice: Name of a choice → depth.
    """
    return _depth_map(profile.angular, 0, "Angular distance (share of π)", "cividis_r", choice or {}, lowest=0.0)


def _depth_map(
    matrix: Matrix,
    first: int,
    title: str,
    colours: str,
    choice: Mapping[str, int],
    lowest: float | None = None,
    highest: float | None = None,
) -> Figure:
    values = np.array([[number(value) for value in row] for row in matrix])
    edges = np.arange(len(values) + 1) + first - 0.5
    with drawing():
        figure = new_figure(4.0, NARROW)
        axes = figure.subplots()
        # As an image within the figure: cells of 80 depths as paths would be a megabyte. Edges hide the seams.
        mesh = axes.pcolormesh(
            edges, edges, values, cmap=colours, vmin=lowest, vmax=highest, edgecolors="face", linewidth=0.2,
            rasterized=True,
        )  # fmt: skip
        axes.set_aspect("equal")
        axes.grid(visible=False)
        _tick_choices(axes, choice, edges[-1])
        for axis, label in ((axes.xaxis, axes.set_xlabel), (axes.yaxis, axes.set_ylabel)):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            label("Depth")
        bar: Any = figure.colorbar(mesh, ax=axes, label=title, shrink=0.9)
        bar.outline.set_visible(False)
        bar.solids.set(edgecolor="face", rasterized=True)
    return figure


def _tick_choices(axes: Any, choice: Mapping[str, int], top: float) -> None:
    """Lines through the chosen depths, with their names above the axes, which end at ``top``."""
    names: dict[int, list[str]] = {}
    for name, depth in sorted(choice.items(), key=lambda item: item[1]):
        names.setdefault(depth, []).append(name)
    depths = list(names)
    for place, depth in enumerate(depths):
        axes.axvline(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2])
        axes.axhline(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2])
        crowded = len(depths) > 1 and min(abs(depth - other) for other in depths if other != depth) < top / 4
        across = "center" if not crowded else "right" if place == 0 else "left"
        axes.annotate(
            f"{shorten(', '.join(names[depth]))}: {depth}", (depth, top), (0, 3), textcoords="offset points",
            ha=across, fontsize=8.5, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


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
        order = np.array(self.values) * (1 if self.falls else -1)
        return int(np.nanargmin(order))

    @property
    def first(self) -> int:
        """Place of the first value inside the interval of the best."""
        best = self.best
        bound = self.high[best] if self.falls else self.low[best]
        if math.isnan(bound):
            return best
        return next(i for i, v in enumerate(self.values) if (v <= bound if self.falls else v >= bound))


def solved_by_depth(profile: Profile) -> Figure:
    """Where in depth each kind of task is solved: the contrastive loss, task scores by kind, and next-token loss.

    One panel for each, on the same axis of depth, with 95 % intervals as bands. A full mark is on the best depth, a
    hollow one on the first that lies within the interval of the best.
    """
    panels = _panels(profile)
    rows = -(-len(panels) // 2)
    with drawing():
        figure = new_figure(0.55 + 1.55 * rows, 6.4)
        grid = figure.subplots(rows, 2, sharex=True, squeeze=False).flatten()
        for axes, (title, curves) in zip(grid, panels.items(), strict=False):
            axes.set_title(title, loc="left", fontsize=8.5, fontweight="bold")
            for index, curve in enumerate(curves):
                _draw_curve(axes, curve, index)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlim(0.5, profile.depth + 0.5)
            axes.margins(y=0.2)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        for axes in grid[max(0, len(panels) - 2) : len(panels)]:
            axes.set_xlabel(f"Depth (blocks kept, of {profile.depth})")
            axes.tick_params(labelbottom=True)
        full, hollow = (
            Line2D([], [], color=INK, marker="o", linestyle="none", markersize=5, markerfacecolor=face)
            for face in (INK, "none")
        )
        names = ["best depth", "first depth within its 95 % interval"]
        figure.legend([full, hollow], names, loc="outside upper left", ncols=2, fontsize=8.5, handletextpad=0.2)
        for axes, curves in zip(grid, panels.values(), strict=False):
            labels = [label for curve in curves for label in _labels(curve, named=len(curves) > 1)]
            label_points(figure, axes, labels, [(curve.depths, curve.values) for curve in curves])
    return figure


def _labels(curve: _Curve, named: bool) -> list[tuple[float, float, str]]:
    """What stands at a curve's marks: their depths, and the curve's name where it is not alone."""
    best, first = curve.best, curve.first
    name = f"{shorten(curve.name, 22)}: " if named else ""
    labels = [(float(curve.depths[best]), curve.values[best], f"{name}{curve.depths[best]}")]
    return labels + ([(float(curve.depths[first]), curve.values[first], str(curve.depths[first]))] * (first != best))


def _draw_curve(axes: Any, curve: _Curve, index: int) -> None:
    colour = COLOURS[index % len(COLOURS)]
    axes.fill_between(curve.depths, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(curve.depths, curve.values, color=colour, linestyle=DASHES[index % len(DASHES)], linewidth=1.4)
    for place, face in ((curve.first, "white"), (curve.best, colour)):
        axes.plot(
            curve.depths[place], curve.values[place], MARKERS[index % len(MARKERS)], color=colour,
            markerfacecolor=face, markersize=5, zorder=3,
        )  # fmt: skip


def _panels(profile: Profile) -> dict[str, list[_Curve]]:
    """Title → what is drawn there."""
    depths = [row.depth for row in profile.rows]
    none = [math.nan] * len(depths)
    panels: dict[str, list[_Curve]] = {}
    if any(row.loss is not None for row in profile.rows):
        low, high = ([number(value) for value in ends] for ends in zip(*_loss_intervals(profile), strict=True))
        losses = [number(row.loss) for row in profile.rows]
        panels["Contrastive loss (nats)"] = [_Curve("loss", depths, losses, low, high, falls=True)]
    by_kind: dict[str, dict[str, list[DepthScoreRow]]] = {}
    for row in profile.task_scores:
        by_kind.setdefault(row.kind, {}).setdefault(row.task, []).append(row)
    for kind, tasks in by_kind.items():
        title = f"{kind}: {shorten(next(iter(tasks)), 26)}" if len(tasks) == 1 else f"{kind} ({len(tasks)} tasks)"
        panels[title] = [
            _Curve(
                task, [row.depth for row in own], [100 * row.score for row in own],
                [100 * number(row.low) for row in own], [100 * number(row.high) for row in own],
            )
            for task, own in tasks.items()
        ]  # fmt: skip
    if any(row.next_token_loss is not None for row in profile.rows):
        values = [number(row.next_token_loss) for row in profile.rows]
        panels["Next-token loss (nats)"] = [_Curve("next token", depths, values, none, none, falls=True)]
    return panels


def _loss_intervals(profile: Profile) -> list[tuple[float | None, float | None]]:
    return [(row.loss_low, row.loss_high) for row in profile.rows]


def profile_figures(profile: Profile, choice: Mapping[str, int] | None = None) -> dict[str, Figure]:
    """Every figure that a profile allows: ``curve``, ``cka``, ``angles`` and ``solved``, by these names."""
    drawn = {"curve": loss_curve(profile, choice)}
    if len(profile.cka) > 1:
        drawn["cka"] = cka_map(profile, choice)
    if len(profile.angular) > 2:
        drawn["angles"] = angle_map(profile, choice)
    if len(_panels(profile)) > 1:
        drawn["solved"] = solved_by_depth(profile)
    return drawn
