"""Rows of files, one after the other, each with its line: JSON Lines, CSV, TSV, Parquet and plain text.

Only a piece of a file is in memory. A mistake is a :class:`.DataError` with file, line and column, which the
``datasets`` library does not tell. Text is UTF-8; a byte order mark, as Excel and Notepad write it, is left out.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import gzip
import io
import itertools
import json
import math
import tokenize
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.errors import DataError, MissingPackage
from secateur.files import check_is_file, not_utf8, parse_json

Row = Mapping[str, Any]
Place = int | str | None
"""The line of a row; or, of an entry in a JSON file, its key: ``queries.q1``, and in a list ``[7]``."""
Select = Callable[[Sequence[str]], Sequence[str]]
"""Given the names of all columns, those to read."""
Fields = Mapping[str, Callable[[Any], Any]]
"""Column → what its values are parsed by; a parser raises ValueError."""

TEXT = "text"
TABLES = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".parquet")
CELLS = TABLES[2:6]
"""Of these, those in which every value is a text."""
PLAIN = (".txt", ".txt.gz")
TEXT_COLUMNS = (TEXT, "sentence", "query", "passage", "document", "content")
"""Where ``encode`` looks for texts, in this order, if nobody names a column."""
CHECKED_ROWS = 1000
"""Rows of each file that are checked before anything heavy is imported."""
BATCH_ROWS = 1024
"""Rows of Parquet in memory at once."""


def read_rows(path: Path, select: Select = list) -> Iterator[tuple[int, Row]]:
    """Read a file row by row: the line of each row (of Parquet, its number), from 1, and its columns.

    Blank lines are no rows, except in plain text, whose lines are in the column ``text``. CSV may be separated by
    semicolons or tabs, as Excel does in some languages: the first line tells. ``select`` says which columns of Parquet
    to read: it may have vectors beside the texts.

    Raises:
        DataError: The file is missing, of no known format, or damaged; or, with its line, a row is broken.
        MissingPackage: pyarrow is not installed.
    """
    check_is_file(path)
    name = path.name.lower()
    suffix = next((suffix for suffix in (*TABLES, *PLAIN) if name.endswith(suffix)), None)
    if suffix is None:
        raise DataError(path, "is of no known format", f"expected one of {', '.join((*TABLES, *PLAIN))}")
    match suffix.split(".")[1]:
        case "jsonl":
            return _json_lines(path)
        case "csv":
            return _columns(path, _csv(path))
        case "tsv":
            return _columns(path, _tsv(path))
        case "parquet":
            return _parquet(path, select)
    return ((line, {TEXT: text.removesuffix("\n").removesuffix("\r")}) for line, text in _lines(path))


def read_column(file: str | Path, column: str | None = None) -> Iterator[str]:
    """Read the texts of one column, as ``encode`` does: by default the first of :data:`TEXT_COLUMNS` that is there.

    Raises:
        DataError: As :func:`read_rows`; or the column is missing or there twice, or a value is not a text.
    """
    wanted = TEXT_COLUMNS if column is None else (column,)
    for line, row in read_rows(Path(file), lambda names: [name for name in wanted if name in names][:1] or names):
        if column is None:
            column = next((name for name in wanted if name in row), None)
        if column is None or column not in row:
            problem = f"no column {column}" if column else "none of its columns is known to hold texts"
            hint = f"--column takes one of those that are there: {', '.join(row)}" if row else "it has none"
            raise DataError(file, problem, hint, line=line)
        text = row[column]
        if not isinstance(text, str):
            problem = "has no text" if text is None else f"holds a {type(text).__name__}, not a text"
            raise DataError(file, problem, "fill it in, or leave the row out", line=line, field=column)
        yield text


def check_column(files: Sequence[str | Path], column: str | None = None) -> None:
    """Check the first rows of files for :func:`read_column`, without PyTorch."""
    for file in files:
        list(itertools.islice(read_column(file, column), CHECKED_ROWS))


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1, and their ends. ``.gz`` is unpacked.

    A line feed ends a line, and nothing else does: JSON allows the other separators of Unicode in its strings.
    """
    number, packed = 0, file.suffix.lower() == ".gz"
    try:
        with gzip.open(file, "rb") if packed else file.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if "\0" in line:
                    raise DataError(file, "holds a NUL byte", "save the file as UTF-8", line=number)
                yield number, line
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, number) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(file, f"is not a whole gzip file ({error})", "copy or pack it again", line=number + 1) from None
    except OSError as error:
        raise DataError(file, f"cannot be read ({error.strerror or error})") from None


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for line, text in _lines(path):
        if not text.strip():
            continue
        try:
            row = parse_json(text, strict=True)
        except ValueError as error:
            said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise DataError(path, f"broken JSON ({said})", line=line) from None
        if not isinstance(row, dict):
            problem = f"holds a {type(row).__name__}, not an object"
            raise DataError(path, problem, 'each line is one {"key": value, ...}', line=line)
        yield line, row


