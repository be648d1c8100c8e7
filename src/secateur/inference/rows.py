"""Texts from files of any size, one after the other: what bulk encoding reads.

A file is JSON Lines (``.jsonl``, also ``.jsonl.gz``), CSV, Parquet, or plain text (``.txt``, also ``.txt.gz``) with a
text on each line. Never more than a piece of a file is in memory. An empty text is a text: each row of the input has
its row in the output.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from secateur.data.formats import check_once, read_csv, read_lines, read_parquet
from secateur.data.jsonl import read_json_lines
from secateur.data.sources import CHECKED_ROWS
from secateur.errors import DataError
from secateur.files import check_is_file

COLUMNS = ("text", "sentence", "query", "passage", "document", "content")
"""Where texts are looked for, in this order, if nobody names a column."""


def read_rows(file: str | Path, column: str | None = None) -> Iterator[str]:
    """Yield the texts of a file, in its order.

    Args:
        file: JSON Lines, CSV, Parquet or plain text.
        column: The column (or key) that holds the texts; default: the first of :data:`COLUMNS` that is there.

    Raises:
        DataError: The file is missing or damaged, or has no such column, or two; or, with its line, a text is missing
            or is not a text.
    """
    path = Path(file)
    check_is_file(path)
    for suffixes, read in _READERS.items():
        if path.name.lower().endswith(suffixes):
            return read(path, column)
    known = ", ".join(suffix for suffixes in _READERS for suffix in suffixes)
    raise DataError(path, "is of no known format", f"expected one of {known}")


def check_rows(files: Sequence[str | Path], column: str | None = None) -> None:
    """Look at the names, formats, columns and first rows of files, quickly and without PyTorch.

    Raises:
        DataError: As :func:`read_rows` would, as far as this can be told from :data:`.CHECKED_ROWS` rows.
    """
    for file in files:
        for _ in itertools.islice(read_rows(file, column), CHECKED_ROWS):
            pass


def find_column(path: Path, column: str | None, there: Sequence[str], line: int | None = None) -> str:
    """The column that texts are read from.

    Raises:
        DataError: It is not there, and the columns that are there are named; or it is there twice.
    """
    wanted = (column,) if column is not None else COLUMNS
    found = next((name for name in wanted if name in there), None)
    if found is None:
        problem = f"no column {column}" if column is not None else "none of its columns is known to hold texts"
        hint = f"--column takes one of those that are there: {', '.join(map(str, there))}" if there else "it has none"
        raise DataError(path, problem, hint, line=line)
    check_once(path, found, there, line)
    return found


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    name: str | None = None
    for line, row in read_json_lines(path):
        if name is None or name not in row:
            name = find_column(path, column if name is None else name, list(row), line)
        yield _text(path, line, name, row[name])


def _csv(path: Path, column: str | None) -> Iterator[str]:
    rows = read_csv(path)
    _, header = next(rows, (1, []))
    place = header.index(find_column(path, column, header, 1))
    yield from (row[place] for _, row in rows)


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    for first, piece in read_parquet(path, lambda names: [find_column(path, column, names)]):
        for name, values in piece.items():
            yield from (_text(path, line, name, value) for line, value in enumerate(values, start=first))


def _plain(path: Path, column: str | None) -> Iterator[str]:
    if column is not None:
        raise DataError(path, "is plain text and has no columns", "leave out --column")
    for _, line in read_lines(path):
        yield line.removesuffix("\n").removesuffix("\r")


def _text(path: Path, line: int, column: str, value: Any) -> str:
    if not isinstance(value, str):
        kind = "has no text" if value is None else f"holds a {type(value).__name__}, not a text"
        raise DataError(path, kind, "fill it in, or leave the row out", line=line, field=column)
    return value


_READERS: dict[tuple[str, ...], Callable[[Path, str | None], Iterator[str]]] = {
    (".jsonl", ".jsonl.gz"): _json_lines,
    (".csv",): _csv,
    (".parquet",): _parquet,
    (".txt", ".txt.gz"): _plain,
}
