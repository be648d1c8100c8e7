"""Rows of the data that are held out of a training, as retrieval tasks that judge it: one task folder for each file.

Of pairs, the queries are anchors, and the documents are positives and negatives. Rows that share an anchor or a
positive are held out together or not at all, and of their negatives those are documents that no other row has: so no
row is lost to the training besides. Of texts alone, each is a query and a document; relevant to it are the ten that a
teacher finds nearest, the nearest most.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from secateur.data.rows import PLAIN, TABLES
from secateur.data.sources import Pair, Pairs, Source, Texts
from secateur.errors import ConfigError, DataError
from secateur.evaluation.task_making import write_retrieval
from secateur.files import new_folder
from secateur.healing.teacher import Teacher, keep_vectors
from secateur.progress import Progress, silent

SHARE = 10
"""At most one row in so many of a file is held out."""
FEWEST, FEWEST_IN_ALL = 10, 20
"""Queries of a file, and of all files together, below which a score would say nothing."""
NEIGHBOURS = 10

Judgments = Mapping[str, Mapping[str, int]]
"""Query → document → how relevant it is, all by their texts."""


def judge_of(sources: Sequence[Source]) -> str:
    """``pairs`` where there are any, else ``texts``."""
    return "pairs" if any(isinstance(source, Pairs) for source in sources) else "texts"


def folder_name(source: Source) -> str:
    """What the task of a data file is called."""
    stem = next((source.name[: -len(end)] for end in (*TABLES, *PLAIN) if source.name.endswith(end)), source.name)
    return f"{stem.lstrip('.')}-held-out"


def left_whole(sources: Sequence[Source], names: Collection[str]) -> list[str]:
    """Notes on files of which nothing was held out: all but those whose tasks have these names."""
    own = [source for source in sources if isinstance(source, Pairs) or judge_of(sources) == "texts"]
    files = [source.source.name for source in own if folder_name(source) not in names]
    return [f"{file}: none of its rows is held out, too few share no text with others" for file in files]


def hold_out(
    sources: Sequence[Source],
    count: int,
    seed: int,
    folder: Path,
    teacher: Teacher | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
) -> None:
    """Write the task folders of held-out rows into a new folder, which is there when it is whole.

    Args:
        sources: The data. Where there are pairs, texts alone hold nothing out.
        count: Rows in all, shared evenly by the files; at most a tenth of each.
        seed: What they are drawn by.
        folder: To be made.
        teacher: Who says what texts are near each other, where there are no pairs.
        cache: Folder of the teacher's vectors.
        progress: Called while the teacher encodes.

    Raises:
        ConfigError: Texts alone, and no teacher.
        DataError: Too few rows can be held out; or two files have one name.
        OutputError: ``folder`` cannot be written.
    """
    if judge_of(sources) == "texts" and (teacher is None or cache is None):
        hint = "name one with --teacher (self: the model as it came), or tasks with --tasks"
        raise ConfigError("teacher", None, "texts alone have no answers to find, and there is no teacher", hint)
    drawn = draw(sources, count, seed)
    known = {text for source, rows in drawn for text in _texts(source, rows)}
    with new_folder(folder) as partial:
        for source, rows in drawn:
            if rows and isinstance(source, Pairs):
                held = [row for row in source.rows if row in rows]
                others = {text for row in held for text in row.negatives} - known
                _write(partial / folder_name(source), source, _relevant(held), others)
            elif rows and teacher is not None and cache is not None:
                texts = [str(text) for text in dict.fromkeys(source.rows) if text in rows]
                judgments = _nearest(texts, source.prompt, teacher, cache, progress)
                _write(partial / folder_name(source), source, judgments, set())


Rows = frozenset[Pair] | frozenset[str]


def draw(sources: Sequence[Source], count: int, seed: int) -> list[tuple[Source, Rows]]:
    """The rows of each file to hold out; arguments and errors as for :func:`hold_out`."""
    kind = Pairs if judge_of(sources) == "pairs" else Texts
    own = [source for source in sources if isinstance(source, kind)]
    names = [folder_name(source) for source in own]
    if twice := [source.name for source, name in zip(own, names, strict=True) if names.count(name) > 1]:
        raise DataError(twice[0], "two data files have this name, and so would their tasks", "rename one")
    share = count // len(own)
    drawn = [_draw(source, min(share, len(source.rows) // SHARE), seed) for source in own]
    drawn = [rows if _queries(rows) >= FEWEST else frozenset() for rows in drawn]
    found = sum(map(_queries, drawn))
    if found < FEWEST_IN_ALL:
        each = f"at most a tenth of each file, and none of a file with fewer than {FEWEST} in it"
        problem = f"{found} queries can be held out to score the depths ({each})"
        raise DataError("data", problem, "name tasks with --tasks, give more rows, or raise --held-out")
    return list(zip(own, drawn, strict=True))


def _draw(source: Source, most: int, seed: int) -> Rows:
    """Rows to hold out, in whole groups that share a text."""
    rng = random.Random(f"{seed} {source.name}")  # noqa: S311 - not for secrets
    if isinstance(source, Texts):
        texts = list(dict.fromkeys(source.rows))
        return frozenset(rng.sample(texts, min(most, len(texts))))
    groups = _groups(source.rows)
    rng.shuffle(groups)
    taken: list[Pair] = []
    for group in groups:
        if len(taken) + len(group) <= most:
            taken += group
    return frozenset(taken)


def _groups(rows: Sequence[Pair]) -> list[list[Pair]]:
    """Rows that are joined by a common anchor or positive, over any number of others, in the order of their first."""
    leader: dict[str, str] = {}

    def find(text: str) -> str:
        path = [text]
        while (above := leader.setdefault(path[-1], path[-1])) != path[-1]:
            path.append(above)
        leader.update(dict.fromkeys(path, path[-1]))
        return path[-1]

    for row in rows:
        leader[find(row.positive)] = find(row.anchor)
    groups: dict[str, list[Pair]] = {}
    for row in rows:
        groups.setdefault(find(row.anchor), []).append(row)
    return list(groups.values())


def _queries(rows: Rows) -> int:
    pairs = [row for row in rows if isinstance(row, Pair)]
    return len(_relevant(pairs)) if pairs else len(rows)


def _texts(source: Source, held: Rows) -> set[str]:
    """All texts of the rows that are not held out."""
    if isinstance(source, Texts):
        return set(source.rows) - {row for row in held if isinstance(row, str)}
    left = (row for row in source.rows if row not in held)
    return {text for row in left for text in (row.anchor, row.positive, *row.negatives)}


def _relevant(rows: Sequence[Pair]) -> Judgments:
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.anchor != row.positive:  # a text is no answer to itself
            found.setdefault(row.anchor, {})[row.positive] = 1
    return found


def _nearest(texts: Sequence[str], prompt: str, teacher: Teacher, cache: Path, progress: Progress) -> Judgments:
    """For each text the ten others of the largest cosine between the teacher's vectors, graded from 10 down to 1."""
    kept = keep_vectors(teacher, {prompt: texts}, cache, progress)
    vectors = kept.read(kept.rows(texts, teacher.context(prompt))).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found: dict[str, dict[str, int]] = {}
    for place, text in enumerate(texts):
        cosines = vectors @ vectors[place]
        cosines[place] = -np.inf
        nearest = np.argsort(-cosines, kind="stable")[: min(NEIGHBOURS, len(texts) - 1)]
        found[text] = {texts[other]: NEIGHBOURS - rank for rank, other in enumerate(nearest)}
    return found


def _write(folder: Path, source: Source, judgments: Judgments, others: set[str]) -> None:
    """A retrieval task. A text that is query and document has one id, by which it is no answer to itself."""
    documents = dict.fromkeys(text for own in judgments.values() for text in own) | dict.fromkeys(sorted(others))
    ids = {text: f"t{number}" for number, text in enumerate(dict.fromkeys([*judgments, *documents]))}
    what = "anchors, among positives and negatives" if isinstance(source, Pairs) else "the teacher's nearest texts"
    about = {
        "name": folder.name,
        "type": "retrieval",
        "metric": "ndcg_at_10",
        "instruction": source.prompt.rstrip().removesuffix(";"),
        "licence": source.source.licence,
        "ignore_identical_ids": True,
        "notes": f"Rows of {source.source.name} that are not trained on: {what}.",
    }
    rows = ((ids[query], ids[text], grade) for query, own in judgments.items() for text, grade in own.items())
    queries, corpus = ({ids[text]: text for text in texts} for texts in (judgments, documents))
    write_retrieval(folder, about, queries, corpus, rows)
