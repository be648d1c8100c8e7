"""Training data: pairs or texts, from files, folders and data sets of the Hub, checked row by row.

A file has the columns ``query`` (or ``anchor``), ``positive`` and, where there are hard negatives, ``negative`` (a text
or a list of texts); or only ``text``. A JSON file of the same name beside it (``pairs.jsonl`` and ``pairs.json``) may
hold ``query_instruction``, ``passage_instruction`` and ``licence``. A data set (:mod:`.hub`) has the same columns.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

from secateur.data.hub import PREFIX, is_hub_name, load_set, parse_name
from secateur.data.rows import CELLS, CHECKED_ROWS, PLAIN, TABLES, TEXT, Fields, Row, as_text, parse_row, read_rows
from secateur.errors import ConfigError, DataError
from secateur.files import read_json
from secateur.provenance import Fingerprint, fingerprint

ROLES = ("query", "anchor", "positive", "negative", TEXT)
"""The columns that mean something; ``query`` and ``anchor`` are two names of one."""


@dataclass(frozen=True)
class Pair:
    """One example: an anchor, the text that belongs to it, and none or more that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.anchor, self.positive, *self.negatives)


class _Rows:
    """What texts and pairs have in common."""

    rows: tuple[Any, ...]
    source: Fingerprint

    def sample(self: S, count: int, seed: int) -> S:
        """At most ``count`` rows, drawn by ``seed``, in the order of the file."""
        if count >= len(self.rows):
            return self
        rows = tuple(self.rows[i] for i in _places(len(self.rows), count, seed))
        return replace(self, rows=rows, source=replace(self.source, rows=count))  # type: ignore[type-var]


@dataclass(frozen=True)
class Texts(_Rows):
    """Texts of one file, in its order. ``prompt`` goes before each."""

    name: str
    rows: tuple[str, ...]
    prompt: str
    source: Fingerprint

    @property
    def passage_prompt(self) -> str:
        return self.prompt


@dataclass(frozen=True)
class Pairs(_Rows):
    """Pairs of one data set. ``prompt`` goes before each anchor, ``passage_prompt`` before positives and negatives."""

    name: str
    rows: tuple[Pair, ...]
    prompt: str
    passage_prompt: str
    source: Fingerprint

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
S = TypeVar("S", bound=_Rows)


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


