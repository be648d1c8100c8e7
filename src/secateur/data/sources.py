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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from secateur.data.hub import PREFIX, HubName, is_hub_name, load_set, parse_name
from secateur.data.rows import CHECKED_ROWS, PLAIN, TABLES, TEXT, Fields, Row, Select, as_text, parse_row, read_rows
from secateur.errors import ConfigError, DataError
from secateur.files import read_json
from secateur.provenance import Fingerprint, fingerprint

ROLES = ("query", "anchor", "positive", "negative", TEXT)
"""The columns that mean something; ``query`` and ``anchor`` are two names of one."""

T = TypeVar("T")
Reader = Callable[[], Iterator[tuple[int, Row]]]


@dataclass(frozen=True)
class Pair:
    """One example: an anchor, the text that belongs to it, and none or more that do not."""

    anchor: str
    positive: str
    negatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Texts:
    """Texts of one file, in its order. ``prompt`` goes before each."""

    name: str
    rows: tuple[str, ...]
    prompt: str
    source: Fingerprint

    def sample(self, count: int, seed: int) -> Texts:
        """At most ``count`` texts, drawn by ``seed``, in the order of the file."""
        return _sample(self, count, seed)


@dataclass(frozen=True)
class Pairs:
    """Pairs of one data set. ``prompt`` goes before each anchor, ``passage_prompt`` before positives and negatives."""

    name: str
    rows: tuple[Pair, ...]
    prompt: str
    passage_prompt: str
    source: Fingerprint

    def sample(self, count: int, seed: int) -> Pairs:
        """At most ``count`` rows, drawn by ``seed``, in the order of the file."""
        return _sample(self, count, seed)


@dataclass(frozen=True)
class Batch:
    """Examples of one data set whose positives and negatives serve all its anchors."""

    anchors: tuple[str, ...]
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    prompt: str
    passage_prompt: str


Source = Pairs | Texts
Data = str | Path | Source | Sequence[str | Path | Source]
S = TypeVar("S", Pairs, Texts)


def _sample(source: S, count: int, seed: int) -> S:
    if count >= len(source.rows):
        return source
    rows: Any = tuple(source.rows[i] for i in _places(len(source.rows), count, seed))
    return replace(source, rows=rows, source=replace(source.source, rows=count))


def _places(rows: int, count: int, seed: int) -> list[int]:
    """Which of the rows are drawn, in their order."""
    return sorted(random.Random(seed).sample(range(rows), count))  # noqa: S311 - not for secrets


def instruction_prompt(instruction: str) -> str:
    """The prompt of an instruction, in training, evaluation and use alike.

    It ends with a newline, where L3Prune has a blank (:func:`l3prune_prompt`). sentence-transformers finds where the
    text begins by tokenizing the prompt alone, and most tokenizers join a blank to the word after it: alone, the
    prompt would have one token more than before a text, and the first word of every text would not be pooled.
    """
    return f"{instruction.strip()};\n" if instruction.strip() else ""


def l3prune_prompt(prompt: str) -> str:
    """The same instruction in the paper's format, ``"<instruction>; "``; other prompts stay as they are."""
    return f"{prompt[:-1]} " if prompt.endswith(";\n") else prompt


def batches(pairs: Pairs, size: int) -> list[Batch]:
    """Cut a data set into batches in its own order; a last one that is not full is left out, unless it is the only one.

    The loss depends on the size of a batch, so batches of two sizes must not be averaged.
    """
    size = min(size, len(pairs.rows))
    cut = [pairs.rows[start : start + size] for start in range(0, len(pairs.rows) - size + 1, size)]
    return [
        Batch(
            anchors=tuple(row.anchor for row in rows),
            positives=tuple(row.positive for row in rows),
            negatives=tuple(text for row in rows for text in row.negatives),
            prompt=pairs.prompt,
            passage_prompt=pairs.passage_prompt,
        )
        for rows in cut
    ]


