"""Training data: pairs or texts, from files, folders and data sets of the Hub (:mod:`.hub`), checked row by row.

A file has the columns ``query`` (or ``anchor``), ``positive`` and, where there are hard negatives, ``negative`` (a text
or a list of texts); or only ``text``. A JSON file of the same name beside it (``pairs.jsonl`` and ``pairs.json``) may
hold ``query_instruction``, ``passage_instruction`` and ``licence``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, cast

from secateur.data.hub import PREFIX, is_hub_name, load_set, parse_name
from secateur.data.rows import CHECKED_ROWS, PLAIN, TABLES, TEXT, Fields, Row, as_text, as_texts, parse_rows, read_rows
from secateur.errors import ConfigError, DataError
from secateur.files import read_json
from secateur.provenance import Fingerprint, sha256_of

ROLES = ("query", "anchor", "positive", "negative", TEXT)
"""The columns that mean something; ``query`` and ``anchor`` are two names of one."""
_PAIR: Fields = {"query": as_text, "positive": as_text, "negative": as_texts}
E5_MIX = Path(__file__).with_name("e5_mix.json")


@dataclass(frozen=True)
class Pair:
    """One example: an anchor, the text that belongs to it, and none or more that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.anchor, self.positive, *self.negatives)


@dataclass(frozen=True)
class _Rows:
    """The rows of one data set, in its order, and the prompts that go before their texts."""

    name: str
    rows: tuple[Any, ...]
    prompt: str
    passage_prompt: str
    source: Fingerprint

    def sample(self, count: int, seed: int) -> Self:
        """At most ``count`` rows, drawn by ``seed``, in the order of the file."""
        if count >= len(self.rows):
            return self
        rows = tuple(self.rows[i] for i in _places(len(self.rows), count, seed))
        return replace(self, rows=rows, source=replace(self.source, rows=count))


@dataclass(frozen=True)
class Texts(_Rows):
    """Texts; both prompts are the one that goes before each."""

    rows: tuple[str, ...]


@dataclass(frozen=True)
class Pairs(_Rows):
    """Pairs; ``prompt`` goes before each anchor, ``passage_prompt`` before positives and negatives."""

    rows: tuple[Pair, ...]

    @property
    def anchors(self) -> tuple[str, ...]:
        return tuple(row.anchor for row in self.rows)

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(row.positive for row in self.rows)

    @property
    def negatives(self) -> tuple[str, ...]:
        """Those of all rows, one after the other."""
        return tuple(text for row in self.rows for text in row.negatives)


Source = Pairs | Texts
Data = str | Path | Source | Sequence[str | Path | Source]


def _places(rows: int, count: int, seed: int) -> list[int]:
    """Which of the rows are drawn, in their order."""
    return sorted(random.Random(seed).sample(range(rows), count))  # noqa: S311 - not for secrets


def instruction_prompt(instruction: str) -> str:
    """The prompt of an instruction, in training, evaluation and use alike.

    It ends with a newline, where L3Prune has a blank: sentence-transformers tokenizes the prompt alone to find where a
    text begins, and most tokenizers join a blank to the first word, which then would not be pooled.
    """
    return f"{instruction.strip()};\n" if instruction.strip() else ""


def l3prune_prompt(prompt: str) -> str:
    """The same instruction as the paper has it, ``"<instruction>; "``; other prompts stay as they are."""
    return f"{prompt[:-1]} " if prompt.endswith(";\n") else prompt


def batches(pairs: Pairs, size: int) -> list[Pairs]:
    """Cut a data set into batches in its own order; a last one that is not full is left out, unless it is the only one.

    The loss depends on the size of a batch, so batches of two sizes must not be averaged.
    """
    size = min(size, len(pairs.rows))
    starts = range(0, len(pairs.rows) - size + 1, size)
    return [replace(pairs, rows=pairs.rows[start : start + size]) for start in starts]


# Reading --------------------------------------------------------------------------------------------------------------


