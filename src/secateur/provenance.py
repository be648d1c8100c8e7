"""Where numbers come from: the command, the seed, the versions, and the fingerprints of the data."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = ("secateur", "torch", "transformers", "sentence-transformers", "peft", "mteb", "numpy")


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


def provenance(data: Sequence[Fingerprint] = (), seed: int | None = None, command: str | None = None) -> Provenance:
    """Describe this process. ``command`` defaults to the command line that started it."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return Provenance(
        command=command or command_line(),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=seed,
        versions=versions,
        data=tuple(data),
        hardware={"machine": platform.machine(), "system": platform.system(), "cores": os.cpu_count()},
    )


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
    return shlex.join([program, *sys.argv[1:]])


def fingerprint(file: Path, rows: int, licence: str = "") -> Fingerprint:
    """Hash a file's bytes."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return Fingerprint(file.name, digest.hexdigest(), rows, licence)