# Reading --------------------------------------------------------------------------------------------------------------


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
        most: Keep about so many rows, shared evenly by the files, two of each at least. All are checked, and only
            these are held in memory.
        seed: What they are drawn by.

    Raises:
        ConfigError: There is no such role.
        DataError: The data are missing or have no rows; or, with its line, a column is missing, a text is empty or is
            not a text.
    """
    items = _items(data)
    share = None if most is None else max(2, most // max(1, len(items)))
    read: list[Source] = []
    for item in items:
        if isinstance(item, Source):
            read.append(item if share is None else item.sample(share, seed))
        else:
            table = _open(item, columns)
            if table.has_texts_only:
                read.append(_read_texts(table, instruction_prompt(instruction or ""), share, seed))
            else:
                read.append(_read_pairs(table, instruction, share, seed))
    return read


def read_pairs(data: str | Path, *, instruction: str | None = None, columns: Mapping[str, str] | None = None) -> Pairs:
    """Read and check one file or data set of pairs, as :func:`read_sources` does."""
    return _read_pairs(_open(data, columns), instruction)


def read_texts(data: str | Path, prompt: str = "", *, columns: Mapping[str, str] | None = None) -> Texts:
    """Read and check texts alone: plain text, one on each line, or a file or data set with the column ``text``."""
    return _read_texts(_open(data, columns), prompt)


def check_data(data: Data, columns: Mapping[str, str] | None = None) -> None:
    """Check the names, formats, columns and first rows of data, quickly and without PyTorch.

    Of a data set of the Hub, only the name is checked.

    Raises:
        ConfigError, DataError: As :func:`read_sources` would, as far as this can be told from
            :data:`.CHECKED_ROWS` rows.
    """
    for item in _items(data):
        if isinstance(item, Source):
            continue
        if is_hub_name(item):
            parse_name(item)
            continue
        table = _open(item, columns)
        if not table.has_texts_only:
            _read_beside(table.path)
        parse = _text_of if table.has_texts_only else _pair_of
        rows = [parse(table.place, line, row) for line, row in itertools.islice(table.rows(), CHECKED_ROWS)]
        _check_any(table, rows)


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
    files = sorted(file for file in folder.iterdir() if file.name.lower().endswith(TABLES))
    if not files:
        hint = f"expected {', '.join(TABLES)}; a folder of the datasets library is named {PREFIX}{folder}"
        raise DataError(folder, "holds no data files", hint)
    return files


def stem(path: Path) -> str:
    """A data file's name without its suffix."""
    known = (suffix for suffix in (*TABLES, *PLAIN) if path.name.lower().endswith(suffix))
    return path.name[: -len(suffix)] if (suffix := next(known, "")) else path.stem


@dataclass(frozen=True)
class _Table:
    """Opened data: what errors call it, its name, its file (None for a data set of the Hub), and what reads it."""

    place: str
    name: str
    path: Path | None
    columns: Mapping[str, str]
    read: Reader
    fingerprint: Callable[[int], Fingerprint]
    has_texts_only: bool = False

    def rows(self) -> Iterator[tuple[int, Row]]:
        """The line of each row and its columns, those of ``columns`` under the names that they stand for.

        Raises:
            DataError: One of these is missing; the negative may be missing from some rows, but not from all.
        """
        there: Row = {}
        line, missing = 0, [column for role, column in self.columns.items() if role == "negative"]
        for line, there in self.read():
            named = {role: there[column] for role, column in self.columns.items() if column in there}
            lacking = [column for role, column in self.columns.items() if role not in {*named, "negative"}]
            if lacking:
                raise self._missing(lacking[0], there, line)
            missing = [] if "negative" in named else missing
            yield line, {**there, **named} if named else there
        if line and missing:
            raise self._missing(missing[0], there, line)

    def _missing(self, column: str, there: Row, line: int) -> DataError:
        return DataError(self.place, "the column is missing", f"it has {', '.join(there)}", line=line, field=column)


def _open(data: str | Path, columns: Mapping[str, str] | None) -> _Table:
    for role in columns or {}:
        if role not in ROLES:
            raise ConfigError("columns", role, f"{role} is no role of a column", f"one of {', '.join(ROLES)}")
    if columns and {"query", "anchor"} <= columns.keys():
        raise ConfigError("columns", dict(columns), "query and anchor are two words for one column", "map one of them")
    mapped = {"query" if role == "anchor" else role: column for role, column in (columns or {}).items()}
    if is_hub_name(data):
        name, loaded = load_set(data)
        read = partial(enumerate, loaded.select_columns(_select(mapped, loaded.column_names)), 1)
        table = _Table(str(data), name.label, None, mapped, read, partial(_hub_fingerprint, name, loaded, read))
    else:
        path = Path(data)
        plain = path.name.lower().endswith(PLAIN)
        reader: Reader = partial(_text_rows if plain else read_rows, path, partial(_select, mapped))
        read_rows(path)  # opens nothing, but refuses a file that is missing or of no known format
        table = _Table(str(path), stem(path), path, {} if plain else mapped, reader, partial(fingerprint, path), plain)
    first = next(table.rows(), None)
    of_texts = first is not None and TEXT in first[1] and "positive" not in first[1]
    return replace(table, has_texts_only=table.has_texts_only or of_texts)


def _text_rows(path: Path, select: Select) -> Iterator[tuple[int, Row]]:
    """The lines of plain text; blank ones are no texts."""
    return ((line, row) for line, row in read_rows(path, select) if row[TEXT].strip())