def _csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit((1 << 31) - 1)  # Python's own limit is 131,072 characters
    lines = _lines(path)
    line, first = next(((line, text) for line, text in lines if text.strip()), (1, ""))
    rest, blank = (text for _, text in lines), line - 1
    reader = csv.reader(itertools.chain([first], rest), strict=True, delimiter=max(",;\t", key=first.count))
    try:
        for cells in reader:
            yield line, cells
            line = blank + reader.line_num + 1
    except csv.Error as error:
        raise DataError(path, f"broken CSV ({error})", line=line) from None


def _tsv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """A tab ends a cell, a line feed a row; quotes are letters, but not those that pandas put around a cell."""

    def cell(text: str) -> str:
        inner = text[1:-1].replace('""', "")
        quoted = len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inner
        return text[1:-1].replace('""', '"') if quoted else text

    for line, text in _lines(path):
        if text.strip():
            yield line, list(map(cell, text.rstrip("\r\n").split("\t")))


def _columns(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, Row]]:
    """Rows of cells as columns by the names in the first of them."""
    names: list[str] = []
    for line, cells in rows:
        if cells and not names:
            names = cells
            _check_names(path, names, names, line)
        elif cells and len(cells) != len(names):
            raise DataError(path, f"has {len(cells)} columns, the first line {len(names)}", line=line)
        elif cells:
            yield line, dict(zip(names, cells, strict=True))


def _parquet(path: Path, select: Select) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError:
        raise MissingPackage("pyarrow", f"reading {path}", "pip install 'secateur[torch]'") from None
    first = 1
    # Without buffers of this size whole row groups are in memory, and a file may be one.
    options = {"page_checksum_verification": True, "pre_buffer": False, "buffer_size": 1 << 20}
    try:
        with parquet.ParquetFile(path, **options) as opened:
            names = opened.schema_arrow.names
            chosen = list(select(names))
            _check_names(path, chosen, names)
            for batch in opened.iter_batches(batch_size=BATCH_ROWS, columns=chosen):
                yield from enumerate(batch.to_pylist(), start=first)
                first += batch.num_rows
    except UnicodeDecodeError:  # Parquet's writers need not check that texts are UTF-8
        problem = f"a text in the rows {first} to {first + batch.num_rows - 1} is not UTF-8"
        raise DataError(path, problem, "write it as UTF-8") from None
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:  # such as a date in the year 30,000
        problem = f"is not a readable Parquet file ({' '.join(str(error).split()):.200})"
        raise DataError(path, problem, line=first if first > 1 else None) from None


def _check_names(path: Path, chosen: Sequence[str], names: Sequence[str], line: int | None = None) -> None:
    """Refuse a column that is there twice; those without a name, as pandas writes its index, are of no use."""
    for name in filter(None, chosen):
        if names.count(name) > 1:
            problem = f"is the name of {names.count(name)} columns"
            raise DataError(path, problem, "give each its own", line=line, field=name)


# Values ---------------------------------------------------------------------------------------------------------------


