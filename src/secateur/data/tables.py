"""Rows of columns, from a file (JSON Lines, CSV, Parquet, lines of text) or a data set by name (:mod:`.hub_sets`)."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from secateur.data.hub_sets import is_hub_name, open_set
from secateur.data.jsonl import read_json_lines
from secateur.errors import ConfigError, DataError
from secateur.files import check_is_file, check_no_byte_order_mark
from secateur.provenance import Fingerprint, fingerprint

QUERY, ANCHOR, POSITIVE, NEGATIVE, TEXT = ROLES = ("query", "anchor", "positive", "negative", "text")
"""The columns that mean something here."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
LINES = ".txt"
FIELD_CHARACTERS = 1 << 30
"""The longest text in a CSV file; Python's own limit is 131,072."""

Row = tuple[int, Mapping[str, Any]]
"""Number of the line (or row), from 1, and its columns."""


@dataclass(frozen=True)
class Table:
    """Opened data.

    Attributes:
        place: What errors call it.
        name: What the set is called: a file's name without its suffix, or that of a data set.
        rows: Its rows, to be read once.
        fingerprint: Of its content, given how many rows were read.
        path: The file; None for a data set.
        of_texts: Whether its rows are texts alone, and no pairs.
    """

    place: str
    name: str
    rows: Iterable[Row]
    fingerprint: Callable[[int], Fingerprint]
    path: Path | None
    of_texts: bool


def open_table(data: str | Path, columns: Mapping[str, str] | None = None) -> Table:
    """Open a file or data set.

    Args:
        data: A file, or ``hf:NAME:CONFIG[SPLIT]``.
        columns: Role (:data:`ROLES`) → the column that has it here, where it is not called so.

    Raises:
        ConfigError: There is no such role.
        DataError: It is missing or broken; or, with its line, a column of ``columns`` is missing.
    """
    mapped = _canonical(columns or {})
    path = None if is_hub_name(data) else Path(data)
    if path is None:
        opened = open_set(data)
        wanted = {*ROLES, *mapped.values()}
        name, rows, source = opened.name.label, opened.rows(wanted), partial(opened.fingerprint, wanted=wanted)
        if mapped:  # no rows were read yet: all columns are there to be named
            _check_there(str(data), mapped, opened.data.column_names)
    else:
        check_is_file(path)
        name, rows, source = stem(path), _file_rows(path), partial(fingerprint, path)
        if path.suffix.lower() == LINES:
            return Table(str(path), name, rows, source, path, of_texts=True)
    renamed = _renamed(str(data), rows, mapped) if mapped else rows
    first = list(itertools.islice(renamed, 1))
    of_texts = any(TEXT in row and POSITIVE not in row for _, row in first)
    return Table(str(data), name, itertools.chain(first, renamed), source, path, of_texts)


def stem(path: Path) -> str:
    """A data file's name without its suffix."""
    return next((path.name[: -len(suffix)] for suffix in SUFFIXES if path.name.lower().endswith(suffix)), path.stem)


def _canonical(columns: Mapping[str, str]) -> dict[str, str]:
    """A column map in which anchors are called by one of their two names."""
    for role in columns:
        if role not in ROLES:
            raise ConfigError("columns", role, f"{role} is no role of a column", f"one of {', '.join(ROLES)}")
    if QUERY in columns and ANCHOR in columns:
        raise ConfigError("columns", dict(columns), "query and anchor are two words for one column", "map one of them")
    return {QUERY if role == ANCHOR else role: column for role, column in columns.items()}


def _renamed(place: str, rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows in which the mapped columns have the names that they stand for. Single rows may lack a negative."""
    row: Mapping[str, Any] = {}
    line, negative_seen = 0, False
    for line, row in rows:
        _check_there(place, {role: column for role, column in columns.items() if role != NEGATIVE}, row, line)
        negative_seen = negative_seen or columns.get(NEGATIVE) in row
        yield line, {**row, **{role: row[column] for role, column in columns.items() if column in row}}
    if line and not negative_seen:
        _check_there(place, columns, row, line)


def _check_there(place: str, columns: Mapping[str, str], there: Iterable[str], line: int | None = None) -> None:
    known = list(there)
    for column in columns.values():
        if column not in known:
            raise DataError(place, "the column is missing", f"it has {', '.join(known)}", line=line, field=column)


def _file_rows(path: Path) -> Iterator[Row]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return read_json_lines(path)
    if name.endswith(".csv"):
        return _csv_rows(path)
    if name.endswith(".parquet"):
        return _parquet_rows(path)
    if name.endswith(LINES):
        return _text_rows(path)
    raise DataError(path, "is of no known format", f"expected one of {', '.join((*SUFFIXES, LINES))}")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(FIELD_CHARACTERS)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror or error})") from None
    check_no_byte_order_mark(path, content)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        names = list(reader.fieldnames or ())
        for name in filter(None, names):
            check_once(path, name, names)
        for row in reader:
            if None in row or None in row.values():
                raise DataError(path, "has another number of columns than the first line", line=reader.line_num)
            yield reader.line_num, row
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(path, "is not UTF-8", "save the file as UTF-8", line=line) from error
    except csv.Error as error:
        first = reader.line_num + 1  # of the row: a quote that is not closed runs on to the end of the file
        raise DataError(path, f"broken CSV ({error})", line=first) from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not a readable Parquet file ({str(error).splitlines()[0]})") from error
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        for name in table.column_names:
            values_of(path, name, table[name])
        raise
    yield from enumerate(rows, start=1)


def check_once(path: Path, column: str, there: Sequence[str]) -> None:
    """Refuse a column's name that says two columns.

    Raises:
        DataError: It does.
    """
    if there.count(column) > 1:
        problem = f"is the name of {there.count(column)} columns"
        raise DataError(
            path, problem, "give each its own", line=1 if path.suffix.lower() == ".csv" else None, field=column
        )


def values_of(path: Path, name: str, column: Any, first: int = 1) -> list[Any]:
    """The values of a column of Parquet, of which the first stands in row ``first``.

    Raises:
        DataError: Bytes of a text are not UTF-8; Parquet's writers need not check them.
    """
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for line, value in enumerate(column, start=first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                problem = f"byte {error.start + 1} of the text is not UTF-8"
                raise DataError(path, problem, "write it as UTF-8", line=line, field=name) from None
        raise
    return values


def _text_rows(path: Path) -> Iterator[Row]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read ({error})", "save the file as UTF-8") from None
    yield from ((line, {TEXT: text}) for line, text in enumerate(content.split("\n"), start=1) if text.strip())
