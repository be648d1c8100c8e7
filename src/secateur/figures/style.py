"""How figures look, and figures as files and as elements of a page: the same tables give the same bytes.

A figure is a plain ``matplotlib.figure.Figure``; pyplot and its global state are not used. Backgrounds are transparent
and neutral colours legible on white and on black; series differ in colour (Okabe and Ito's palette, for the
colour-blind), in marker and in dashes.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import matplotlib.path
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from secateur.document import printable, shorten
from secateur.files import write_bytes

# Text and axes: 4.6:1 on white and on black. Inlined in a page, CSS gives the exact neutral by --figure-ink.
INK = "#757575"
# Okabe and Ito, without their yellow, and with orange and sky blue darkened to reach 3:1 on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87d00", "#3a8fc4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MOST_SERIES = 12
"""Beyond, a legend says less than it hides."""
WIDTH, NARROW = 5.6, 4.8  # inches, of 72 units each: type of 9 units is still legible on a phone

BOLD: dict[str, Any] = {"fontsize": 8.5, "fontweight": "bold"}
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


def new_figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def drawing() -> Iterator[None]:
    """Our style while drawing; the process's own settings are left as they are."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the bundled font lacks is drawn with boxes; the tables hold it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def look(index: int, *parts: str) -> dict[str, Any]:
    """Colour of the series with this index, and its ``marker`` or ``linestyle`` where asked for."""
    styles = {"marker": MARKERS, "linestyle": DASHES}
    return {"color": COLOURS[index % len(COLOURS)]} | {part: styles[part][index % len(styles[part])] for part in parts}


def gap(value: float | None) -> float:
    """A number to draw: one that was not finite is null in its file, and NaN leaves a gap in the line."""
    return math.nan if value is None else value


def floats(values: Sequence[float | None]) -> list[float]:
    return [gap(value) for value in values]


def legend(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        room = int(figure.get_figwidth() * 12 / (8 + max(map(len, names))))  # about twelve letters to an inch
        columns = max(1, min(room, len(names)))
        figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=3.2, fontsize=8.5)


