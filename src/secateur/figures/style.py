"""How figures look, and figures as files and as elements of a page: the same tables give the same bytes.

A figure is a plain ``matplotlib.figure.Figure``; pyplot and its global state are not used. Backgrounds are transparent
and neutral colours legible on white and on black; series differ in colour (Okabe and Ito's palette, for the
colour-blind), in marker and in dashes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from secateur.document import printable
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
# Where a label may stand: its offset from the point, and its own alignment.
_BESIDE = (
    ((0, 7), "center", "bottom"),
    ((7, 4), "left", "bottom"),
    ((-7, 4), "right", "bottom"),
    ((0, -7), "center", "top"),
    ((7, -4), "left", "top"),
    ((-7, -4), "right", "top"),
)
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


def label_points(axes: Any, labels: Iterable[tuple[float, float, str]]) -> None:
    """Write each label (x, y, text) beside its point; all but the first only where they hide no label and no point."""
    axes.figure.draw_without_rendering()
    labels = list(labels)
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in (axes.transData.transform(label[:2]) for label in labels)]
    for index, (x, y, text) in enumerate(labels):
        label = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", annotation_clip=False, zorder=4, **BOLD)
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


def svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an ``<svg>`` element for a page, with its title for those who do not see it.

    Text stays text in the page's own font, and neutral colours follow the CSS variable ``--figure-ink``.

    Args:
        figure: What one of the functions in :mod:`.plots` drew.
        name: Prefix of all ids in the element; unique in its page, of letters, digits and ``-``.
        title: Short name of the figure.
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
    root.attrib |= {"role": "img", "aria-labelledby": f"{name}-title"}
    label = ElementTree.Element("{http://www.w3.org/2000/svg}title", {"id": f"{name}-title"})
    label.text = printable(title)
    root.insert(0, label)
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
