"""What is shown to people: numbers, tables, and sections of them, alike on the terminal, in a page and in Markdown.

Tables for the terminal and all of Markdown are made here, pages by ``reporting/templates``. No text is ever markup, and
nothing in a page is loaded from elsewhere.
"""

from __future__ import annotations

import html
import math
import re
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
NAME_LENGTH = 40
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")

# Numbers --------------------------------------------------------------------------------------------------------------


def number(value: float | None, form: str = ".1f") -> str:
    """A number with a minus sign, or a dash where there is none."""
    return NONE if value is None or math.isnan(value) else f"{value:{form}}".replace("-", "−")


def score(value: float | None, digits: int = 1) -> str:
    """A score from 0 to 1 as points of 100."""
    return number(None if value is None else 100 * value, f".{digits}f")


def signed(difference: float | None, digits: int = 1) -> str:
    """A difference of scores as points of 100, with its sign."""
    text = number(None if difference is None else 100 * difference, f"+.{digits}f")
    return text if text.strip("+−0.") or text == NONE else text[1:]


def loss(value: float | None) -> str:
    return number(value, ".3f")


def percent(share: float | None, digits: int = 1) -> str:
    return score(share, digits) + (SPACE + "%" if share is not None else "")


def span(low: float | None, high: float | None, show: Callable[[float], str] = score) -> str:
    """An interval, or nothing where there is none."""
    return "" if low is None or high is None else f"{show(low)} to {show(high)}"


def speed(value: float | None) -> str:
    return number(value, ",.0f" if value is None or value >= 100 else ",.1f" if value >= 10 else ",.2f")


def duration(seconds: float | None) -> str:
    """Seconds in the unit that suits them; nothing measured is 0."""
    if not seconds:
        return NONE
    if seconds < 1:
        return f"{1000 * seconds:.1f}{SPACE}ms"
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size and seconds >= 600:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f}{SPACE}{unit}"
    return f"{seconds:.{0 if seconds >= 30 else 1}f}{SPACE}s"


def count(value: float | None) -> str:
    return _scaled(value, ("B", "M", "k"), "")


def byte_size(value: float | None) -> str:
    return _scaled(value, ("GB", "MB", "kB"), "bytes")


def _scaled(value: float | None, units: Sequence[str], plain: str) -> str:
    if value is None:
        return NONE
    for unit, size in zip(units, (1e9, 1e6, 1e3), strict=True):
        if value >= 0.99995 * size:  # which is rounded to it
            return f"{value / size:.1f}{SPACE}{unit}"
    return f"{value:g}{SPACE}{plain}".strip()


def plural(amount: float, noun: str, form: str = "") -> str:
    """``1 step``, ``2 steps``; ``form`` is the number's, such as ``,``."""
    return f"{amount:{form}} {noun}{'' if amount == 1 else 'es' if noun.endswith('ch') else 's'}"


# Texts ----------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text without control characters, lone surrogates, and marks that turn the reading order."""
    return _UNPRINTABLE.sub("�", text)


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """A name, printable, with its middle left out where it is longer than ``length`` characters."""
    text = printable(text)
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[-(length - 1 - head) :]}"