def depth_axis(axes: Any, depth: int) -> None:
    axes.set_xlabel(f"Depth (layers kept, of {depth})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlim(0.5, depth + 0.5)


def label_points(
    figure: Figure,
    axes: Any,
    labels: Sequence[tuple[float, float, str]],
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> None:
    """Put each label (x, y, text) where it hides least: first of all no other label or point, then no line (x, y).

    A label that would hide another, wherever it stood, is left out: the first ones matter most.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the axes must not move once the free places are known
    frame, pixel, renderer = axes.get_window_extent(), figure.dpi / 72, FigureCanvasAgg(figure).get_renderer()
    frame = Bbox.from_extents(frame.x0, frame.y0, figure.bbox.x1, frame.y1 + 12 * pixel)
    paths = [matplotlib.path.Path(axes.transData.transform(np.column_stack(line))) for line in lines]
    points = [axes.transData.transform((x, y)) for x, y, _ in labels]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in points]
    for (x, y, text), point in zip(labels, points, strict=True):
        trial = axes.text(x, y, text, **BOLD)
        size = Text.get_window_extent(trial, renderer)
        trial.remove()
        places = []
        for radius, angle in itertools.product((8, 18, 32, 48), (90, 45, 135, 0, 180, 270, 315, 225)):
            # From the point to the middle of the text, in typographic points; its nearest edge is at the radius.
            away = np.round([math.cos(math.radians(angle)), math.sin(math.radians(angle))], 6)
            offset = radius * away + np.sign(away) * (size.width, size.height) / (2 * pixel)
            left, bottom = point + offset * pixel - (size.width / 2, size.height / 2)
            box = Bbox.from_bounds(left, bottom, size.width, size.height)
            outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
            crossed = sum(path.intersects_bbox(box, filled=False) for path in paths)
            hidden = (outside, box.padded(2 * pixel).count_overlaps(taken), crossed, radius)
            places.append((hidden, offset, box))
        (*_, radius), offset, box = min(places, key=lambda place: place[0])
        if box.count_overlaps(taken[len(labels) :]):
            continue
        arrow = {"arrowstyle": "-", "color": INK, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 4} if radius > 10 else None
        placed = {"textcoords": "offset points", "ha": "center", "va": "center", "arrowprops": arrow, "zorder": 4}
        axes.annotate(text, (x, y), tuple(offset), annotation_clip=False, **placed, **BOLD)
        taken.append(box)


# Files and page elements ----------------------------------------------------------------------------------------------


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG or SVG, by the path's suffix, whole or not at all; the text of an SVG stays text.

    Raises:
        OutputError: The place cannot be written.
    """
    write_bytes(path, _rendered(figure, Path(path).suffix[1:]))
    return Path(path)


def _rendered(figure: Figure, kind: str) -> bytes:
    """The file's content, 200 dots per inch, without a date."""
    unwanted = ("Software",) if kind == "png" else ("Date", "Creator", "Format", "Type")
    stream = io.BytesIO()
    with drawing():
        figure.savefig(stream, format=kind, metadata=dict.fromkeys(unwanted), dpi=200)
    return stream.getvalue()


@dataclass(frozen=True)
class Point:
    """One model in :func:`.frontier` or :func:`.size_curve`.

    ``score`` is an average from 0 to 1, with its interval where it has one. ``series`` names the variants that a line
    joins, ``label`` stands beside the point. ``cost`` is what the horizontal axis shows, with the range that was
    measured; ``best``: no model is as good for less. ``note`` are lines that the page shows of the point, the first its
    name, and ``link`` where it leads. ``kind`` is one of :data:`.KINDS`; ``marked``: the recommended one.
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
    kind: str = "cut"
    marked: bool = False


_SVG = "{http://www.w3.org/2000/svg}"
_FOOT, _LETTERS = 56, 74  # height of the strip for a point's notes, and letters in one of its lines


def svg(figure: Figure, name: str, title: str, description: str, points: Sequence[Point] = ()) -> str:
    """The figure as an ``<svg>`` element for a page, labelled for those who do not see it.

    Text stays text in the page's own font, and neutral colours follow the CSS variable ``--figure-ink``. Points become
    links: pointed at, or reached by keyboard, they show their notes at the foot of the figure (classes ``point``,
    ``tip`` and ``hint``, for the page's style).

    Args:
        figure: What one of the functions in :mod:`.plots` drew.
        name: Prefix of all ids in the element; unique in its page, of letters, digits and ``-``.
        title: Short name of the figure.
        description: What there is to see, in words.
        points: Those that :func:`.frontier` or :func:`.size_curve` drew.
    """
    ElementTree.register_namespace("", "http://www.w3.org/2000/svg")
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")
    root = ElementTree.fromstring(_rendered(figure, "svg"))  # noqa: S314  our own output
    for metadata in root.findall("{*}metadata"):
        root.remove(metadata)
    for element in root.iter():
        element.attrib = {key: _page_attribute(key, value, name) for key, value in element.attrib.items()}
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "group" if points else "img", "aria-labelledby": f"{name}-title {name}-description"}
    if points:
        _link_points(root, name, points)
    for position, (tag, label, text) in enumerate((("title", "title", title), ("desc", "description", description))):
        element = ElementTree.Element(f"{_SVG}{tag}", {"id": f"{name}-{label}"})
        element.text = printable(text)
        root.insert(position, element)
    return ElementTree.tostring(root, encoding="unicode")


def _page_attribute(key: str, value: str, name: str) -> str:
    """Make ids unique in the page, and leave fonts and neutral colours to it."""
    if key == "id":
        return f"{name}-{value}"
    if key.endswith("href"):
        return value.replace("#", f"#{name}-", 1)
    if key in ("d", "x", "y"):
        return re.sub(r"-?\d+\.\d{3,}", lambda digits: f"{float(digits[0]):.2f}", value)  # of units of 1/72 inch
    value = value.replace("url(#", f"url(#{name}-")
    if key == "style":
        value = re.sub(r";?\s*font-family: [^;]*", "", value)
        value = value.replace(INK, f"var(--figure-ink, {INK})")
    return value


def _link_points(root: ElementTree.Element, name: str, points: Sequence[Point]) -> None:
    """Wrap each point's element in a link with its notes; they stand in a strip added below the figure."""
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    root.attrib["viewBox"] = f"0 0 {width:g} {height + _FOOT:g}"
    parents = {child: parent for parent in root.iter() for child in parent}
    elements = {element.attrib["id"]: element for element in root.iter() if "id" in element.attrib}
    hint = ElementTree.SubElement(root, f"{_SVG}text", {"class": "hint", "x": "4", "y": f"{height + 14:g}"})
    hint.text = "Point at a model, or tab to it, for its numbers and the command that made it."
    for index, point in enumerate(points):
        element = elements[f"{name}-point-{index}"]
        # Past two dozen points, the keyboard stops at the best only; the tables hold the others.
        stop = "0" if point.best or len(points) <= 24 else "-1"
        link = ElementTree.Element(f"{_SVG}a" if point.link else f"{_SVG}g", {"class": "point", "tabindex": stop})
        link.attrib |= {"href": point.link} if point.link else {}
        siblings = parents[element]
        siblings[list(siblings).index(element)] = link
        ElementTree.SubElement(link, f"{_SVG}title").text = "\n".join(printable(line) for line in point.note)
        link.append(element)
        marker = next(element.iter(f"{_SVG}use")).attrib
        ElementTree.SubElement(link, f"{_SVG}circle", {"class": "hit", "cx": marker["x"], "cy": marker["y"], "r": "9"})
        tip = ElementTree.SubElement(link, f"{_SVG}text", {"class": "tip", "aria-hidden": "true"})
        wrapped = (textwrap.wrap(shorten(line, 3 * _LETTERS), _LETTERS) or [""] for line in point.note)
        for row, line in enumerate([part for lines in wrapped for part in lines][: _FOOT // 11]):
            ElementTree.SubElement(tip, f"{_SVG}tspan", {"x": "4", "y": f"{height + 14 + 11 * row:g}"}).text = line
