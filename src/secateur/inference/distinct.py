"""The distinct texts of input files of any size, numbered by first occurrence: constant memory.

Before the model does anything, all texts are read and checked. Each distinct one is kept on disk (``texts.sqlite``),
and for each row the number of its text (``places.npy``). So a mistake in the last line is found at once, and an input
that changes later does not matter.
"""

from __future__ import annotations

import hashlib
import random
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHARD = 2048
"""Distinct texts that are encoded together, and what a killed run loses at most of each worker's work."""
SAMPLE, SAMPLE_CHARACTERS = 64, 2000
"""Texts that measurements are made on, and how much of each."""
DATABASE, PLACES = "texts.sqlite", "places.npy"
TABLES = """
PRAGMA journal_mode=OFF;
PRAGMA synchronous=OFF;
CREATE TABLE seen (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID;
CREATE TABLE texts (number INTEGER PRIMARY KEY, text BLOB);
"""


@dataclass(frozen=True)
class Inputs:
    """What was read: ``rows`` texts, ``distinct`` different ones of so many characters, and a hash over all."""

    rows: int
    distinct: int
    characters: int
    sha256: str


def number_texts(texts: Iterable[str], folder: Path) -> tuple[Inputs, list[str]]:
    """Read all texts into the files of a folder.

    Returns:
        What was read, and the first :data:`SAMPLE_CHARACTERS` of :data:`SAMPLE` distinct texts, each as likely to be
        among them as any other (reservoir sampling: Vitter 1985).
    """
    (folder / DATABASE).unlink(missing_ok=True)
    everything, rng = hashlib.sha256(), random.Random(0)  # noqa: S311
    rows = distinct = characters = 0
    sample: list[str] = []
    with (
        closing(sqlite3.connect(folder / DATABASE, isolation_level=None)) as database,
        (folder / PLACES).open("wb") as places,
    ):
        database.executescript(TABLES + "BEGIN;")
        for rows, text in enumerate(texts, start=1):  # noqa: B007
            content = text.encode()
            key = hashlib.blake2b(content, digest_size=16).digest()
            everything.update(key)
            number = distinct
            if database.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, number)).rowcount:
                database.execute("INSERT INTO texts VALUES (?, ?)", (number, content))
                distinct, characters = distinct + 1, characters + len(text)
                place = len(sample) if len(sample) < SAMPLE else rng.randrange(distinct)
                if place < SAMPLE:
                    sample[place : place + 1] = [text[:SAMPLE_CHARACTERS]]
            else:
                (number,) = database.execute("SELECT number FROM seen WHERE key = ?", (key,)).fetchone()
            places.write(number.to_bytes(8, "little"))
        database.execute("COMMIT")
    return Inputs(rows, distinct, characters, everything.hexdigest()), sample


def read_shards(folder: Path, numbers: Iterable[int]) -> Iterator[tuple[int, list[str]]]:
    """Number and texts of some shards of :data:`SHARD` distinct texts."""
    with closing(sqlite3.connect(folder / DATABASE)) as database:
        for number in numbers:
            query = "SELECT text FROM texts WHERE number >= ? AND number < ? ORDER BY number"
            found = database.execute(query, (number * SHARD, (number + 1) * SHARD))
            yield number, [content.decode() for (content,) in found]


def read_places(folder: Path) -> Iterator[NDArray[np.int64]]:
    """For each row the number of its text, :data:`SHARD` rows at a time: a mapped file would stay in memory."""
    with (folder / PLACES).open("rb") as stream:
        while len(numbers := np.fromfile(stream, dtype="<i8", count=SHARD)):
            yield numbers
