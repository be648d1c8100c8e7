"""Labels beside points, where they hide least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from secateur.figures.style import INK

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


def label_points(figure: Figure, axes: Any, labels: Sequence[tuple[float, float, str]], lines: Sequence[_Line]) -> None:
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
