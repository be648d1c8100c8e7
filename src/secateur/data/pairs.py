"""Pairs and triplets from files and data sets: checked line by line, sampled by seed.

A data file is JSON Lines (``.jsonl``, also ``.jsonl.gz``), CSV or Parquet, with the columns ``query`` (or ``anchor``),
``positive`` and, where there are hard negatives, ``negative`` (a text or a list of texts). A JSON file of the same
name beside it (``pairs.jsonl`` and ``pairs.json``) may hold ``query_instruction``, ``passage_instruction`` and
``licence``. A data set by name (:mod:`.hub_sets`) has the same columns; others are mapped to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.data.e5_mix import instruction_of
from secateur.data.tables import ANCHOR, NEGATIVE, POSITIVE, QUERY, Draw, Table, open_table, read_rows, stem
from secateur.errors import DataError
from secateur.files import read_json
from secateur.provenance import Fingerprint

ANCHOR_NAMES = (QUERY, ANCHOR)


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
        rows = tuple(self.rows[i] for i in Draw(count, seed).places(len(self.rows)))
        return replace(self, rows=rows, source=replace(self.source, rows=count))


@dataclass(frozen=True)
class Batch:
    """Examples of one data set whose positives and negatives serve all its anchors."""

    anchors: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str
    passage_prompt: str


def instruction_prompt(instruction: str) -> str:
    """The prompt of an instruction, in training, evaluation and use alike.

    It ends with a newline, where L3Prune has a blank (:func:`l3prune_prompt`). sentence-transformers finds where the
    text begins by tokenizing the prompt alone, and most tokenizers join a blank to the word after it: alone, the
    prompt would have one token more than before a text, and the first word of every text would not be pooled.
    """
    return f"{instruction.strip()};\n" if instruction.strip() else ""


def l3prune_prompt(prompt: str) -> str:
    """The same instruction in the paper's format, ``"<instruction>; "``; other prompts stay as they are."""
    ending = instruction_prompt("x").removeprefix("x")
    return f"{prompt.removesuffix(ending)}; " if prompt.endswith(ending) else prompt


def read_pairs(data: str | Path, *, instruction: str | None = None, columns: Mapping[str, str] | None = None) -> Pairs:
    """Read and check a data file, or a data set.

    Args:
        data: JSON Lines, CSV or Parquet; or ``hf:NAME:CONFIG[SPLIT]``.
        instruction: Goes before each anchor in place of the one in the file beside the data.
        columns: As for :func:`.open_table`.

    Raises:
        DataError: The data are missing or have no rows; or, with its line, a column is missing, a text is empty or is
            not a text.
    """
    return pairs_of(open_table(data, columns), instruction)


def pairs_of(table: Table, instruction: str | None = None, draw: Draw | None = None) -> Pairs:
    """The pairs of an opened file or data set, or those that are drawn; see :func:`read_pairs`."""
    beside = read_beside(table.path) if table.path else {}
    rows = tuple(read_rows(table, pair_of, draw))
    if not rows:
        raise DataError(table.place, "has no rows")
    source = table.fingerprint(len(rows))
    return Pairs(
        name=table.name,
        rows=rows,
        prompt=instruction_prompt(beside.get("query_instruction", "") if instruction is None else instruction),
        passage_prompt=instruction_prompt(beside.get("passage_instruction", "")),
        source=replace(source, licence=beside.get("licence", source.licence)),
    )


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


def pair_of(place: str, line: int, row: Mapping[str, Any]) -> Pair:
    """The pair of a row.

    Raises:
        DataError: A column is missing, or a text is empty or not a text.
    """
    anchor = next((name for name in ANCHOR_NAMES if name in row), QUERY)
    for field in (anchor, POSITIVE):
        if field not in row:
            needed = (
                f"each row needs {' or '.join(ANCHOR_NAMES)}, and positive; here are {', '.join(row)} (see --columns)"
            )
            raise DataError(place, "the column is missing", needed, line=line, field=field)
    return Pair(
        anchor=_text(place, line, anchor, row[anchor]),
        positive=_text(place, line, POSITIVE, row[POSITIVE]),
        negatives=_negatives(place, line, row.get(NEGATIVE)),
    )


def _negatives(place: str, line: int, value: Any) -> tuple[str, ...]:
    if value is None or (value == "" and place.endswith(".csv")):  # CSV has no other way to leave one out
        return ()
    texts = value if isinstance(value, list) else [value]
    return tuple(_text(place, line, NEGATIVE, text) for text in texts)


def _text(place: str, line: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(place, f"is {value!r:.60}, not a text", line=line, field=field)
    if not value.strip():
        raise DataError(place, "the text is empty", "leave the row out", line=line, field=field)
    return value


def read_beside(path: Path) -> Mapping[str, str]:
    """What the JSON file of the same name tells about the data; without one, what the E5 mix's own papers tell.

    Raises:
        DataError: It is broken, or a value is not a text.
    """
    file = path.with_name(stem(path) + ".json")
    if not file.is_file():
        return {"query_instruction": instruction_of(path)}
    content = read_json(file, strict=True)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not an object")
    known = {key: content[key] for key in ("query_instruction", "passage_instruction", "licence") if key in content}
    for key, value in known.items():
        if not isinstance(value, str):
            raise DataError(file, f"is a {type(value).__name__}, not a text", field=key)
    return known
