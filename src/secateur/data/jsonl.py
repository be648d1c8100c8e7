"""JSON Lines, read so that a mistake is found in its file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.data.formats import read_lines
from secateur.errors import DataError
from secateur.files import parse_json


def read_json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of a JSON Lines file, each with the number of its line, counted from 1.

    Blank lines are skipped (and counted). A name that ends in ``.gz`` is unpacked.

    Raises:
        DataError: As for :func:`.read_lines`; or a line is not JSON, not a JSON object, or has a key twice.
    """
    for number, line in read_lines(file):
        if line.strip():
            yield number, _row(file, number, line)


def _row(file: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = parse_json(line, strict=True)
    except json.JSONDecodeError as error:
        raise DataError(file, f"broken JSON ({error.msg}, column {error.colno})", line=number) from None
    except ValueError as error:
        raise DataError(file, f"broken JSON ({error})", line=number) from None
    if not isinstance(row, dict):
        raise DataError(file, f"holds {_kind(row)}, not an object", 'each line is one {"key": value, ...}', line=number)
    return row


def _kind(value: object) -> str:
    names = {list: "a list", str: "a string", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), "null")
