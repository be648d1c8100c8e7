"""JSON Lines, read so that a mistake is found in its file and line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from secateur.errors import DataError
from secateur.files import check_no_byte_order_mark


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSON Lines file, each with the number of its line, counted from 1.

    Blank lines are skipped (and counted). A name that ends in ``.gz`` is unpacked.

    Raises:
        DataError: The file is missing, damaged or starts with a byte order mark; or a line is not UTF-8, not JSON, not
            a JSON object, or has a key twice.
    """
    for number, line in _lines(file):
        if line.strip():
            yield number, _row(file, number, line)


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    # Bytes, not text: str.splitlines and universal newlines would also split at separators that JSON allows in strings.
    try:
        with gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1:
                    check_no_byte_order_mark(file, line)
                yield number, line
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except IsADirectoryError:
        raise DataError(file, "is a folder", "name the file in it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(file, f"is not a whole gzip file ({error})", "copy or pack it again") from None
    except OSError as error:
        raise DataError(file, f"cannot be read ({error.strerror or error})") from None


def _row(file: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = _DECODER.decode(line.decode("utf-8"))
        if b"\\u" in line:  # an escaped half of a surrogate pair is JSON, but no text: tokenizers refuse it
            json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(file, f"byte {error.start + 1} is not UTF-8", "save the file as UTF-8", line=number) from None
    except UnicodeEncodeError:
        raise DataError(file, "holds half of a surrogate pair (\\ud800 to \\udfff)", line=number) from None
    except json.JSONDecodeError as error:
        raise DataError(file, f"broken JSON ({error.msg}, column {error.colno})", line=number) from None
    except (ValueError, RecursionError) as error:
        raise DataError(file, f"broken JSON ({error})", line=number) from None
    if not isinstance(row, dict):
        raise DataError(file, f"holds {_kind(row)}, not an object", 'each line is one {"key": value, ...}', line=number)
    return row


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{twice}" is there twice')
    return row


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
