"""The folder that a training works in: held by one run, and taken up again by an equal one alone.

A note in it says what the training follows from. Models and data are known by their content, wherever they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError, OutputError
from secateur.files import empty_folder, lock, partial_folder, read_json, write_text
from secateur.healing import processes

NOTE = "training.json"

_WORDS = {
    "weights": "the model is another",
    "sha256": "the data are others",
    "prompts": "what stands before the texts",
    "eval_data": "the held-out data",
    "eval_tasks": "the tasks on the way",
    "teacher_fingerprint": "the teacher is another",
}
"""What differs, where a value would not tell it."""


@contextmanager
def only_run(out: Path) -> Iterator[Path]:
    """Within: no other run trains for ``out``. Yields the folder to work in, which the first process holds for all.

    Raises:
        OutputError: Another run does, or has just finished.
    """
    partial = partial_folder(out)
    processes.wait()  # or a late one would find what the first one wrote
    if not processes.is_first():
        yield partial
        return
    partial.mkdir(parents=True, exist_ok=True)
    with lock(partial):
        try:
            partial_folder(out)
        except OutputError:
            with suppress(OSError):  # only if it is empty: made just now
                partial.rmdir()
            raise
        yield partial


def take_up(partial: Path, wanted: Mapping[str, Any]) -> list[str]:
    """Note what a training follows from, or make sure that the unfinished one there follows from the same.

    Args:
        partial: Where it works.
        wanted: What it follows from.

    Returns:
        What is not known of the unfinished one, in words: earlier versions noted less.

    Raises:
        ConfigError: It follows from something else.
    """
    asked: dict[str, Any] = json.loads(json.dumps(wanted))
    note = partial / NOTE
    if not note.is_file():
        empty_folder(partial)
        write_text(note, json.dumps(asked, indent=1))
        return []
    found = read_json(note)
    there: dict[str, Any] = found if isinstance(found, dict) else {}
    differing = [key for key in asked if key in there and there[key] != asked[key]]
    if differing or not there:
        told = "; ".join(_WORDS.get(key) or f"{key} was {there[key]}, is {asked[key]}" for key in differing)
        problem = f"{partial} holds an unfinished training with other settings{f' ({told})' if told else ''}"
        raise ConfigError("out", str(partial), problem, "remove it, or name another --out")
    unknown = [key for key in asked if key not in there]
    if not unknown:
        return []
    return [f"begun by an earlier version, which did not note {', '.join(unknown)}, nor its seconds: taken as the same"]
