"""Pairs and triplets from files: read whole, checked line by line, sampled by seed.

A data file is JSON Lines (``.jsonl``, also ``.jsonl.gz``), CSV or Parquet, with the columns ``query`` (or ``anchor``),
``positive`` and, where there are hard negatives, ``negative`` (a text or a list of texts). A JSON file of the same
name beside it (``pairs.jsonl`` and ``pairs.json``) may hold ``query_instruction``, ``passage_instruction`` and
``licence``.
"""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.e5_mix import instruction_of
from secateur.data.jsonl import read_json_lines
from secateur.errors import DataError
from secateur.files import check_no_byte_order_mark, read_json
from secateur.provenance import Fingerprint, fingerprint

ANCHOR_NAMES = ("query", "anchor")
SUFFIXES = (".jsonl", ".jsonl.gz", ".csv", ".parquet")


@dataclass(frozen=True)
class Pair:
    """One example: an anchor, the text that belongs to it, and none or more that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pairs:
    """One data set. ``prompt`` goes before each anchor, ``passage_prompt`` before each positive and negative."""

    name: str
    rows: tuple[Pair, ...]
    prompt: str
    passage_prompt: str
    source: Fingerprint

    def sample(self, count: int, seed: int) -> Pairs:
        """At most ``count`` rows, drawn by ``seed``, in the order of the file."""
        if count >= len(self.rows):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.rows)), count))  # noqa: S311 - not for secrets
        return replace(self, rows=tuple(self.rows[i] for i in chosen), source=replace(self.source, rows=count))


@dataclass(frozen=True)
class Batch:
    """Examples of one data set whose positives and negatives serve all its anchors."""

    anchors: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str
    passage_prompt: str


def instruction_prompt(instruction: str) -> str:
    """An instruction as it stands before a text, in training, evaluation and use alike (L3Prune's format)."""
    return f"{instruction.strip()}; " if instruction.strip() else ""


def read_pairs(file: str | Path, *, instruction: str | None = None) -> Pairs:
    """Read and check a data file.

    Args:
        file: JSON Lines, CSV or Parquet.
        instruction: Goes before each anchor in place of the one in the file beside the data.

    Raises:
        DataError: The file is missing or has no rows; or, with its line, a column is missing, a text is empty or is
            not a text.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(path, "no such file")
    rows = tuple(_pair(path, line, row) for line, row in _rows(path))
    if not rows:
        raise DataError(path, "has no rows")
    beside = _read_beside(path)
    return Pairs(
        name=_stem(path),
        rows=rows,
        prompt=instruction_prompt(beside.get("query_instruction", "") if instruction is None else instruction),
        passage_prompt=instruction_prompt(beside.get("passage_instruction", "") if instruction is None else ""),
        source=fingerprint(path, len(rows), beside.get("licence", "")),
    )


def data_files(path: str | Path) -> list[Path]:
    """A data file; of a folder, all data files in it, by name.

    Raises:
        DataError: A folder holds none.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    files = sorted(file for file in folder.iterdir() if file.name.endswith(SUFFIXES))
    if not files:
        raise DataError(folder, "holds no data files", f"expected {', '.join(SUFFIXES)}")
    return files


def batches(pairs: Pairs, size: int) -> list[Batch]:
    """Cut a data set into batches in its own order; a last one that is not full is left out, unless it is the only one.

    The loss depends on the size of a batch, so batches of two sizes must not be averaged.
    """
    size = min(size, len(pairs.rows))
    starts = range(0, len(pairs.rows) - size + 1, size)
    return [_batch(pairs, pairs.rows[start : start + size]) for start in starts]


def _batch(pairs: Pairs, rows: Sequence[Pair]) -> Batch:
    return Batch(
        anchors=tuple(row.anchor for row in rows),
        positives=tuple(row.positive for row in rows),
        negatives=tuple(text for row in rows for text in row.negatives),
        prompt=pairs.prompt,
        passage_prompt=pairs.passage_prompt,
    )


def _stem(path: Path) -> str:
    return next((path.name.removesuffix(suffix) for suffix in SUFFIXES if path.name.endswith(suffix)), path.stem)


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line (or row) number and columns of each row."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_json_lines(path)
    if path.suffix == ".csv":
        return _csv_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise DataError(path, "is of no known format", f"expected one of {', '.join(SUFFIXES)}")


def _csv_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    content = path.read_bytes()
    check_no_byte_order_mark(path, content)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise DataError(path, "has another number of columns than the first line", line=reader.line_num)
            yield reader.line_num, {name: value for name, value in row.items() if name != "negative" or value}
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(path, "is not UTF-8", "save the file as UTF-8", line=line) from error
    except csv.Error as error:
        first = reader.line_num + 1  # of the row: a quote that is not closed runs on to the end of the file
        raise DataError(path, f"broken CSV ({error})", line=first) from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(path, f"is not a readable Parquet file ({str(error).splitlines()[0]})") from error
    yield from enumerate(table.to_pylist(), start=1)


def _pair(path: Path, line: int, row: Mapping[str, Any]) -> Pair:
    anchor = next((name for name in ANCHOR_NAMES if name in row), ANCHOR_NAMES[0])
    for field in (anchor, "positive"):
        if field not in row:
            columns = f"each row needs {' or '.join(ANCHOR_NAMES)}, and positive"
            raise DataError(path, "the column is missing", columns, line=line, field=field)
    return Pair(
        anchor=_text(path, line, anchor, row[anchor]),
        positive=_text(path, line, "positive", row["positive"]),
        negatives=_negatives(path, line, row.get("negative")),
    )


def _negatives(path: Path, line: int, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    texts = value if isinstance(value, list) else [value]
    return tuple(_text(path, line, "negative", text) for text in texts)


def _text(path: Path, line: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(path, f"is {value!r:.60}, not a text", line=line, field=field)
    if not value.strip():
        raise DataError(path, "the text is empty", "leave the row out", line=line, field=field)
    return value


def _read_beside(path: Path) -> Mapping[str, str]:
    """What the JSON file of the same name tells about the data; without one, what the E5 mix's own papers tell."""
    file = path.with_name(_stem(path) + ".json")
    if not file.is_file():
        return {"query_instruction": instruction_of(path)}
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not an object")
    known = {key: content[key] for key in ("query_instruction", "passage_instruction", "licence") if key in content}
    for key, value in known.items():
        if not isinstance(value, str):
            raise DataError(file, f"is a {type(value).__name__}, not a text", field=key)
    return known
