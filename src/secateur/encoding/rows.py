"""Texts from files of any size, one after the other: what bulk encoding reads.

A file is JSON Lines (``.jsonl``, also ``.jsonl.gz``), CSV, Parquet, or plain text (``.txt``, also ``.txt.gz``) with a
text on each line. Never more than a piece of a file is in memory. An empty text is a text: each row of the input has
its row in the output.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from secateur.data.jsonl import read_json_lines
from secateur.data.tables import FIELD_CHARACTERS, check_once, values_of
from secateur.errors import DataError
from secateur.files import check_is_file

COLUMNS = ("text", "sentence", "query", "passage", "document", "content")
"""Where texts are looked for, in this order, if nobody names a column."""

BATCH_ROWS = 1024


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
    check_once(path, found, there)
    return found


def _json_lines(path: Path, column: str | None) -> Iterator[str]:
    name: str | None = None
    for line, row in read_json_lines(path):
        if name is None or name not in row:
            name = find_column(path, column if name is None else name, list(row), line)
        yield _text(path, line, name, row[name])


def _csv(path: Path, column: str | None) -> Iterator[str]:
    csv.field_size_limit(FIELD_CHARACTERS)
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(reader, [])
        place = header.index(find_column(path, column, header, 1))
        start = reader.line_num + 1
        for row in reader:
            if row and len(row) != len(header):
                raise DataError(path, f"has {len(row)} columns, the first line {len(header)}", line=start)
            if row:
                yield row[place]
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(path, f"broken CSV ({error})", line=reader.line_num) from error


def _parquet(path: Path, column: str | None) -> Iterator[str]:
    line = 0
    try:
        with parquet.ParquetFile(path) as file:
            name = find_column(path, column, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[name]):
                for value in values_of(path, name, batch.column(0), line + 1):
                    line += 1
                    yield _text(path, line, name, value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not a readable Parquet file ({str(error).splitlines()[0]})") from error


def _plain(path: Path, column: str | None) -> Iterator[str]:
    if column is not None:
        raise DataError(path, "is plain text and has no columns", "leave out --column")
    for _, line in _lines(path):
        yield line.removesuffix("\n").removesuffix("\r")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends and their numbers; a line feed ends one, and nothing else does."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not UTF-8"
        raise DataError(path, problem, "save the file as UTF-8", line=number) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(path, f"is not a whole gzip file ({error})", "copy or pack it again") from None
    except OSError as error:
        raise DataError(path, f"cannot be read ({error.strerror or error})") from None


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
