"""What ``steps.jsonl`` of a study tells: a JSON object a line, for each start and each end of a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from secateur.errors import DataError

JOURNAL = "steps.jsonl"
_OUTCOMES = ("started", "done", "failed")


def read_journal(run: Path) -> list[dict[str, Any]]:
    """The entries of a run's journal, oldest first; none where there is no journal.

    Raises:
        DataError: A line is broken; the last one may be, of a study that was killed or is writing it.
    """
    file = run / JOURNAL
    lines = whole_part(file.read_bytes()).splitlines() if file.is_file() else []
    return [_entry(file, number, line) for number, line in enumerate(lines, 1)]


def failures(run: Path) -> dict[str, str]:
    """Step → why it failed, of those that failed the last time they were tried.

    Raises:
        DataError: As :func:`read_journal`.
    """
    last = {entry["step"]: entry for entry in read_journal(run)}
    return {name: entry["error"] for name, entry in last.items() if entry["outcome"] == "failed"}


def whole_part(content: bytes) -> bytes:
    """A journal without the last line where that was torn."""
    whole = content[: content.rfind(b"\n") + 1]
    start = whole[:-1].rfind(b"\n") + 1
    return whole if _parsed(whole[start:]) is not None else whole[:start]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # of a byte that is no UTF-8, too
        return None


def _entry(file: Path, number: int, line: bytes) -> dict[str, Any]:
    entry = _parsed(line)
    if not isinstance(entry, dict) or entry.get("outcome") not in _OUTCOMES or not isinstance(entry.get("step"), str):
        raise DataError(file, "is no entry of a study's journal", "mend the line, or take it out", line=number)
    texts, seconds = {"error": str(entry.get("error", ""))}, entry.get("seconds")
    known = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    return entry | (texts if entry["outcome"] == "failed" else {}) | {"seconds": seconds if known else None}