def _select(columns: Mapping[str, str], there: Sequence[str]) -> Sequence[str]:
    """The columns that mean something; all, where one is missing, for the error to name them."""
    has = {*there, *(role for role, column in columns.items() if column in there)}
    if not {*columns.values()} <= {*there} or not (TEXT in has or ("positive" in has and {"query", "anchor"} & has)):
        return there
    return [name for name in there if name in {*ROLES, *columns.values()}]


def _hub_fingerprint(name: HubName, loaded: Any, read: Reader, rows: int) -> Fingerprint:
    """The name with its revision, and the hash of the rows as JSON, wherever they are kept."""
    digest = hashlib.sha256()
    for _, row in read():
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return Fingerprint(str(name), digest.hexdigest(), rows, str(loaded.info.license or ""))


def _kept(table: _Table, parse: Callable[[str, int, Row], T], most: int | None, seed: int) -> tuple[T, ...]:
    """Check all rows, and keep at most so many, drawn by the seed; a file that has more is read twice."""
    kept: list[T] = []
    count = 0
    for count, (line, row) in enumerate(table.rows(), start=1):
        parsed = parse(table.place, line, row)
        if most is None or count <= most:
            kept.append(parsed)
    _check_any(table, kept)
    if most is not None and count > most:
        chosen = set(_places(count, most, seed))
        again = enumerate(table.rows())
        kept = [parse(table.place, line, row) for place, (line, row) in again if place in chosen]
        if len(kept) < most:
            raise DataError(table.place, "lost rows while it was read", "run the same command again")
    return tuple(kept)


def _check_any(table: _Table, rows: Sequence[object]) -> None:
    if not rows:
        raise DataError(table.place, "holds no text" if table.has_texts_only else "has no rows")


def _read_texts(table: _Table, prompt: str, most: int | None = None, seed: int = 0) -> Texts:
    rows = _kept(table, _text_of, most, seed)
    return Texts(table.path.name if table.path else table.name, rows, prompt, table.fingerprint(len(rows)))


def _text_of(place: str, line: int, row: Row) -> str:
    return str(parse_row(place, line, row, {TEXT: as_text})[TEXT])


def _read_pairs(table: _Table, instruction: str | None, most: int | None = None, seed: int = 0) -> Pairs:
    beside = _read_beside(table.path)
    rows = _kept(table, _pair_of, most, seed)
    source = table.fingerprint(len(rows))
    query = beside.get("query_instruction", "") if instruction is None else instruction
    passage = beside.get("passage_instruction", "")
    source = replace(source, licence=beside.get("licence", source.licence))
    return Pairs(table.name, rows, instruction_prompt(query), instruction_prompt(passage), source)


def _pair_of(place: str, line: int, row: Row) -> Pair:
    if row.get("negative") == "" and place.lower().endswith(".csv"):  # CSV has no other way to leave one out
        row = {**row, "negative": None}
    anchor = "anchor" if "anchor" in row and "query" not in row else "query"
    fields: Fields = {anchor: as_text, "positive": as_text, "negative": _as_negatives}
    hint = "each row needs query or anchor, and positive (see --columns); "
    found = parse_row(place, line, row, fields, optional=("negative",), needed=hint)
    return Pair(found[anchor], found["positive"], found["negative"])


def _as_negatives(value: Any) -> tuple[str, ...]:
    return () if value is None else tuple(map(as_text, value if isinstance(value, list) else [value]))


def _read_beside(path: Path | None) -> Mapping[str, str]:
    """What the JSON file of the same name tells about the data; without one, what the papers tell of the E5 mix.

    Raises:
        DataError: It is broken, or a value is not a text.
    """
    if path is None:
        return {}
    file = path.with_name(stem(path) + ".json")
    if not file.is_file():
        return {"query_instruction": _e5_instruction(path)}
    content = read_json(file, strict=True)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}, not an object")
    known = {key: content[key] for key in ("query_instruction", "passage_instruction", "licence") if key in content}
    for key, value in known.items():
        if not isinstance(value, str):
            raise DataError(file, f"is a {type(value).__name__}, not a text", field=key)
    return known


def _e5_instruction(file: Path) -> str:
    """The instruction of a file of the E5 mix; empty for one that does not stand among all 14."""
    if file.name.removesuffix(".jsonl") not in E5_INSTRUCTIONS or not file.name.endswith(".jsonl"):
        return ""
    complete = all((file.parent / f"{name}.jsonl").is_file() for name in E5_INSTRUCTIONS)
    return E5_INSTRUCTIONS[file.name.removesuffix(".jsonl")] if complete else ""


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
"""The public E5 mix as curated for Echo embeddings (arXiv 2402.15449), on which L3Prune trains: 14 files in a folder,
by their names without ``.jsonl``. The instructions are in the papers only (Wang et al. 2024, arXiv 2401.00368, table
13; LLM2Vec, arXiv 2404.05961, table 8); where those give two for one set, the first is used for all its rows."""
