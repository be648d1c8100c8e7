"""The figures: score against cost, training curves, and what a scout and a profile hold against depth.

The same table gives the same bytes; pyplot and its global state are not used. Backgrounds are transparent and neutral
colours legible on white and on black; series differ in colour (Okabe and Ito's palette) and in dashes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from secateur.document import count, shorten
from secateur.files import write_bytes
from secateur.results import Matrix, Profile, Scout, Training

INK = "#757575"
"""Text and axes: 4.6:1 on white and on black."""
# Okabe and Ito, without their yellow, and with orange and sky blue darkened to reach 3:1 on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87d00", "#3a8fc4")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MOST_SERIES = 12  # beyond, a legend says less than it hides
WIDTH = 5.6
"""Inches: at this width, type of 9 points is legible on a phone."""
_NEUTRAL = ("text.color", "axes.edgecolor", "axes.labelcolor", "grid.color", "xtick.color", "ytick.color")
_STYLE: dict[str, Any] = dict.fromkeys(_NEUTRAL, INK) | {
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.parse_math": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.alpha": 0.22,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "secateur",
    "svg.fonttype": "none",
}


@contextmanager
def drawing() -> Iterator[None]:
    """Our style while drawing; the process's own settings are left as they are."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the bundled font lacks is drawn with boxes; the tables hold it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


