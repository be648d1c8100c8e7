"""How figures look: one style, whatever the process's own settings are.

A figure is a plain ``matplotlib.figure.Figure``; pyplot and its global state are not used. Backgrounds are transparent
and neutral colours legible on white and on black; series differ in colour (Okabe and Ito's palette, for the
colour-blind), in marker and in dashes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Text and axes: 4.6:1 on white and on black. Inlined in a page, CSS gives the exact neutral by --figure-ink.
INK = "#757575"
# Okabe and Ito, without their yellow, and with orange and sky blue darkened to reach 3:1 on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b87d00", "#3a8fc4")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
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


def new_figure(height: float, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


@contextmanager
def drawing() -> Iterator[None]:
    """Our style for the time of drawing; the process's own settings are left as they are."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the bundled font lacks is drawn with boxes; the tables hold it in full.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def number(value: float | None) -> float:
    # A number that was not finite is null in the file; NaN leaves a gap in the line.
    return math.nan if value is None else value


def legend(figure: Figure, axes: Any) -> None:
    handles, names = axes.get_legend_handles_labels()
    if handles:
        room = int(figure.get_figwidth() * 12 / (8 + max(map(len, names))))  # about twelve letters to an inch
        columns = max(1, min(room, len(names)))
        figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=3.2, fontsize=8.5)
