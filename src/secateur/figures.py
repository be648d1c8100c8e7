"""Figures of a run: the curve of a profile, what quality costs, how healing went.

A figure is a plain ``matplotlib.figure.Figure`` (pyplot and its global state are not used), written by :func:`svg` or
:func:`save_png`. The same tables give the same bytes. Backgrounds are transparent and neutral colours legible on white
and on black; series differ in colour (Okabe and Ito's palette, for the colour-blind), in marker and in dashes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from secateur.artifacts import DepthScoreRow, Matrix, Profile, Training
from secateur.files import write_bytes

# Text and axes: 4.6:1 on white and on black. Inlined in a page, CSS gives the exact neutral by --figure-ink.
INK = "#757575"
# Okabe and Ito, without their yellow, and with orange and sky blue darkened to reach 3:1 on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87d00", "#3a8fc4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

NAME_LENGTH = 40
MOST_SERIES = 12
"""Beyond, a legend says less than it hides."""
WIDTH, NARROW = 5.6, 4.8  # inches, of 72 units each: type of 9 units is still legible on a phone

_STYLE: dict[str, Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": INK,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 6.5,
    "svg.hashsalt": "secateur",
    "svg.fonttype": "none",
}


_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


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
    losses = [_number(row.loss) for row in profile.rows]
    with _drawing():
        figure = _figure(4.6)
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3.2, 1, 1))
        low, high = ([_number(value) for value in ends] for ends in zip(*_loss_intervals(profile), strict=True))
        top.fill_between(depths, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
        top.plot(depths, losses, color=COLOURS[0], marker="o", markersize=3)
        top.margins(y=0.13)
        middle.bar(depths, [_number(row.block_influence) for row in profile.rows], color=COLOURS[2], width=0.7)
        bottom.plot(
            depths, [_number(row.effective_rank) for row in profile.rows], color=COLOURS[3], linestyle=DASHES[1]
        )
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
        _label_points(figure, top, labels, [(depths, losses)])
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
    values = np.array([[_number(value) for value in row] for row in matrix])
    edges = np.arange(len(values) + 1) + first - 0.5
    with _drawing():
        figure = _figure(4.0, NARROW)
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
    with _drawing():
        figure = _figure(0.55 + 1.55 * rows, 6.4)
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
            _label_points(figure, axes, labels, [(curve.depths, curve.values) for curve in curves])
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
        low, high = ([_number(value) for value in ends] for ends in zip(*_loss_intervals(profile), strict=True))
        losses = [_number(row.loss) for row in profile.rows]
        panels["Contrastive loss (nats)"] = [_Curve("loss", depths, losses, low, high, falls=True)]
    by_kind: dict[str, dict[str, list[DepthScoreRow]]] = {}
    for row in profile.task_scores:
        by_kind.setdefault(row.kind, {}).setdefault(row.task, []).append(row)
    for kind, tasks in by_kind.items():
        title = f"{kind}: {shorten(next(iter(tasks)), 26)}" if len(tasks) == 1 else f"{kind} ({len(tasks)} tasks)"
        panels[title] = [
            _Curve(
                task, [row.depth for row in own], [100 * row.score for row in own],
                [100 * _number(row.low) for row in own], [100 * _number(row.high) for row in own],
            )
            for task, own in tasks.items()
        ]  # fmt: skip
    if any(row.next_token_loss is not None for row in profile.rows):
        values = [_number(row.next_token_loss) for row in profile.rows]
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


def frontier(points: Sequence[Point], cost: str) -> Figure:
    """Average score (× 100) against what it costs: a point per model with its intervals, a line through each series.

    A dashed line joins the best models at their cost (the Pareto front). Each point's element has the id ``point-<i>``.
    """
    series = list(dict.fromkeys(point.series for point in points))
    with _drawing():
        figure = _figure(3.6, NARROW)
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
            _legend(figure, axes)
        labels = [(point.cost, 100 * point.score, shorten(point.label)) for point in points if point.label]
        _label_points(figure, axes, labels, lines)
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
    with _drawing():
        figure = _figure(3.3)
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
            _legend(figure, axes)
    return figure


def training_curves(trainings: Mapping[str, Training]) -> Figure:
    """Training loss against step, one line per healed model."""
    with _drawing():
        figure = _figure(3.3)
        axes = figure.subplots()
        for index, (name, training) in enumerate(trainings.items()):
            steps, losses = [row.step for row in training.rows], [_number(row.loss) for row in training.rows]
            colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
            marker = MARKERS[index % len(MARKERS)]
            every = max(1, len(steps) // 8)
            axes.plot(
                steps, losses, color=colour, linestyle=dashes, marker=marker, markersize=4.5, markevery=every,
                linewidth=1.4, label=shorten(name),
            )  # fmt: skip
        axes.set_xlabel("Step")
        axes.set_ylabel("Training loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(trainings) <= MOST_SERIES:
            _legend(figure, axes)
    return figure


def svg(figure: Figure, name: str, title: str, description: str, points: Sequence[Point] = ()) -> str:
    """The figure as an ``<svg>`` element to stand in a page, labelled for those who do not see it.

    Text stays text in the page's own font, and neutral colours follow the CSS variable ``--figure-ink``. Points become
    links: pointed at, or reached by keyboard, they show their notes at the foot of the figure (classes ``point``,
    ``tip`` and ``hint``, for the page's style).

    Args:
        figure: What one of the functions above drew.
        name: Prefix of all ids in the element; unique in its page, of letters, digits and ``-``.
        title: Short name of the figure.
        description: What there is to see, in words.
        points: Those that :func:`frontier` or :func:`size_curve` drew.
    """
    stream = io.BytesIO()
    _save(figure, stream, "svg", {"Date": None, "Creator": None, "Format": None, "Type": None}, dpi=200)
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(stream.getvalue())  # noqa: S314  our own output
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.attrib = {key: _page_attribute(key, value, name) for key, value in element.attrib.items()}
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "group" if points else "img", "aria-labelledby": f"{name}-title {name}-description"}
    if points:
        _link_points(root, name, points)
    for position, (tag, text) in enumerate((("title", title), ("desc", description))):
        element = ElementTree.Element(f"{{http://www.w3.org/2000/svg}}{tag}")
        element.attrib["id"] = f"{name}-{'title' if tag == 'title' else 'description'}"
        element.text = printable(text)
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


_SVG, _FOOT, _LETTERS = "{http://www.w3.org/2000/svg}", 56, 74


def _link_points(root: ElementTree.Element, name: str, points: Sequence[Point]) -> None:
    """Wrap each point's element in a link with its notes; they stand in a strip added below the figure."""
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    root.attrib["viewBox"] = f"0 0 {width:g} {height + _FOOT:g}"
    parents = {child: parent for parent in root.iter() for child in parent}
    elements = {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}
    hint = _child(root, "text", {"class": "hint", "x": "4", "y": f"{height + 14:g}"})
    hint.text = "Point at a model, or tab to it, for its numbers and the command that made it."
    for index, point in enumerate(points):
        element = elements[f"{name}-point-{index}"]
        parent = parents[element]
        link = ElementTree.Element(f"{_SVG}a" if point.link else f"{_SVG}g", {"class": "point"})
        link.attrib |= {"href": point.link} if point.link else {}
        # Past two dozen points, the keyboard stops at the best only; the tables hold the others.
        link.attrib["tabindex"] = "0" if point.best or len(points) <= 24 else "-1"
        parent[list(parent).index(element)] = link
        _child(link, "title", {}).text = "\n".join(printable(line) for line in point.note)
        link.append(element)
        marker = next(element.iter(f"{_SVG}use")).attrib
        _child(link, "circle", {"class": "hit", "cx": marker["x"], "cy": marker["y"], "r": "9"})
        tip = _child(link, "text", {"class": "tip", "aria-hidden": "true"})
        lines = [part for line in point.note for part in _wrapped(line)][: _FOOT // 11]
        for row, line in enumerate(lines):
            _child(tip, "tspan", {"x": "4", "y": f"{height + 14 + 11 * row:g}"}).text = line


def _child(parent: ElementTree.Element, tag: str, attributes: dict[str, str]) -> ElementTree.Element:
    return ElementTree.SubElement(parent, f"{_SVG}{tag}", attributes)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(shorten(text, 3 * _LETTERS), _LETTERS) or [""]


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG at 200 dots per inch, whole or not at all.

    Raises:
        OutputError: The place cannot be written.
    """
    stream = io.BytesIO()
    _save(figure, stream, "png", {"Software": None}, dpi=200)
    write_bytes(path, stream.getvalue())
    return Path(path)


def save_svg(figure: Figure, path: str | Path) -> Path:
    """Write the figure as SVG, whole or not at all; its text stays text.

    Raises:
        OutputError: The place cannot be written.
    """
    stream = io.BytesIO()
    _save(figure, stream, "svg", {"Date": None, "Creator": None}, dpi=200)
    write_bytes(path, stream.getvalue())
    return Path(path)


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """A name as it is drawn: printable, with its middle left out where it is longer than ``length`` characters."""
    text = printable(text)
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[-(length - 1 - head) :]}"


def printable(text: str) -> str:
    """The text without control characters, lone surrogates, and marks that turn the reading order."""
    return _UNPRINTABLE.sub("�", text)


def _figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def _drawing() -> Iterator[None]:
    """Our style for the time of drawing; the process's own settings are left as they are."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the bundled font lacks is drawn with boxes; the tables hold it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def _number(value: float | None) -> float:
    # A number that was not finite is null in the file; NaN leaves a gap in the line.
    return math.nan if value is None else value


def _save(figure: Figure, stream: io.BytesIO, kind: str, metadata: Mapping[str, None], **options: Any) -> None:
    with _drawing():
        figure.savefig(stream, format=kind, metadata=dict(metadata), **options)


def _page_attribute(key: str, value: str, name: str) -> str:
    """Make ids unique in the page, and leave fonts and neutral colours to it."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-", 1)
    if key in ("d", "x", "y"):
        return re.sub(r"-?\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", value)  # of units of 1/72 inch
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r";?\s*font-family: [^;]*", "", value)
        value = value.replace(INK, f"var(--figure-ink, {INK})")
    return value


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


def _legend(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        room = int(figure.get_figwidth() * 12 / (8 + max(map(len, names))))  # about twelve letters to an inch
        columns = max(1, min(room, len(names)))
        figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=3.2, fontsize=8.5)


_Line = tuple[Sequence[float], Sequence[float]]
_Place = tuple[float, float, str, str]


def _places() -> list[_Place]:
    """Where a label may stand: offset from its point in typographic points, and its alignment; the best first."""
    places: list[_Place] = []
    for radius in (8, 18, 32, 48):
        for angle in (90, 45, 135, 0, 180, 270, 315, 225):
            dx, dy = radius * math.cos(math.radians(angle)), radius * math.sin(math.radians(angle))
            across = "left" if dx > 1 else "right" if dx < -1 else "center"
            places.append((dx, dy, across, "bottom" if dy > 1 else "top" if dy < -1 else "center"))
    return places


def _label_points(
    figure: Figure, axes: Any, labels: Sequence[tuple[float, float, str]], lines: Sequence[_Line]
) -> None:
    """Put each label near its point, where it hides least: first of all no other label or point, then no line."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the axes must not move once the free places are known
    frame, pixel = axes.get_window_extent(), figure.dpi / 72
    frame = Bbox.from_extents(frame.x0, frame.y0, figure.bbox.x1, frame.y1 + 12 * pixel)
    on_lines = [place for line in lines for place in _along(axes, line)]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in (axes.transData.transform(p[:2]) for p in labels)]

    def hidden(box: Bbox) -> float:
        outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
        covered = sum(box.padded(2 * pixel).overlaps(other) for other in taken)
        return 1e6 * outside + 1e3 * covered + 10 * sum(box.contains(*place) for place in on_lines)

    for x, y, text in labels:
        boxes = _boxes(figure, axes, text, (x, y), pixel)
        best = min(boxes, key=lambda place: hidden(boxes[place]) + math.hypot(*place[:2]))
        _annotate(axes, text, (x, y), best)
        taken.append(boxes[best])


def _boxes(figure: Figure, axes: Any, text: str, point: tuple[float, float], pixel: float) -> dict[_Place, Bbox]:
    """The box of a label's text in pixels, without its arrow, at each place. Its size is the same at all of them."""
    trial = _annotate(axes, text, point, _places()[0])
    renderer = FigureCanvasAgg(figure).get_renderer()
    trial.update_positions(renderer)
    size = Text.get_window_extent(trial, renderer)
    trial.remove()
    left, bottom = {"left": 0.0, "center": 0.5, "right": 1.0}, {"bottom": 0.0, "center": 0.5, "top": 1.0}
    x, y = axes.transData.transform(point)
    return {
        (dx, dy, across, along): Bbox.from_bounds(
            x + dx * pixel - left[across] * size.width,
            y + dy * pixel - bottom[along] * size.height,
            size.width,
            size.height,
        )
        for dx, dy, across, along in _places()
    }


def _annotate(axes: Any, text: str, point: tuple[float, float], place: _Place) -> Any:
    dx, dy, across, along = place
    far = math.hypot(dx, dy) > 10
    arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4} if far else None
    return axes.annotate(
        text, point, (dx, dy), textcoords="offset points", ha=across, va=along, fontsize=8.5, fontweight="bold",
        arrowprops=arrow, zorder=4, annotation_clip=False,
    )  # fmt: skip


def _along(axes: Any, line: _Line) -> list[tuple[float, float]]:
    """Pixels along a line, about every eighth."""
    corners = [axes.transData.transform(point) for point in zip(*line, strict=True) if all(map(math.isfinite, point))]
    pixels = [(float(x), float(y)) for x, y in corners]
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        parts = max(1, int(math.hypot(x1 - x0, y1 - y0) / 8))
        pixels += [(float(x0 + (x1 - x0) * i / parts), float(y0 + (y1 - y0) * i / parts)) for i in range(1, parts)]
    return pixels
