"""What an output was made from, in a ``done.json`` beside it: so that a step runs again only where something changed.

Every step that can be resumed, or whose result is kept, uses this one file. It holds the options, a fingerprint of
each input, and the versions of the libraries that the result depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from secateur.files import read_json, write_text

FILE = "done.json"


@dataclass(frozen=True)
class Made:
    """What a result follows from.

    Attributes:
        step: Name of the step, such as ``heal``.
        options: Options that decide about the result, as JSON has them.
        inputs: Name of each input and its fingerprint.
        versions: Of the libraries that the result depends on (:func:`.versions_of`).
    """

    step: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    versions: str = ""

    def changes_since(self, folder: Path, name: str = FILE) -> list[str] | None:
        """Which options, inputs or versions differ from those that are recorded in a folder.

        Returns:
            Their names, of nested mappings the innermost ones; empty where nothing changed, and None where nothing is
            recorded. An input that is None now was not looked at.
        """
        if not (folder / name).is_file():
            return None
        recorded, now = read_json(folder / name), json.loads(json.dumps(asdict(self)))
        if not isinstance(recorded, dict):
            return ["done.json"]
        changed = [key for key in ("step", "versions") if recorded.get(key) != now[key]]
        for key in ("options", "inputs"):
            before: dict[str, Any] = recorded.get(key) or {}
            given = {name: value for name, value in now[key].items() if key == "inputs" or value is not None}
            changed += _differing({name: value for name, value in before.items() if value is not None}, given)
        return list(dict.fromkeys(changed))

    def record(self, folder: Path, name: str = FILE) -> None:
        """Write it into a folder, whole or not at all."""
        write_text(folder / name, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name in {**before, **now}:
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            names += _differing(one, other)
        elif one != other and not (name in now and other is None):
            names.append(name)
    return names