def read_sources(
    data: Data,
    instruction: str | None = None,
    columns: Mapping[str, str] | None = None,
    *,
    most: int | None = None,
    seed: int = 0,
) -> list[Source]:
    """Read and check data.

    Args:
        data: Files, folders of them, names of data sets (:mod:`.hub`), or what was read already.
        instruction: Goes before each anchor in place of those that come with the data, or before each text alone.
        columns: Role (:data:`ROLES`) → the column that has it here, where it is not called so.
        most: Draw about so many rows by ``seed``, evenly from the files, two of each at least. All are checked, and
            only these are held in memory.
        seed: See ``most``.

    Raises:
        ConfigError: There is no such role.
        DataError: The data are missing or have no rows; or, with its line, a column is missing, a text is empty or is
            not a text.
    """
    items = _items(data)
    share = sys.maxsize if most is None else max(2, most // max(1, len(items)))
    return [
        item.sample(share, seed) if isinstance(item, Source) else _Table(item, columns).read(instruction, share, seed)
        for item in items
    ]


def read_pairs(data: str | Path, *, instruction: str | None = None, columns: Mapping[str, str] | None = None) -> Pairs:
    """Read and check one file or data set of pairs, as :func:`read_sources` does."""
    return cast("Pairs", _Table(data, columns, of_texts=False).read(instruction))


def read_texts(data: str | Path, prompt: str = "", *, columns: Mapping[str, str] | None = None) -> Texts:
    """Read and check texts alone: plain text, one on each line, or a file or data set with the column ``text``."""
    return replace(cast("Texts", _Table(data, columns, of_texts=True).read(None)), prompt=prompt)


def stream_texts(data: Data, columns: Mapping[str, str] | None = None) -> list[Iterator[str]]:
    """All texts of each file, one after the other: anchors, positives and negatives, or texts alone.

    Raises:
        ConfigError, DataError: As :func:`read_sources`, when the row is reached.
    """

    def stream(item: Path | Source) -> Iterator[str]:
        for row in item.rows if isinstance(item, Source) else _Table(item, columns).parsed():
            yield from row.texts if isinstance(row, Pair) else (row,)

    return [stream(item) for item in _items(data)]


def prompts_of(data: Data) -> set[str]:
    """The prompts that come with the data."""
    found = set()
    for item in _items(data):
        if isinstance(item, Source):
            found |= {item.prompt, item.passage_prompt}
        elif not is_hub_name(item):
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
            list(itertools.islice(table.parsed(), CHECKED_ROWS))


def _items(data: Data) -> list[Path | Source]:
    items = [data] if isinstance(data, (str, Path, Source)) else data
    return [file for item in items for file in ([item] if isinstance(item, Source) else data_files(item))]


def data_files(path: str | Path) -> list[Path]:
    """A data file, or the name of a data set; of a folder, all data files in it, by name.

    Raises:
        DataError: A folder holds none.
    """
    folder = Path(path)
    if not folder.is_dir():
        return [folder]
    if files := sorted(file for file in folder.iterdir() if file.name.lower().endswith(TABLES)):
        return files
    hint = f"expected {', '.join(TABLES)}; a folder of the datasets library is named {PREFIX}{folder}"
    raise DataError(folder, "holds no data files", hint)


def stem(path: Path) -> str:
    """A data file's name without its suffix."""
    suffix = next((end for end in (*TABLES, *PLAIN) if path.name.lower().endswith(end)), path.suffix)
    return path.name[: len(path.name) - len(suffix)]


class _Table:
    """A data file, or a data set of the Hub, opened to be read row by row.

    Attributes:
        path: The file; None for a data set of the Hub.
        of_texts: Whether its rows are texts alone, and no pairs; the first row tells, where nothing is said.
    """

    def __init__(self, data: str | Path, columns: Mapping[str, str] | None, of_texts: bool | None = None) -> None:
        for role in [role for role in columns or {} if role not in ROLES]:
            raise ConfigError("columns", role, f"{role} is no role of a column", f"one of {', '.join(ROLES)}")
        if columns and {"query", "anchor"} <= columns.keys():
            problem = "query and anchor are two words for one column"
            raise ConfigError("columns", dict(columns), problem, "map one of them")
        self.place = str(data)
        self.path = None if is_hub_name(data) else Path(data)
        self._plain = self.place.lower().endswith(PLAIN)
        mapped = {} if self._plain or columns is None else columns
        self._columns = {"query" if role == "anchor" else role: column for role, column in mapped.items()}
        if self.path is None:
            self._hub_name, data_set = load_set(data)
            self._set = data_set.select_columns(self._select(data_set.column_names))
            self.name = self._hub_name.label
        else:
            self.name = stem(self.path)
        first = next(self.rows(), (0, {}))[1]
        self.of_texts = self._plain or (TEXT in first and "positive" not in first) if of_texts is None else of_texts

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The line of each row and its columns, the mapped ones under the names that they stand for.

        Raises:
            DataError: A mapped column is missing; the negative may be missing from some rows, but not from all.
        """
        there: Row = {}
        line, unseen = 0, self._columns.get("negative")

        def missing(column: str) -> DataError:
            return DataError(self.place, "the column is missing", f"it has {', '.join(there)}", line=line, field=column)

        for line, there in enumerate(self._set, 1) if self.path is None else read_rows(self.path, self._select):
            if self._plain and not there[TEXT].strip():
                continue
            for role, column in self._columns.items():
                if column not in there and role != "negative":
                    raise missing(column)
            unseen = None if unseen in there else unseen
            yield line, {**there, **{role: there[column] for role, column in self._columns.items() if column in there}}
        if line and unseen:
            raise missing(unseen)

    def _select(self, there: Sequence[str]) -> Sequence[str]:
        """The columns that mean something; all, where one is missing, for the error to name them."""
        mapped = {*self._columns.values()}
        has = {*there, *(role for role, column in self._columns.items() if column in there)}
        enough = TEXT in has or ("positive" in has and not has.isdisjoint({"query", "anchor"}))
        return [name for name in there if name in {*ROLES, *mapped}] if enough and mapped <= {*there} else there

    def parsed(self) -> Iterator[Any]:
        """The rows, checked: texts or pairs. There must be one."""
        row = None
        for line, row in self.rows():
            yield parse_row(self.place, line, row, {TEXT: as_text})[TEXT] if self.of_texts else self._pair_of(line, row)
        if row is None:
            raise DataError(self.place, "holds no text" if self.of_texts else "has no rows")

    def read(self, instruction: str | None, most: int = sys.maxsize, seed: int = 0) -> Source:
        """All rows, or so many of them, drawn by the seed: a file that has more is read twice, and held once."""
        kept = list(itertools.islice(parsed := self.parsed(), most))
        if more := sum(1 for _ in parsed):
            chosen = set(_places(most + more, most, seed))
            kept = [row for place, row in enumerate(self.parsed()) if place in chosen]
            if len(kept) < most:
                raise DataError(self.place, "lost rows while it was read", "run the same command again")
        rows, source = tuple(kept), self._fingerprint(len(kept))
        if self.of_texts:
            name = self.path.name if self.path else self.name
            return Texts(name, rows, instruction_prompt(instruction or ""), source)
        beside = {} if self.path is None else read_beside(self.path)
        query = beside.get("query_instruction", "") if instruction is None else instruction
        prompt, passage = map(instruction_prompt, (query, beside.get("passage_instruction", "")))
        return Pairs(self.name, rows, prompt, passage, replace(source, licence=beside.get("licence", source.licence)))

    def _pair_of(self, line: int, row: Row) -> Pair:
        if row.get("negative") == "" and self.place.lower().endswith(CELLS):  # CSV has no other way to leave one out
            row = {**row, "negative": None}
        anchor = "anchor" if "anchor" in row and "query" not in row else "query"
        fields: Fields = {anchor: as_text, "positive": as_text, "negative": _as_negatives}
        needed = "each row needs query or anchor, and positive (see --columns); "
        found = parse_row(self.place, line, row, fields, optional=("negative",), needed=needed)
        return Pair(*found.values())

    def _fingerprint(self, rows: int) -> Fingerprint:
        """Of a file's bytes; of a data set, its name with the revision, and the hash of the rows as JSON."""
        if self.path is not None:
            return fingerprint(self.path, rows)
        digest = hashlib.sha256()
        for row in self._set:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return Fingerprint(str(self._hub_name), digest.hexdigest(), rows, str(self._set.info.license or ""))


def _as_negatives(value: Any) -> tuple[str, ...]:
    return () if value is None else tuple(map(as_text, value if isinstance(value, list) else [value]))


def read_beside(path: Path) -> Mapping[str, str]:
    """What the JSON file of the same name tells about the data; without one, what the papers tell of the E5 mix.

    Raises:
        DataError: It is broken, or a value is not a text.
    """
    file = path.with_name(stem(path) + ".json")
    if not file.is_file():
        of_mix = all((path.parent / f"{name}.jsonl").is_file() for name in E5_INSTRUCTIONS)
        return {"query_instruction": E5_INSTRUCTIONS.get(path.name.removesuffix(".jsonl"), "") if of_mix else ""}
    content = read_json(file, strict=True)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not an object")
    known = {key: content[key] for key in ("query_instruction", "passage_instruction", "licence") if key in content}
    for key, value in known.items():
        if not isinstance(value, str):
            raise DataError(file, f"is a {type(value).__name__}, not a text", field=key)
    return known


_WIKIPEDIA = "Given a question, retrieve Wikipedia passages that answer the question"
_CHINESE = "Given a Chinese search query, retrieve web passages that answer the question"
E5_INSTRUCTIONS = {
    "allnli": "Given a premise, retrieve a hypothesis that is entailed by the premise",
    "dureader": _CHINESE,
    "eli5_question_answer": "Provided a user question, retrieve the highest voted answers on Reddit ELI5 forum",
    "fever": "Given a claim, retrieve documents that support or refute the claim",
    "hotpot_qa": "Given a multi-hop question, retrieve documents that can help answer the question",
    "miracl": _WIKIPEDIA,
    "mrtydi": _WIKIPEDIA,
    "msmarco_passage": "Given a web search query, retrieve relevant passages that answer the query",
    "msmarco_document": "Given a web search query, retrieve relevant documents that answer the query",
    "nq": _WIKIPEDIA,
    "quora_duplicates": "Given a question, retrieve questions that are semantically equivalent to the given question",
    "squad": "Retrieve Wikipedia passages that answer the question",
    "t2ranking": _CHINESE,
    "trivia_qa": "Retrieve Wikipedia passages that answer the question",
}
"""The public E5 mix as curated for Echo embeddings (arXiv 2402.15449), on which L3Prune trains, by the names of its 14
files. The instructions are in the papers only (Wang et al. 2024, arXiv 2401.00368, table 13; LLM2Vec, arXiv 2404.05961,
table 8); where those give two for one set, the first is used for all its rows."""
