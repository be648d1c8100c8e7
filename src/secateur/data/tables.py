"""Rows of columns, from a file (JSON Lines, CSV, Parquet, lines of text) or a data set by name (:mod:`.hub_sets`)."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from secateur.data.formats import check_once, read_csv, read_lines, read_parquet
from secateur.data.hub_sets import is_hub_name, open_set
from secateur.data.jsonl import read_json_lines
from secateur.errors import ConfigError, DataError
from secateur.files import check_is_file
from secateur.provenance import Fingerprint, fingerprint

QUERY, ANCHOR, POSITIVE, NEGATIVE, TEXT = ROLES = ("query", "anchor", "positive", "negative", "text")
"""The columns that mean something here."""

SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
LINES = (".txt", ".txt.gz")

T = TypeVar("T")

Row = tuple[int, Mapping[str, Any]]
"""Number of the line (or row), from 1, and its columns."""


@dataclass(frozen=True)
class Draw:
    """How many rows to keep of each data set, and the seed that they are drawn by."""

    rows: int
    seed: int

    def places(self, count: int) -> Sequence[int]:
        """Where the drawn ones are among ``count`` rows, in their order."""
        if count <= self.rows:
            return range(count)
        return sorted(random.Random(self.seed).sample(range(count), self.rows))  # noqa: S311 - not for secrets


@dataclass(frozen=True)
class Table:
    """Opened data.

    Attributes:
        place: What errors call it.
        name: What the set is called: a file's name without its suffix, or that of a data set.
        rows: Reads its rows, from the first on; one after the other, so that a file of any size takes no memory.
        fingerprint: Of its content, given how many rows were read.
        path: The file; None for a data set.
        of_texts: Whether its rows are texts alone, and no pairs.
    """

    place: str
    name: str
    rows: Callable[[], Iterator[Row]]
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
    if is_hub_name(data):
        return _set_table(data, mapped)
    path = Path(data)
    check_is_file(path)
    rows, is_lines = _file_rows(path, mapped), path.name.lower().endswith(LINES)
    rows = partial(_renamed, str(path), rows, mapped) if mapped and not is_lines else rows
    return Table(str(path), stem(path), rows, partial(fingerprint, path), path, is_lines or _of_texts(rows))


def _set_table(data: str | Path, mapped: Mapping[str, str]) -> Table:
    opened = open_set(data)
    wanted = {*ROLES, *mapped.values()}
    rows: Callable[[], Iterator[Row]] = partial(opened.rows, wanted)
    if mapped:  # no rows were read yet: all columns are there to be named
        _check_there(str(data), mapped, opened.data.column_names)
        rows = partial(_renamed, str(data), rows, mapped)
    return Table(str(data), opened.name.label, rows, partial(opened.fingerprint, wanted=wanted), None, _of_texts(rows))


def _of_texts(rows: Callable[[], Iterator[Row]]) -> bool:
    return any(TEXT in row and POSITIVE not in row for _, row in itertools.islice(rows(), 1))


def read_rows(table: Table, parse: Callable[[str, int, Mapping[str, Any]], T], draw: Draw | None = None) -> list[T]:
    """Read and check all rows.

    Args:
        table: The opened data.
        parse: Makes something of a row, given also the table's place and the row's line.
        draw: Keep no more than so many, drawn by the seed, in their order; no others are held in memory, so a file with
            more is read twice.
    """
    if draw is None:
        return [parse(table.place, line, row) for line, row in table.rows()]
    kept: list[T] = []
    count = 0
    for count, (line, row) in enumerate(table.rows(), start=1):
        parsed = parse(table.place, line, row)
        if count <= draw.rows:
            kept.append(parsed)
    if count <= draw.rows:
        return kept
    kept.clear()
    rows, place = table.rows(), -1
    for chosen in draw.places(count):
        for line, row in itertools.islice(rows, chosen - place - 1, chosen - place):
            kept.append(parse(table.place, line, row))
        place = chosen
    if len(kept) < draw.rows:
        raise DataError(table.place, "lost rows while it was read", "run the same command again")
    return kept


def stem(path: Path) -> str:
    """A data file's name without its suffix."""
    known = (suffix for suffix in (*SUFFIXES, *LINES) if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)] if (suffix := next(known, "")) else path.stem


def _canonical(columns: Mapping[str, str]) -> dict[str, str]:
    """A column map in which anchors are called by one of their two names."""
    for role in columns:
        if role not in ROLES:
            raise ConfigError("columns", role, f"{role} is no role of a column", f"one of {', '.join(ROLES)}")
    if QUERY in columns and ANCHOR in columns:
        raise ConfigError("columns", dict(columns), "query and anchor are two words for one column", "map one of them")
    return {QUERY if role == ANCHOR else role: column for role, column in columns.items()}


def _renamed(place: str, rows: Callable[[], Iterator[Row]], columns: Mapping[str, str]) -> Iterator[Row]:
    """Rows in which the mapped columns have the names that they stand for. Single rows may lack a negative."""
    row: Mapping[str, Any] = {}
    line, negative_seen = 0, False
    for line, row in rows():
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


def _file_rows(path: Path, columns: Mapping[str, str]) -> Callable[[], Iterator[Row]]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return partial(read_json_lines, path)
    if name.endswith(".csv"):
        return partial(_csv_rows, path)
    if name.endswith(".parquet"):
        return partial(_parquet_rows, path, columns)
    if name.endswith(LINES):
        return partial(_text_rows, path)
    raise DataError(path, "is of no known format", f"expected one of {', '.join((*SUFFIXES, *LINES))}")


def _csv_rows(path: Path) -> Iterator[Row]:
    rows = read_csv(path)
    _, names = next(rows, (1, []))
    for name in filter(None, names):
        check_once(path, name, names, line=1)
    for line, row in rows:
        yield line, dict(zip(names, row, strict=True))


def _parquet_rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    for first, piece in read_parquet(path, partial(_needed, columns)):
        for line, values in enumerate(zip(*piece.values(), strict=True), start=first):
            yield line, dict(zip(piece, values, strict=True))


def _needed(columns: Mapping[str, str], there: Sequence[str]) -> Sequence[str]:
    """The columns that mean something here; all, where some are missing, for the error to name them."""
    has = {*there, *(role for role, column in columns.items() if column in there)}
    if not {*columns.values()} <= {*there} or not (TEXT in has or (POSITIVE in has and {QUERY, ANCHOR} & has)):
        return there
    return [name for name in there if name in {*ROLES, *columns.values()}]


def _text_rows(path: Path) -> Iterator[Row]:
    for line, text in read_lines(path):
        if text.strip():
            yield line, {TEXT: text.removesuffix("\n").removesuffix("\r")}
