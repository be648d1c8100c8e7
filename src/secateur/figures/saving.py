"""Figures as files, and as elements of a page; the same tables give the same bytes."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from secateur.figures.frontier import Point
from secateur.figures.style import INK, drawing
from secateur.figures.text import printable, shorten
from secateur.files import write_bytes


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


def _save(figure: Figure, stream: io.BytesIO, kind: str, metadata: Mapping[str, None], **options: Any) -> None:
    with drawing():
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