def to_markdown(text: str, *, is_line: bool = True) -> str:
    """A text as one line of Markdown, or within one, as it is: no markup, no HTML, no formula, no new table cell."""
    text = html.escape(printable(re.sub(r"\s+", " ", text)), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    if not is_line:
        return text
    text = re.sub(r"^([-+=#])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)] )", r"\1\\\2", text)


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A value with smaller notes under it, or in brackets.

    Attributes:
        tag: A short label beside it.
        link: Where it leads, in a page.
        trend: ``better`` or ``worse`` where the value differs significantly from what it is compared with.
        heat: That difference, of scores from 0 to 1, which a page shows as a colour.
    """

    text: str
    notes: tuple[str, ...] = ()
    tag: str = ""
    link: str = ""
    trend: str = ""
    heat: float = 0.0

    @property
    def in_line(self) -> str:
        """The whole cell as one text."""
        arrow = f" {ARROWS[self.trend]}" if self.trend else ""
        notes = f" ({'; '.join(self.notes)}{arrow})" if self.notes else arrow
        return self.text + (f" ({self.tag})" if self.tag else "") + notes


ARROWS = {"better": "▲", "worse": "▼"}


def with_interval(
    value: float | None, low: float | None, high: float | None, show: Callable[[float | None], str] = score
) -> Cell:
    """A number with its interval, where it has one."""
    return Cell(show(value), (span(low, high, show),) if low is not None else ())


@dataclass(frozen=True)
class Table:
    """Rows of texts under a title.

    Attributes:
        columns: Their headings; the first ``texts`` of them hold texts, the others numbers, aligned to the right.
        rows: As many cells as there are columns, in each.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: int = 1

    @classmethod
    def of(
        cls, title: str, items: Sequence[T], columns: Mapping[str, Callable[[T], str | Cell]], texts: int = 1
    ) -> Table:
        """A row for each item, with what each column shows of it."""
        return cls(title, list(columns), [[show(item) for show in columns.values()] for item in items], texts)

    @property
    def cells(self) -> list[list[Cell]]:
        return [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in self.rows]

    def transposed(self) -> Table:
        """The table with its columns as rows, for a terminal that is not wide."""
        names, *rows = zip(self.columns, *self.rows, strict=True)
        return Table(self.title, [name if isinstance(name, str) else name.text for name in names], rows)

    def filled(self) -> Table:
        """The table without the columns that have no value in any row."""
        columns = list(zip(*self.cells, strict=True))
        kept = [i for i, column in enumerate(columns) if any(cell.text not in ("", NONE) for cell in column)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table(self.title, [self.columns[i] for i in kept], rows, sum(i < self.texts for i in kept))

    def to_rich(self) -> Any:
        """A ``rich.table.Table`` for the terminal; a heading has a line for each word, as cells need the room."""
        from rich.table import Table as RichTable
        from rich.text import Text

        title = Text(printable(self.title)) if self.title else None
        shown = RichTable(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
        for index, heading in enumerate(self.columns):
            aligned: Any = "left" if index < self.texts else "right"
            shown.add_column(Text("\n".join(printable(heading).split())), justify=aligned, overflow="fold")
        for row in self.cells:
            shown.add_row(*(Text(printable(cell.in_line)) for cell in row))
        return shown

    def to_html(self) -> str:
        """The table for a notebook, under its title."""
        import pandas as pd

        rows = [[printable(cell.in_line) for cell in row] for row in self.cells]
        shown = pd.DataFrame(rows, columns=list(self.columns)).to_html(index=False)
        return f"<p>{html.escape(printable(self.title))}</p>{shown}"

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, under its title."""
        head = "".join(f" {to_markdown(name)} |" for name in self.columns)
        rule = "".join("---|" if index < self.texts else "---:|" for index in range(len(self.columns)))
        lines = ["|" + "".join(f" {to_markdown(cell.in_line)} |" for cell in row) for row in self.cells]
        title = to_markdown(self.title) + "\n\n" if self.title else ""
        return title + "\n".join([f"|{head}", f"|{rule}", *lines])


# Sections -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A paragraph, or a heading."""

    text: str
    is_heading: bool = False

    def to_markdown(self) -> str:
        return ("### " if self.is_heading else "") + to_markdown(self.text)


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]

    def to_markdown(self) -> str:
        return "\n".join(f"- {to_markdown(item)}" for item in self.items)


@dataclass(frozen=True)
class Code:
    """Something to copy, under what it is."""

    text: str
    language: str = ""
    title: str = ""

    @property
    def shown(self) -> str:
        """Nothing in it hides, or turns what is copied."""
        return "\n".join(printable(line) for line in self.text.expandtabs(4).splitlines())

    def to_markdown(self) -> str:
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", self.shown)), default=0))
        title = f"{to_markdown(self.title)}:\n\n" if self.title else ""
        return f"{title}{fence}{self.language}\n{self.shown}\n{fence}"


@dataclass(frozen=True)
class Picture:
    """A PNG; ``key`` names its file in the folder ``figures``, without suffix."""

    key: str
    title: str
    caption: str
    png: bytes

    @property
    def data(self) -> str:
        """The picture as the address of an image in a page."""
        return f"data:image/png;base64,{b64encode(self.png).decode()}"

    def to_markdown(self) -> str:
        return f"![{to_markdown(self.title)}](figures/{self.key}.png)\n\n{to_markdown(self.caption)}"


Block = Text | Bullets | Code | Table | Picture


@dataclass(frozen=True)
class Section:
    """Blocks under a title; ``key`` is the section's address in the page, which shows those that are open at once."""

    key: str
    title: str
    blocks: Sequence[Block]
    is_open: bool = False

    def to_markdown(self) -> str:
        return "\n\n".join([f"## {self.title}", *(block.to_markdown() for block in self.blocks)])