def parse_rows(
    file: str | Path,
    rows: Iterable[tuple[Place, Row]],
    fields: Fields,
    names: Mapping[str, Sequence[str]],
    *,
    optional: Collection[str] = (),
    needed: str = "",
) -> Iterator[tuple[Place, dict[str, Any]]]:
    """Check and parse the columns of rows that mean something.

    ``names`` are what files call a column that has not only the name of its field; the first that is there counts. An
    ``optional`` column may be missing, and is parsed as None; ``needed`` says what every row must have.

    Raises:
        DataError: A column is missing, or its value is not valid; or there are no rows.
    """
    of_cells, place = str(file).lower().endswith(CELLS), None
    for place, row in rows:
        values = {}
        for field, parse in fields.items():
            called = names.get(field, (field,))
            name = next((name for name in called if name in row), called[0])
            if name not in row and field not in optional:
                raise error_at(file, place, "the column is missing", f"{needed}here are {', '.join(row)}", field=name)
            try:
                value = row.get(name)
                values[field] = parse(_of_cell(value, parse) if of_cells and value else value)
            except ValueError as error:
                raise error_at(file, place, str(error), field=name) from None
        yield place, values
    if place is None:
        raise DataError(file, "has no rows")


def error_at(file: str | Path, place: Place, problem: str, hint: str = "", *, field: str | None = None) -> DataError:
    """The error of a row or an entry."""
    if isinstance(place, str):
        return DataError(file, problem, hint, field=f"{place}.{field}" if field and place.startswith("[") else place)
    return DataError(file, problem, hint, line=place, field=field)


def _of_cell(cell: str, parse: Callable[[Any], Any]) -> Any:
    """A number or list, as JSON and Python write them, of CSV or TSV, where all values are texts."""
    if parse in (as_number, as_binary):
        with contextlib.suppress(ValueError):
            return float(cell)
    if parse not in (as_texts, as_text_list, as_number_list) or not cell.strip().startswith("["):
        return cell
    try:
        return parse_json(cell, strict=True)
    except json.JSONDecodeError:
        try:
            found = ast.literal_eval(cell.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return cell
    tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell.strip()).readline)]
    if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kind for kind in tokens if kind != tokenize.NL):
        raise ValueError("lists texts without commas, as numpy prints them, which Python reads as one text")
    return found


def as_text(value: Any) -> str:
    """A text that is not empty."""
    if not isinstance(value, str):
        raise ValueError(f"is {value!r:.60}, not a text")
    if not value.strip():
        raise ValueError("the text is empty")
    return value


def as_text_or_empty(value: Any) -> str:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"is {value!r:.60}, not a text")
    return value or ""


def as_texts(value: Any) -> list[str]:
    """A text, a list of texts, or nothing."""
    given = [] if value in (None, "") else value if isinstance(value, list) else [value]
    return list(map(as_text, given))


def as_text_list(value: Any) -> list[str]:
    return list(map(as_text, _as_list(value)))


def as_number_list(value: Any) -> list[float]:
    return list(map(as_number, _as_list(value)))


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"is {value!r:.60}, not a list")
    if not value:
        raise ValueError("is an empty list")
    return value


def as_number(value: Any) -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float)):
        with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
            if math.isfinite(value):
                return float(value)
    raise ValueError(f"is {value!r:.60}, not a number")


def as_binary(value: Any) -> int:
    """0 or 1, also as false and true or, from a column that had gaps, as 0.0 and 1.0."""
    if not isinstance(value, (int, float)) or value not in (0, 1):
        raise ValueError(f"is {value!r:.60}, not 0 or 1")
    return int(value)


def as_id(value: Any) -> str:
    """A text or an integer; 7.0 is 7, but beyond 2**53 several integers are the same float."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and value.is_integer():
        if abs(value) >= 1 << 53:
            raise ValueError(f"is {value!r:.60}, a float too large to tell ids apart")
        return str(int(value))
    return as_text(value)


def as_label(value: Any) -> str:
    """A text, a number, or true or false; 1.0 and 1 are one label, true is another."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and not value.is_integer():
        return repr(value)
    return as_id(value)
