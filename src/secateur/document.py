"""What is shown to people: numbers, tables and texts, alike on the terminal, in a page and in Markdown.

Every text is escaped where it is shown, and nothing in a page is loaded from elsewhere.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

T = TypeVar("T")

NONE = "–"
SPACE = "\N{NO-BREAK SPACE}"
NAME_LENGTH = 40
TERMINAL = 80
"""Characters in a line of a usual terminal."""
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
        if value >= size:
            return f"{value / size:.1f}{SPACE}{unit}"
    return f"{value:g}{SPACE}{plain}".strip()


def plural(amount: int, noun: str) -> str:
    return f"{amount} {noun}{'' if amount == 1 else 'es' if noun.endswith('ch') else 's'}"


# Texts ----------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """The text without control characters, lone surrogates, and marks that turn the reading order."""
    return _UNPRINTABLE.sub("�", text)


def shorten(text: str, length: int = NAME_LENGTH) -> str:
    """A name, printable, with its middle left out where it is longer than ``length`` characters."""
    text = printable(text)
    head = (length - 1) // 2
    return text if len(text) <= length else f"{text[:head]}…{text[-(length - 1 - head) :]}"


def to_html(text: str) -> str:
    """A text as HTML, isolated from the reading order around it; a long one scrolls."""
    long = ' class="long" tabindex="0"' if len(text) > 200 else ""
    return f"<bdi{long}>{html.escape(printable(text))}</bdi>"


def to_markdown(text: str) -> str:
    """A text as one line of Markdown that shows it as it is: no markup, no HTML, no formula, no new table cell."""
    text = html.escape(printable(re.sub(r"\s+", " ", text)), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    text = re.sub(r"^([-+=#])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)] )", r"\1\\\2", text)


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A value with smaller notes under it.

    Attributes:
        text: The value as it is shown.
        notes: Shown under it, or in brackets.
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


_HOTTEST = 0.1
"""A difference from which on colours are the same."""
_ARROWS = {"better": "▲", "worse": "▼"}


@dataclass(frozen=True)
class Table:
    """Rows of texts under a title.

    Attributes:
        title: What the table shows.
        columns: Their headings; the first ``texts`` of them hold texts, the others numbers, aligned to the right.
        rows: As many cells as there are columns, in each.
        groups: A heading for each row, shown where it changes; in a page only.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | Cell]]
    texts: int = 1
    groups: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        title: str,
        items: Sequence[T],
        columns: Mapping[str, Callable[[T], str | Cell]],
        texts: int = 1,
        groups: Sequence[str] = (),
    ) -> Table:
        """A row for each item, with what each column shows of it."""
        return cls(title, list(columns), [[show(item) for show in columns.values()] for item in items], texts, groups)

    def transposed(self) -> Table:
        """The table with its columns as rows, for a terminal that is not wide."""
        names, *rows = zip(self.columns, *self.rows, strict=True)
        return Table(self.title, [_cell(name).text for name in names], rows)

    def filled(self) -> Table:
        """The table without the columns that have no value in any row."""
        empty = ("", NONE)
        return self._only(
            [i for i in range(len(self.columns)) if any(_cell(r[i]).text not in empty for r in self.rows)]
        )

    def select(self, **names: str) -> Table:
        """The table with other headings: old heading → new one; columns without one are dropped."""
        columns = [names.get(heading, heading) for heading in self.columns]
        return replace(self, columns=columns)._only([i for i, heading in enumerate(columns) if heading])

    def _only(self, kept: Sequence[int]) -> Table:
        columns, rows = [self.columns[i] for i in kept], [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=columns, rows=rows, texts=sum(i < self.texts for i in kept))

    def to_rich(self) -> Any:
        """A ``rich.table.Table`` for the terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        title = Text(printable(self.title)) if self.title else None
        shown = RichTable(title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False, title_justify="left")
        texts = [[printable(_in_line(_cell(cell))) for cell in row] for row in self.rows]
        headings = [printable(heading).split() or [""] for heading in self.columns]
        widths = [max(map(len, [*words, *cells])) for words, *cells in zip(headings, *texts, strict=True)]
        # Where all fits into a usual terminal if headings alone are broken, no cell is.
        narrow = sum(width + 1 for width in widths) <= TERMINAL
        for index, words in enumerate(headings):
            aligned: Any = "left" if index < self.texts else "right"
            heading = Text(("\n" if narrow else " ").join(words))
            shown.add_column(heading, justify=aligned, overflow="fold", no_wrap=narrow)
        for row in texts:
            shown.add_row(*map(Text, row))
        return shown

    def to_html(self) -> str:
        """An element that scrolls sideways where the page is narrow."""
        headings = (f'<th scope="col"{self._kind(i)}>{to_html(name)}</th>' for i, name in enumerate(self.columns))
        bodies = []
        numbered = zip(self.groups or [""] * len(self.rows), self.rows, strict=True)
        for group, rows in groupby(numbered, key=lambda item: item[0]):
            lines = [f"<tr>{''.join(map(self._html_cell, range(len(row)), row))}</tr>" for _, row in rows]
            if group:
                span_all = f'<th scope="rowgroup" colspan="{len(self.columns)}">{to_html(group)}</th>'
                lines.insert(0, f'<tr class="group">{span_all}</tr>')
            bodies.append("<tbody>\n" + "\n".join(lines) + "\n</tbody>")
        label = html.escape(shorten(self.title, 80))
        return (
            f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">\n<table>\n'
            f"<caption><span>{html.escape(printable(self.title))}</span></caption>\n"
            f"<thead><tr>{''.join(headings)}</tr></thead>\n{''.join(bodies)}\n</table>\n</div>"
        )

    def _html_cell(self, index: int, given: str | Cell) -> str:
        cell = _cell(given)
        text = to_html(cell.text) if index < self.texts else html.escape(printable(cell.text))
        text = f'<a href="{html.escape(cell.link)}">{text}</a>' if cell.link else text
        text += f' <span class="tag">{html.escape(printable(cell.tag))}</span>' if cell.tag else ""
        for place, note in enumerate(cell.notes):
            sign = ""
            if cell.trend and place == 0:  # said in words too, not in colour alone
                arrow = f'<span aria-hidden="true">{_ARROWS[cell.trend]}</span>'
                sign = f' <strong class="{cell.trend}">{arrow} {cell.trend}</strong>'
            text += f"<small>{html.escape(printable(note))}{sign}</small>"
        tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
        heat = ""
        if abs(cell.heat) > 0:  # of NaN, no
            share = round(100 * min(1.0, abs(cell.heat) / _HOTTEST))
            heat = f' data-heat="{"gain" if cell.heat > 0 else "loss"}" style="--heat: {share}%"'
        return f"<{tag}{scope}{self._kind(index) if index else ''}{heat}>{text}</{tag}>"

    def _kind(self, index: int) -> str:
        return "" if index < self.texts else ' class="number"'

    def to_markdown(self) -> str:
        """A table of GitHub's Markdown, under its title."""
        head = "".join(f" {to_markdown(name)} |" for name in self.columns)
        rule = "".join("---|" if index < self.texts else "---:|" for index in range(len(self.columns)))
        lines = ["|" + "".join(f" {to_markdown(_in_line(_cell(cell)))} |" for cell in row) for row in self.rows]
        title = to_markdown(self.title) + "\n\n" if self.title else ""
        return title + "\n".join([f"|{head}", f"|{rule}", *lines])


def _cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def _in_line(cell: Cell) -> str:
    arrow = f" {_ARROWS[cell.trend]}" if cell.trend else ""
    notes = f" ({'; '.join(cell.notes)}{arrow})" if cell.notes else arrow
    return cell.text + (f" ({cell.tag})" if cell.tag else "") + notes