def read_sources(
    data: Data,
    instruction: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
) -> list[Source]:
    """Read and check data: files, folders of them, names of data sets (:mod:`.hub`), or what was read already.

    Args:
        data: What to read.
        instruction: Goes before each anchor in place of those that come with the data, or before each text alone.
        columns: Role (:data:`ROLES`) → the column that has it here, where it is not called so.
        most: Draw about so many rows by ``seed``, evenly from the files, two of each at least. All are checked, and
            only these are held in memory.
        seed: See ``most``.

    Raises:
        ConfigError: There is no such role, or no such column.
        DataError: The data are missing or have no rows; or, with its line, a row is not right.
    """
    opened = [item if isinstance(item, Source) else _Table(item, columns) for item in _items(data)]
    there = [column for item in opened if isinstance(item, _Table) for column in item.there]
    for role, name in (columns or {}).items() if there else ():
        if role != "negative" and name not in there:  # else texts would be read where pairs are meant, or pairs as such
            told = ", ".join(dict.fromkeys(there))
            raise ConfigError("columns", name, f"no data file has the column {name} for {role}", f"here are {told}")
    share = sys.maxsize if most is None else max(2, most // max(1, len(opened)))
    return [
        item.sample(share, seed) if isinstance(item, Source) else item.read(instruction, share, seed) for item in opened
    ]


def read_pairs(data: str | Path, *, instruction: str | None = None, columns: Mapping[str, str] | None = None) -> Pairs:
    """Read and check one file or data set of pairs, as :func:`read_sources` does."""
    return cast("Pairs", _Table(data, columns, of_texts=False).read(instruction))


def read_texts(data: str | Path) -> Texts:
    """Read and check texts alone: plain text, one on each line, or a file or data set with the column ``text``."""
    return cast("Texts", _Table(data, None, of_texts=True).read(None))


def stream_texts(data: Data, columns: Mapping[str, str] | None = None) -> list[Iterator[str]]:
    """All texts of each file, one after the other: anchors, positives and negatives, or texts alone.

    A mistake is an error as of :func:`read_sources`, when the row is reached.
    """

    def stream(item: Path | Source) -> Iterator[str]:
        for row in item.rows if isinstance(item, Source) else _Table(item, columns):
            yield from row.texts if isinstance(row, Pair) else (row,)

    return [stream(item) for item in _items(data)]


def prompts_of(data: Data, columns: Mapping[str, str] | None = None) -> set[str]:
    """The prompts that come with the data; with texts alone, none do."""
    found = set()
    for item in _items(data):
        if isinstance(item, Source):
            found |= {item.prompt, item.passage_prompt}
        elif not is_hub_name(item) and not _Table(item, columns).of_texts:
            beside = read_beside(item)
            found |= {instruction_prompt(beside.get(f"{role}_instruction", "")) for role in ("query", "passage")}
    return found - {""}


def check_data(data: Data, columns: Mapping[str, str] | None = None) -> None:
    """Check the names, formats, columns and first rows of data, without PyTorch; of a data set of the Hub, the name.

    Raises:
        ConfigError, DataError: As :func:`read_sources` would, as far as :data:`.CHECKED_ROWS` rows tell.
    """
    for item in _items(data):
        if isinstance(item, Path) and is_hub_name(item):
            parse_name(item)
        elif isinstance(item, Path):
            table = _Table(item, columns)
            if not table.of_texts:
                read_beside(item)
            list(itertools.islice(table, CHECKED_ROWS))


def _items(data: Data) -> list[Path | Source]:
    items = [data] if isinstance(data, (str, Path, Source)) else data
    return [file for item in items for file in ([item] if isinstance(item, Source) else data_files(item))]


def data_files(path: str | Path) -> list[Path]:
    """A data file, or the name of a data set; of a folder, all data files in it, by name, but for hidden ones.

    Raises:
        DataError: A folder holds none.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    if files := sorted(file for file in folder.glob("[!.]*") if file.name.lower().endswith(TABLES)):
        return files
    hint = f"expected {', '.join(TABLES)}; a folder of the datasets library is named {PREFIX}{folder}"
    raise DataError(folder, "holds no data files", hint)


def stem(path: Path) -> str:
    """A data file's name without its suffix."""
    suffix = next((end for end in (*TABLES, *PLAIN) if path.name.lower().endswith(end)), path.suffix)
    return path.name[: len(path.name) - len(suffix)]


class _Table:
    """A data file, or a data set of the Hub, opened to be read row by row: texts or pairs, checked.

    ``of_texts``: whether its rows are texts alone; the first row tells, where nothing is said.
    """

    def __init__(self, data: str | Path, columns: Mapping[str, str] | None, of_texts: bool | None = None) -> None:
        columns = columns or {}
        if unknown := columns.keys() - ROLES:
            problem = f"{min(unknown)} is no role of a column"
            raise ConfigError("columns", min(unknown), problem, f"one of {', '.join(ROLES)}")
        if {"query", "anchor"} <= columns.keys():
            problem = "query and anchor are two words for one column"
            raise ConfigError("columns", dict(columns), problem, "map one of them")
        self.place, self.path = str(data), None if is_hub_name(data) else Path(data)
        self._plain = self.place.lower().endswith(PLAIN)
        self._names: dict[str, tuple[str, ...]] = {"query": ("query", "anchor")}
        if not self._plain:
            self._names |= {"query" if role == "anchor" else role: (name,) for role, name in columns.items()}
        if self.path is None:
            self._hub_name, data_set = load_set(data)
            self._set = data_set.select_columns(self._select(data_set.column_names))
        self.there = tuple(next(self._rows(), (0, {}))[1])
        has = self._roles(self.there)
        alone = TEXT in has and ("positive" not in has or TEXT in columns)
        self.of_texts = self._plain or alone if of_texts is None else of_texts

    def _roles(self, there: Collection[str]) -> dict[str, str]:
        """Of the columns, those that mean something, by role."""
        called = {role: self._names.get(role, (role,)) for role in (*_PAIR, TEXT)}
        return {role: name for role, names in called.items() for name in names if name in there}

    def _select(self, there: Sequence[str]) -> Sequence[str]:
        """The columns that mean something; all, where one is missing, for the error to name them."""
        found = self._roles(there)
        return list(found.values()) if TEXT in found or {"query", "positive"} <= found.keys() else there

    def _rows(self) -> Iterator[tuple[int, Row]]:
        rows = enumerate(self._set, 1) if self.path is None else read_rows(self.path, self._select)
        return ((line, row) for line, row in rows if not self._plain or row[TEXT].strip())

    def __iter__(self) -> Iterator[Any]:
        if self.of_texts:
            yield from (row[TEXT] for _, row in parse_rows(self.place, self._rows(), {TEXT: as_text}, self._names))
            return
        some = "negative" not in self._names
        needed = "each row needs query (or anchor) and positive, or text (see --columns); "
        rows = parse_rows(self.place, self._rows(), _PAIR, self._names, optional=("negative",), needed=needed)
        for _, row in rows:
            some = some or bool(row["negative"])
            yield Pair(row["query"], row["positive"], tuple(row["negative"]))
        if not some:
            raise DataError(self.place, "no row has a negative", field=self._names["negative"][0])

    def read(self, instruction: str | None, most: int = sys.maxsize, seed: int = 0) -> Source:
        """All rows, or so many of them, drawn by the seed: a file that has more is read twice, and held once."""
        kept = list(itertools.islice(rest := iter(self), most))
        if more := sum(1 for _ in rest):
            chosen = set(_places(most + more, most, seed))
            kept = [row for place, row in enumerate(self) if place in chosen]
            if len(kept) < most:
                raise DataError(self.place, "lost rows while it was read", "run the same command again")
        rows = tuple(kept)
        beside = {} if self.path is None or self.of_texts else read_beside(self.path)
        if self.path is None:
            name, source = self._hub_name.label, self._fingerprint_of_set(len(rows))
        else:
            name = self.path.name if self.of_texts else stem(self.path)
            source = Fingerprint(self.path.name, sha256_of(self.path), len(rows), beside.get("licence", ""))
        prompt = instruction_prompt(beside.get("query_instruction", "") if instruction is None else instruction)
        if self.of_texts:
            return Texts(name, rows, prompt, prompt, source)
        return Pairs(name, rows, prompt, instruction_prompt(beside.get("passage_instruction", "")), source)

    def _fingerprint_of_set(self, rows: int) -> Fingerprint:
        """Its name with the revision, and the hash of the rows as JSON."""
        digest = hashlib.sha256()
        for row in self._set:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return Fingerprint(str(self._hub_name), digest.hexdigest(), rows, str(self._set.info.license or ""))


def read_beside(path: Path) -> Mapping[str, str]:
    """What the JSON file of the same name tells about the data; without one, what the papers tell of the E5 mix.

    Raises:
        DataError: It is broken, or a value is not a text.
    """
    file = path.with_name(stem(path) + ".json")
    if not file.is_file():
        known = read_json(E5_MIX)["instructions"]
        of_mix = all((path.parent / f"{name}.jsonl").is_file() for name in known)
        return {"query_instruction": known.get(stem(path), "") if of_mix else ""}
    content = read_json(file, strict=True)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not an object")
    known = {key: content[key] for key in ("query_instruction", "passage_instruction", "licence") if key in content}
    for key, value in known.items():
        if not isinstance(value, str):
            raise DataError(file, f"is a {type(value).__name__}, not a text", field=key)
    return known
