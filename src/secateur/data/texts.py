"""Texts without labels, from files and data sets: what a profile can be measured on where there are no pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.tables import TEXT, Draw, Table, open_table, read_rows
from secateur.errors import DataError
from secateur.provenance import Fingerprint


@dataclass(frozen=True)
class Texts:
    """Texts of one file, in its order. ``prompt`` goes before each."""

    name: str
    rows: tuple[str, ...]
    prompt: str
    source: Fingerprint

    def sample(self, count: int, seed: int) -> Texts:
        """At most ``count`` texts, drawn by ``seed``, in the order of the file."""
        if count >= len(self.rows):
            return self
        rows = tuple(self.rows[i] for i in Draw(count, seed).places(len(self.rows)))
        return replace(self, rows=rows, source=replace(self.source, rows=count))


def read_texts(data: str | Path, prompt: str = "", *, columns: Mapping[str, str] | None = None) -> Texts:
    """Read and check texts: ``.txt``, one on each line, or a file or data set with the column ``text``.

    Blank lines of a ``.txt`` are no texts.

    Raises:
        DataError: The data are missing or have no texts; or, with its line, one is empty or not a text.
    """
    return texts_of(open_table(data, columns), prompt)


def texts_of(table: Table, prompt: str = "", draw: Draw | None = None) -> Texts:
    """The texts of an opened file or data set, or those that are drawn; see :func:`read_texts`."""
    rows = tuple(read_rows(table, text_of, draw))
    if not rows:
        raise DataError(table.place, "holds no text")
    return Texts(table.path.name if table.path else table.name, rows, prompt, table.fingerprint(len(rows)))


def text_of(place: str, line: int, row: Mapping[str, Any]) -> str:
    """The text of a row.

    Raises:
        DataError: It is missing, empty or not a text.
    """
    text = row.get(TEXT)
    if not isinstance(text, str):
        problem = f"is {text!r:.60}, not a text" if TEXT in row else "the field is missing"
        raise DataError(place, problem, line=line, field=TEXT)
    if not text.strip():
        raise DataError(place, "the text is empty", "leave the row out", line=line, field=TEXT)
    return text
