"""Texts without labels, from files: what a profile can be measured on where there are no pairs."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.data.jsonl import read_json_lines
from secateur.errors import DataError
from secateur.provenance import Fingerprint, fingerprint

LINES = (".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Texts:
    """Texts of one file, in its order. ``prompt`` goes before each."""

    name: str
    rows: tuple[str, ...]
    prompt: str
    source: Fingerprint

    def sample(self, count: int, seed: int) -> Texts:
        """At most ``count`` texts, drawn by ``seed``, in the order of the file."""
        if count >= len(self.rows):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.rows)), count))  # noqa: S311 - not for secrets
        return replace(self, rows=tuple(self.rows[i] for i in chosen), source=replace(self.source, rows=count))


def holds_texts(file: str | Path) -> bool:
    """Whether a file holds texts and no pairs: ``.txt``, or JSON Lines whose first row has ``text`` and no positive."""
    path = Path(file)
    if path.suffix == ".txt":
        return True
    if not path.name.endswith(LINES) or not path.is_file():
        return False
    return any("text" in row and "positive" not in row for _, row in itertools.islice(read_json_lines(path), 1))


def read_texts(file: str | Path, prompt: str = "") -> Texts:
    """Read and check a file of texts: ``.txt``, one on each line, or JSON Lines with the field ``text``.

    Blank lines of a ``.txt`` are no texts.

    Raises:
        DataError: The file is missing or has no texts; or, with its line, one is empty or not a text.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(path, "no such file")
    rows = tuple(_lines(path) if path.suffix == ".txt" else _fields(path))
    if not rows:
        raise DataError(path, "holds no text")
    return Texts(path.name, rows, prompt, fingerprint(path, len(rows)))


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(path, f"cannot be read ({error})", "save the file as UTF-8") from None
    return [line for line in content.split("\n") if line.strip()]


def _fields(path: Path) -> list[str]:
    texts = []
    for line, row in read_json_lines(path):
        text = row.get("text")
        if not isinstance(text, str):
            problem = f"is a {type(text).__name__}, not a text" if "text" in row else "the field is missing"
            raise DataError(path, problem, line=line, field="text")
        if not text.strip():
            raise DataError(path, "the text is empty", "leave the row out", line=line, field="text")
        texts.append(text)
    return texts
