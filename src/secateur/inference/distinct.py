"""The distinct texts of files of any size, numbered by first occurrence, and in shards: constant memory.

The inputs are read twice. The first time each text is checked, counted and given the number of its first occurrence
(``places.npy``), and each shard of distinct texts a hash (``digests``); so a mistake in the last line is found before
the model has done anything, and an input that changes later is found out.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from secateur.errors import DataError

SHARD = 2048
"""Distinct texts that are encoded together, and what a killed run loses at most of each worker's work."""
SAMPLE, SAMPLE_CHARACTERS = 64, 200
"""Texts that measurements are made on, and how much of each: rounding shows where texts are short."""
PLACES, DIGESTS = "places.npy", "digests"
DIGEST = 16
"""Bytes of a hash."""

Texts = Callable[[], Iterator[str]]
"""The texts of the input, read anew each time it is called."""


@dataclass(frozen=True)
class Inputs:
    """What was read: ``rows`` texts, ``distinct`` different ones of so many characters, and a hash over all."""

    rows: int
    distinct: int
    characters: int
    sha256: str


def number_texts(texts: Texts, folder: Path) -> tuple[Inputs, list[str]]:
    """Read all texts once; write for each row the number of its text, counted by first occurrence, and for each shard
    a hash of its texts.

    Which texts have been seen is kept on disk, so that any number of them takes the same memory.

    Returns:
        What was read, and the first :data:`SAMPLE_CHARACTERS` of :data:`SAMPLE` distinct texts, each as likely to be
        among them as any other (reservoir sampling: Vitter 1985).
    """
    seen = folder / "seen.sqlite"
    everything, shard = hashlib.sha256(), hashlib.blake2b(digest_size=DIGEST)
    rows = distinct = characters = 0
    sample: list[str] = []
    rng = random.Random(0)  # noqa: S311
    seen.unlink(missing_ok=True)
    with (
        closing(sqlite3.connect(seen, isolation_level=None)) as index,
        (folder / PLACES).open("wb") as places,
        (folder / DIGESTS).open("wb") as digests,
    ):
        for line in ("PRAGMA journal_mode=OFF", "PRAGMA synchronous=OFF"):
            index.execute(line)
        index.execute("CREATE TABLE seen (key BLOB PRIMARY KEY, number INTEGER) WITHOUT ROWID")
        index.execute("BEGIN")
        for rows, text in enumerate(texts(), start=1):  # noqa: B007
            key = _hash(text)
            everything.update(key)
            if index.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, distinct)).rowcount:
                number, distinct, characters = distinct, distinct + 1, characters + len(text)
                place = len(sample) if len(sample) < SAMPLE else rng.randrange(distinct)
                if place < SAMPLE:
                    sample[place : place + 1] = [text[:SAMPLE_CHARACTERS]]
                shard.update(key)
                if distinct % SHARD == 0:
                    digests.write(shard.digest())
                    shard = hashlib.blake2b(digest_size=DIGEST)
            else:
                (number,) = index.execute("SELECT number FROM seen WHERE key = ?", (key,)).fetchone()
            places.write(number.to_bytes(8, "little"))
        if distinct % SHARD:
            digests.write(shard.digest())
    seen.unlink()
    return Inputs(rows, distinct, characters, everything.hexdigest()), sample


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=DIGEST).digest()


def places_of(folder: Path) -> Iterator[NDArray[np.int64]]:
    """For each row the number of its text, :data:`SHARD` rows at a time: a mapped file would stay in memory."""
    with (folder / PLACES).open("rb") as stream:
        while len(numbers := np.fromfile(stream, dtype="<i8", count=SHARD)):
            yield numbers


def pieces(texts: Texts, folder: Path, todo: set[int]) -> Iterator[tuple[int, list[str]]]:
    """The distinct texts of each shard in ``todo``, in order; what has changed meanwhile becomes no vectors."""

    def distinct() -> Iterator[str]:
        found = 0
        for text, number in zip(texts(), itertools.chain.from_iterable(places_of(folder)), strict=False):
            if number == found:
                found += 1
                yield text

    in_order = distinct()
    digests = (folder / DIGESTS).read_bytes()
    for shard in range(len(digests) // DIGEST):
        piece = list(itertools.islice(in_order, SHARD))
        if shard not in todo:
            continue
        found = hashlib.blake2b(b"".join(map(_hash, piece)), digest_size=DIGEST).digest()
        if found != digests[shard * DIGEST : (shard + 1) * DIGEST]:
            raise DataError("the input", "changed while it was read", "run again when nothing writes to it")
        yield shard, piece
