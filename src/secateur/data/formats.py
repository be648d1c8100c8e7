"""Files of rows, read piece by piece: lines of text, CSV and Parquet. All readers of the project stand on these.

Never more than a piece of a file is in memory. A mistake is a :class:`.DataError` with the file and the line. Text is
UTF-8; a byte order mark, as Excel and Notepad write it, is left out.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import DataError, MissingPackage
from secateur.files import check_is_file

LONGEST_LINE = 1 << 28
"""Bytes, and the characters of a field of CSV: a packed file of a few kilobytes may unpack to a line of gigabytes."""

BATCH_ROWS = 1024
"""Rows of Parquet in memory at once."""


def read_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their ends, and their numbers from 1. A name in ``.gz`` is unpacked.

    A line feed ends a line, and nothing else does: JSON allows the other separators of Unicode in its strings.

    Raises:
        DataError: The file is missing, a folder, a pipe or damaged; or a line is not UTF-8, holds a NUL byte or is too
            long; or carriage returns alone end the lines.
    """
    check_is_file(file)
    number, packed = 0, file.suffix.lower() == ".gz"
    try:
        with gzip.open(file, "rb") if packed else file.open("rb") as stream:
            while raw := stream.readline(LONGEST_LINE + 1):
                number += 1
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if len(raw) > LONGEST_LINE:
                    raise DataError(file, f"is longer than {LONGEST_LINE} bytes", "one row on each line", line=number)
                if "\0" in line:
                    raise DataError(file, "holds a NUL byte", "save the file as UTF-8", line=number)
                if number == 1 and "\r" in line[:-1] and not line.endswith("\n"):
                    hint = "save the file with line feeds"
                    raise DataError(file, "carriage returns alone end its lines", hint, line=1)
                yield number, line
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} is not UTF-8"
        raise DataError(file, problem, "save the file as UTF-8", line=number) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(file, f"is not a whole gzip file ({error})", "copy or pack it again", line=number + 1) from None
    except OSError as error:
        raise DataError(file, f"cannot be read ({error.strerror or error})") from None


def read_csv(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a CSV file, the header first, each with the number of its first line. Blank lines are no rows.

    Raises:
        DataError: As for :func:`read_lines`; or a quote is not closed, or a row has another number of
            columns than the first.
    """
    csv.field_size_limit(LONGEST_LINE)  # Python's own limit is 131,072 characters
    reader = csv.reader((line for _, line in read_lines(file)), strict=True)
    columns, line = 0, 1
    try:
        for row in reader:
            columns = columns or len(row)
            if row and len(row) != columns:
                raise DataError(file, f"has {len(row)} columns, the first line {columns}", line=line)
            if row:
                yield line, row
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(file, f"broken CSV ({error})", line=line) from None


def read_parquet(
    file: Path, choose: Callable[[Sequence[str]], Sequence[str]]
) -> Iterator[tuple[int, dict[str, list[Any]]]]:
    """Yield pieces of a Parquet file: the number of the first row, from 1, and the values of each column.

    Args:
        file: The file.
        choose: Given the names of all columns, those to read.

    Raises:
        DataError: The file is missing or damaged, a name says two columns, or bytes of a text are not UTF-8.
        MissingPackage: pyarrow is not installed.
    """
    check_is_file(file)
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingPackage("pyarrow", f"reading {file}", "pip install 'secateur[torch]'") from None
    first = 1
    try:
        # Otherwise whole row groups are in memory, and a file may be one.
        pieces = {"pre_buffer": False, "buffer_size": 1 << 20}
        with parquet.ParquetFile(file, page_checksum_verification=True, **pieces) as opened:
            names = opened.schema_arrow.names
            chosen = list(choose(names))
            for name in chosen:
                check_once(file, name, names)
            for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=chosen):
                yield first, {name: _values(file, name, batch.column(name), first) for name in batch.schema.names}
                first += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        problem = f"is not a readable Parquet file ({' '.join(str(error).split()):.200})"
        raise DataError(file, problem, line=first if first > 1 else None) from None


def check_once(file: Path, column: str, there: Sequence[str], line: int | None = None) -> None:
    """Refuse a column's name that says two columns.

    Raises:
        DataError: It does.
    """
    if there.count(column) > 1:
        problem = f"is the name of {there.count(column)} columns"
        raise DataError(file, problem, "give each its own", line=line, field=column)


def _values(file: Path, name: str, column: Any, first: int) -> list[Any]:
    """The values of a column; Parquet's writers need not check that texts are UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        for line, value in enumerate(column, start=first):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                problem = f"byte {error.start + 1} of the text is not UTF-8"
                raise DataError(file, problem, "write it as UTF-8", line=line, field=name) from None
        raise
    return values