@drawing()
def rendered(figure: Figure, kind: str = "png") -> bytes:
    """The content of a file, ``png`` or ``svg``, without a date; the text of an SVG stays text."""
    unwanted = ("Software",) if kind == "png" else ("Date", "Creator", "Format", "Type")
    stream = io.BytesIO()
    figure.savefig(stream, format=kind, metadata=dict.fromkeys(unwanted), dpi=200)
    return stream.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write the figure as PNG or SVG, by the path's suffix, whole or not at all.

    Raises:
        OutputError: The place cannot be written.
    """
    write_bytes(path, rendered(figure, path.suffix[1:]))


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

    ``score``, from 0 to 1, and ``cost`` have their interval and range, where known. ``series`` names the variants that
    a line joins, ``label`` stands beside the point; ``best``: no model is as good for less. ``kind`` is one of
    :data:`.KINDS`; ``marked``: the recommended one.
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


@drawing()
def frontier(points: Sequence[Point], cost: str) -> Figure:
    """Average score (× 100) against what it costs: a point per model with its intervals, a line through each series.

    A dashed line joins the best models at their cost (the Pareto front), a ring is around the recommended one. Costs
    that span more than a factor of 20 are on a logarithmic axis.
    """
    figure, axes = _one_panel(3.7)
    for name in dict.fromkeys(point.series for point in points):
        line = sorted((point.cost, 100 * point.score) for point in points if point.series == name)
        axes.plot(*zip(*line, strict=True), linewidth=0.8, alpha=0.5, color=INK)
    for kind, (name, style) in KINDS.items():
        if own := [point for point in points if point.kind == kind]:
            x, left, right = _columns(own, "cost", "cost_low", "cost_high")
            y, low, high = 100 * _columns(own, "score", "low", "high")
            axes.plot(x, y, linestyle="none", label=name, clip_on=False, **style)
            scored, ranged = np.isfinite(low), np.isfinite(left)
            axes.vlines(x[scored], low[scored], high[scored], style["color"], linewidth=0.9)
            axes.hlines(y[ranged], left[ranged], right[ranged], style["color"], linewidth=0.9)
    front = sorted((point.cost, 100 * point.score) for point in points if point.best)
    if len(front) > 1:
        axes.plot(*zip(*front, strict=True), "--", label="best at its cost", color=INK, linewidth=1, zorder=1.5)
    for point in points:
        if point.marked:
            _ring(axes, point.cost, 100 * point.score, color=INK, label="recommended")
    axes.margins(x=0.1, y=0.14)
    values = [point.cost for point in points]
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: re.sub(r"\.0(?!\d)", "", count(value))))
    axes.set(xlabel=cost, ylabel="Average score (× 100)")
    _legend(figure, axes)
    told = sorted(points, key=lambda point: (not point.marked, -len(point.label)))
    _label_points(axes, [(p.cost, 100 * p.score, shorten(p.label, 26)) for p in told if p.label])
    return figure


# Scouts and trainings -------------------------------------------------------------------------------------------------


@drawing()
def frontier_figure(scout: Scout, chosen: int | None, tolerance: float) -> Figure:
    """Mean score (× 100) of a scout's depths with 95 % intervals; hollow where not trained, a ring around the chosen.

    A thick bar is the interval of the difference to the full depth, drawn where the score is: a depth is within the
    tolerance (in points) where all of its bar is above the lower edge of the band.
    """
    rungs = [row for row in scout.rows if row.score is not None]
    depths, *values = _columns(rungs, "depth", "score", "low", "high", "difference_low", "difference_high")
    scores, low, high, worst, best = (100 * column for column in values)
    full, trained = scores[-1], np.array([row.trained for row in rungs])
    figure, axes = _one_panel(3.9)
    axes.plot(depths, scores, color=COLOURS[0], linewidth=1, alpha=0.6)
    for own, face, name in ((trained, COLOURS[0], "trained"), (~trained, "white", "scored, not trained")):
        if own.any():
            axes.plot(depths[own], scores[own], "o", color=COLOURS[0], markerfacecolor=face, label=name, zorder=3)
    thin: dict[str, Any] = {"linewidth": 0.9, "label": "95 % interval: score"}
    thick: dict[str, Any] = {"linewidth": 4.5, "alpha": 0.4, "label": "95 % interval: difference"}
    for lower, upper, style in ((low, high, thin), (full + worst, full + best, thick)):
        if (known := np.isfinite(lower)).any():
            axes.vlines(depths[known], lower[known], upper[known], COLOURS[0], **style)
    axes.axhline(full, color=COLOURS[2], linewidth=1, label="score of the full depth")
    band = f"up to {tolerance:g} below it"
    axes.axhspan(full - tolerance, full, label=band, color=COLOURS[2], alpha=0.22, linewidth=0)
    marked = [(depth, score) for depth, score in zip(depths, scores, strict=True) if depth == chosen]
    for place in marked:
        _ring(axes, *place, color=COLOURS[1])
    axes.set_ylabel("Mean score (× 100)")
    _depth_axis(axes, scout.depth)
    _legend(figure, axes)
    _label_points(axes, [(*place, f"chosen: {chosen}") for place in marked])
    return figure


@drawing()
def training_curves(trainings: Mapping[str, Training]) -> Figure:
    """Training loss against step, one line per healed model; below, where there are any, its evaluation scores.

    A ring marks the score of the step whose weights were kept.
    """
    scored = any(training.evaluations for training in trainings.values())
    figure = Figure(figsize=(WIDTH, 5.4 if scored else 3.3), layout="constrained")
    panels = list(figure.subplots(1 + scored, sharex=True, squeeze=False).flat)
    for index, (name, training) in enumerate(trainings.items()):
        colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
        look: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.4, "marker": "."}
        panels[0].plot(*_columns(training.rows, "step", "loss"), **look, label=shorten(name))
        if training.evaluations:
            steps, scores = _columns(training.evaluations, "step", "score")
            panels[1].plot(steps, 100 * scores, **look)
            kept = steps == (-1 if training.best_step is None else training.best_step)
            _ring(panels[1], steps[kept], 100 * scores[kept], color=colour)
    for axes, title in zip(panels, ("Training loss (nats)", "Evaluation score (× 100)"), strict=False):
        axes.set_ylabel(title)
    panels[-1].set_xlabel("Step")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(trainings) <= MOST_SERIES:
        _legend(figure, panels[0])
    return figure


# Profiles -------------------------------------------------------------------------------------------------------------


@drawing()
def profile_figures(profile: Profile, choice: Mapping[str, int] | None = None) -> dict[str, Figure]:
    """Every figure that a profile allows: ``curve``, ``cka``, ``angles`` and ``solved``, by these names.

    ``choice``: name → depth, such as ``{"small": 7, "large": 24}``; these depths are marked.
    """
    marked: dict[int, list[str]] = {}
    for name, depth in sorted((choice or {}).items(), key=lambda item: item[1]):
        marked.setdefault(depth, []).append(name)
    marks = {depth: f"{shorten(', '.join(names))}: {depth}" for depth, names in marked.items()}
    losses = _columns(profile.rows, "depth", "loss", "loss_low", "loss_high")
    curves = [
        *([_Curve("Loss (nats)", losses, marks)] if np.isfinite(losses[1]).any() else []),
        _Curve("Block Influence", _columns(profile.rows, "depth", "block_influence")),
        _Curve("Effective rank", _columns(profile.rows, "depth", "effective_rank")),
    ]
    drawn = {"curve": _by_depth(profile.depth, curves, 1, marks)}
    if len(profile.cka) > 1:
        drawn["cka"] = _depth_map(profile.cka, 1, "Linear CKA", marks, cmap="cividis", vmax=1.0)
    if len(profile.angular) > 2:  # colours run the other way, so that alike is light in both maps
        title = "Angular distance (share of π)"
        drawn["angles"] = _depth_map(profile.angular, 0, title, marks, cmap="cividis_r", vmin=0.0)
    if len(solved := _solved(profile)) > 1:
        drawn["solved"] = _by_depth(profile.depth, solved, 2)
    return drawn


def _depth_map(matrix: Matrix, first: int, title: str, marks: Mapping[int, str], **colours: Any) -> Figure:
    """A number for each pair of depths, the lowest of which is ``first``; marked depths are ruled and named above."""
    edges = np.arange(len(matrix) + 1) + first - 0.5
    figure, axes = _one_panel(4.0, 4.8)
    # As an image within the figure: cells of 80 depths as paths would be a megabyte. Edges hide the seams.
    image: dict[str, Any] = {"edgecolors": "face", "linewidth": 0.2, "rasterized": True}
    mesh = axes.pcolormesh(edges, edges, np.array(matrix, dtype=float), **image, **colours)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    for depth in marks:
        for rule in (axes.axvline, axes.axhline):
            rule(depth, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2])
    axes.set(xlabel="Depth", ylabel="Depth")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    bar: Any = figure.colorbar(mesh, ax=axes, label=title, shrink=0.9)
    bar.outline.set_visible(False)
    bar.solids.set(edgecolor="face", rasterized=True)
    _label_points(axes, [(depth, edges[-1], mark) for depth, mark in marks.items()])
    return figure


class _Curve(NamedTuple):
    """One measure against depth: rows of depths, values and, where it has intervals, their ends; depth → its label."""

    title: str
    points: NDArray[np.float64]
    labels: Mapping[int, str] = {}


def _best_of(title: str, points: NDArray[np.float64], *, falls: bool = False) -> _Curve:
    depths, values = points[:2]
    best = int(depths[np.nanargmin(values) if falls else np.nanargmax(values)])
    return _Curve(title, points, {best: str(best)})


def _solved(profile: Profile) -> list[_Curve]:
    """The contrastive loss, the scores of each task, and the next-token loss."""
    rows, curves = profile.rows, []
    if any(row.loss is not None for row in rows):
        losses = _columns(rows, "depth", "loss", "loss_low", "loss_high")
        curves.append(_best_of("Contrastive loss (nats)", losses, falls=True))
    for kind, task in dict.fromkeys((row.kind, row.task) for row in profile.task_scores):
        own = [row for row in profile.task_scores if row.task == task]
        scores = _columns(own, "depth", "score", "low", "high") * [[1], [100], [100], [100]]
        curves.append(_best_of(f"{kind}: {shorten(task, 26)}", scores))
    if any(row.next_token_loss is not None for row in rows):
        losses = _columns(rows, "depth", "next_token_loss")
        curves.append(_best_of("Next-token loss (nats)", losses, falls=True))
    return curves


def _by_depth(depth: int, curves: Sequence[_Curve], columns: int, ruled: Collection[int] = ()) -> Figure:
    """A panel for each curve, all on the same axis, with 95 % intervals as bands."""
    rows = -(-len(curves) // columns)
    figure = Figure(figsize=(WIDTH, 0.3 + 1.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    marked = []
    for place, (axes, curve) in enumerate(zip(grid, curves, strict=False)):
        x, y, *band = curve.points
        axes.set_title(curve.title, loc="left", fontsize=8.5, fontweight="bold")
        if band:
            axes.fill_between(x, *band, color=COLOURS[0], alpha=0.18, linewidth=0)
        axes.plot(x, y, color=COLOURS[0])
        for chosen in ruled:
            axes.axvline(chosen, color=COLOURS[1], linewidth=0.9, linestyle=DASHES[2], zorder=0.5)
        marked.append([(x, y, curve.labels[x]) for x, y in curve.points[:2].T if x in curve.labels and np.isfinite(y)])
        axes.plot([x for x, _, _ in marked[-1]], [y for _, y, _ in marked[-1]], "o", color=COLOURS[0], zorder=3)
        is_last = place >= len(curves) - columns
        _depth_axis(axes, depth)
        axes.set_xlabel(axes.get_xlabel() if is_last else "")
        axes.tick_params(labelbottom=is_last)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.margins(y=0.2)
    for axes, labels in zip(grid, marked, strict=False):  # these find their place among all that is drawn
        _label_points(axes, labels)
    return figure


# Parts of figures -----------------------------------------------------------------------------------------------------


def _one_panel(height: float, width: float = WIDTH) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _columns(rows: Iterable[Any], *fields: str) -> NDArray[np.float64]:
    """Fields of the rows; NaN, which leaves a gap in a line, where a value was not finite or not measured."""
    values = [[getattr(row, field) for field in fields] for row in rows]
    return np.array(values, dtype=float).reshape(-1, len(fields)).T


def _ring(axes: Any, x: Any, y: Any, **style: Any) -> None:
    axes.plot(x, y, "o", markersize=13, fillstyle="none", markeredgewidth=2, clip_on=False, zorder=4, **style)


def _legend(figure: Figure, axes: Any) -> None:
    names = axes.get_legend_handles_labels()[1]
    room = int(figure.get_figwidth() * 12 / (8 + max(map(len, names))))  # about twelve letters to an inch
    figure.legend(loc="outside upper left", ncols=max(1, min(room, len(names))), handlelength=3.2)


def _depth_axis(axes: Any, depth: int) -> None:
    axes.set(xlabel=f"Depth (layers kept, of {depth})", xlim=(0.5, depth + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


_ACROSS = ((0, "center"), (7, "left"), (-7, "right"))
_BESIDE = [((x, y), across, upright) for y, upright in ((8, "bottom"), (-8, "top")) for x, across in _ACROSS]
"""Where a label may stand: its offset from the point, and its own alignment."""


def _label_points(axes: Any, labels: Sequence[tuple[float, float, str]]) -> None:
    """Write each label (x, y, text) beside its point; all but the first only where they hide no label and no point."""
    axes.figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axes.transData.transform(label[:2]) for label in labels)]
    bold: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold", "annotation_clip": False, "zorder": 4}
    for index, (x, y, text) in enumerate(labels):
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", **bold)
        boxes: list[tuple[int, int, Bbox]] = []
        for offset, across, upright in _BESIDE:
            label.set(position=offset, ha=across, va=upright)
            box = label.get_window_extent()
            boxes.append((box.count_overlaps(taken) + (box.x0 < axes.bbox.x0), len(boxes), box))
        hidden, place, box = min(boxes)
        label.set(position=_BESIDE[place][0], ha=_BESIDE[place][1], va=_BESIDE[place][2])
        if hidden and index:
            label.remove()
        else:
            taken.append(box)
