"""Where in depth each kind of task is solved: the measures of a profile, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from secateur.document import shorten
from secateur.figures.style import INK, depth_axis, drawing, floats, label_points, look, new_figure
from secateur.results import DepthScoreRow, Profile


@dataclass(frozen=True)
class Curve:
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


def panels_of(profile: Profile) -> dict[str, list[Curve]]:
    """Title of a panel → its curves: the contrastive loss, task scores by kind, and next-token loss."""
    rows, depths = profile.rows, [row.depth for row in profile.rows]
    panels: dict[str, list[Curve]] = {}
    if any(row.loss is not None for row in rows):
        losses, low, high = (floats([getattr(row, name) for row in rows]) for name in ("loss", "loss_low", "loss_high"))
        panels["Contrastive loss (nats)"] = [Curve("loss", depths, losses, low, high, falls=True)]
    by_kind: dict[str, dict[str, list[DepthScoreRow]]] = {}
    for score in profile.task_scores:
        by_kind.setdefault(score.kind, {}).setdefault(score.task, []).append(score)
    for kind, tasks in by_kind.items():
        title = f"{kind}: {shorten(next(iter(tasks)), 26)}" if len(tasks) == 1 else f"{kind} ({len(tasks)} tasks)"
        for task, own in tasks.items():
            scores, low, high = (
                [100 * v for v in floats([getattr(row, name) for row in own])] for name in ("score", "low", "high")
            )
            panels.setdefault(title, []).append(Curve(task, [row.depth for row in own], scores, low, high))
    if any(row.next_token_loss is not None for row in rows):
        values, none = floats([row.next_token_loss for row in rows]), [math.nan] * len(depths)
        panels["Next-token loss (nats)"] = [Curve("next token", depths, values, none, none, falls=True)]
    return panels


def solved_by_depth(depth: int, panels: Mapping[str, Sequence[Curve]]) -> Figure:
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
            label_points(figure, axes, labels, [(curve.depths, curve.values) for curve in curves])
    return figure
