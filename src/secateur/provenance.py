"""Where results come from: command, seed, versions and fingerprints, in each table and, of a step, in its done.json."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from secateur.errors import DataError
from secateur.files import DONE, read_json, write_text

LIBRARIES = ("secateur", "torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy")
DECIDING = ("secateur", "mteb", "scikit-learn", "sentence-transformers", "transformers", "torch")
"""Libraries by whose version a score may change."""
ENCODING = ("sentence-transformers", "transformers", "torch")
"""Those by whose version a vector may change."""
ASIDE = frozenset(
    [
        *("out", "cache", "names", "vocab_tasks", "device", "report_to", "trust_remote_code"),
        *("mini_batch_tokens", "gradient_checkpointing"),
    ]
)
"""Options that do not change a result, as those that save memory: what was begun may go on with others. (A device
would change a cost; a study gives it none.)"""
EXPORT = "export.json"
"""The manifest in a folder that ``secateur export`` wrote."""
_DESCRIPTIONS = frozenset({"secateur.json", "training.json"})
"""Files of a model folder that say how it was made; no vector depends on them."""


@dataclass(frozen=True)
class Fingerprint:
    """A data file as it was read: ``sha256`` of its bytes, ``rows`` used, and its licence where a file tells it."""

    name: str
    sha256: str
    rows: int
    licence: str = ""


@dataclass(frozen=True)
class Provenance:
    """Where a table comes from: the command, when, with which seed, versions, data, and on what machine."""

    command: str
    created: str
    seed: int | None
    versions: Mapping[str, str]
    data: tuple[Fingerprint, ...]
    hardware: Mapping[str, Any]


def provenance(data: Sequence[Fingerprint] = (), seed: int | None = None) -> Provenance:
    """Describe this process, and the command that it does."""
    return Provenance(
        command=command_line(),
        created=now(),
        seed=seed,
        versions={"python": platform.python_version()} | _installed(LIBRARIES),
        data=tuple(data),
        hardware={"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def versions_of(libraries: tuple[str, ...] = DECIDING) -> str:
    """Installed versions as one text: ``mteb 2.26.1, torch 2.13.0``, without the local part that tells a build."""
    return ", ".join(f"{name} {version.partition('+')[0]}" for name, version in _installed(libraries).items())


def _installed(libraries: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in libraries:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


@dataclass(frozen=True)
class Made:
    """What a result follows from: recorded by every step that can be resumed, or whose result is kept.

    That is the step's name, the options that decide about the result, each input's name and fingerprint, and the
    versions of libraries that it depends on (:func:`versions_of`).
    """

    step: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    versions: str = ""

    def changes_since(self, folder: Path, name: str = DONE) -> list[str] | None:
        """Which options, inputs or versions differ from those that are recorded in a folder.

        Returns:
            Their names, of nested mappings the innermost ones; empty where nothing changed, and None where nothing is
            recorded. An input that is None now was not looked at.

        Raises:
            DataError: What is recorded is broken.
        """
        if not (folder / name).is_file():
            return None
        recorded, now = read_record(folder / name), json.loads(json.dumps(asdict(self)))
        changed = [key for key in ("step", "versions") if recorded.get(key) != now[key]]
        for key in ("options", "inputs"):
            given = {name: value for name, value in now[key].items() if key == "inputs" or value is not None}
            changed += _differing(recorded[key], given)
        return [name for name in dict.fromkeys(changed) if name not in ASIDE]

    def record(self, folder: Path, name: str = DONE) -> None:
        write_text(folder / name, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")


def read_record(file: Path) -> dict[str, Any]:
    """What :meth:`Made.record` wrote; DataError if it is broken."""
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("options", "inputs")):
        raise DataError(file, "does not say what was made here", f"bring it back, or remove {file.parent}")
    return content


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    for name in {**before, **now}:
        one, other = before.get(name), now.get(name)
        if isinstance(one, dict) and isinstance(other, dict):
            names += _differing(one, other)
        elif one != other and not (name in now and other is None):
            names.append(name)
    return names


_command: ContextVar[str] = ContextVar("command", default="")


@contextlib.contextmanager
def acting_as(command: str) -> Iterator[None]:
    """Within: tables say that they come from this command, the one that would do a study's step alone."""
    token = _command.set(command)
    try:
        yield
    finally:
        _command.reset(token)


def command_line() -> str:
    """The command behind what is done now, as it can be typed again."""
    if _command.get():
        return _command.get()
    program = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    if program.startswith("ipykernel_launcher"):  # whose argument is a file of this one kernel, in somebody's home
        return "a notebook"
    return shlex.join([program, *sys.argv[1:]])


def is_export(folder: str | Path) -> bool:
    """Whether a path is a folder that ``secateur export`` wrote."""
    return (Path(folder) / EXPORT).is_file()


def all_files(model: str | Path) -> list[Path]:
    """The files of a model folder and of its modules' folders, and all of an export; or a single file.

    Empty for what is not on this disk. Other folders in it may hold anything, such as a model that was cut from it.
    """
    path = Path(model)
    if not path.is_dir():
        return [path] if path.is_file() else []
    parts = [path]
    with contextlib.suppress(DataError, KeyError, TypeError):  # whoever opens the model says what is wrong
        parts += [path / module["path"] for module in read_json(path / "modules.json")]
    found = path.rglob("*") if is_export(path) else (file for part in parts if part.is_dir() for file in part.iterdir())
    return sorted({file for file in found if file.is_file()})


def model_files(model: str | Path) -> list[Path]:
    """Those of :func:`all_files` that vectors may depend on."""
    files = all_files(model)
    return [f for f in files if not (f.name.startswith(".") or f.suffix == ".md" or f.name in _DESCRIPTIONS)]


def fingerprint_files(model: str | Path) -> str:
    """SHA-256 over a model's files, their names and bytes, without opening it; empty for what is not on this disk."""
    told = [f"{file.relative_to(model)} {sha256_of(file)}\n" for file in model_files(model)]
    return hashlib.sha256("".join(told).encode()).hexdigest() if told else ""


def sha256_of(file: Path) -> str:
    about = file.stat()
    return _hash_once(file, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _hash_once(file: Path, *state: int) -> str:
    """SHA-256 of a file, whose bytes are read once in a process for each of its states."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
