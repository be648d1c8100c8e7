"""A model converted for ONNX Runtime or OpenVINO, once, and kept beside it.

A conversion is a folder that ``export`` wrote, in ``conversions`` in the model's own folder; or in the user's cache
directory, where that cannot be written, or the model is of the Hub or a single file. Its name holds what it was made
from: the options that decide vectors, the weights, and the versions of the libraries. What was measured of it stands in
a JSON file of the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from secateur.errors import DataError, OutputError
from secateur.files import lock, read_json, write_text
from secateur.inference.opening import Opening
from secateur.models import resolve
from secateur.models.save import TEN_SCRIPTS
from secateur.provenance import ENCODING, fingerprint_files, is_export, versions_of

FOLDER = "conversions"
LIBRARIES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "nncf")}
"""Those by whose version a conversion changes, by backend."""
LEAST = -1.0
"""``export`` refuses nothing for its cosine: that is measured here, and on other texts."""


@dataclass(frozen=True)
class Measured:
    """What was found of one arithmetic: its least cosine to float32, and how many times as fast as torch it was."""

    cosine: float
    gain: float


@dataclass(frozen=True)
class Conversion:
    """Where a conversion is, or will be.

    Attributes:
        folders: One of the places where it may be, with its name, each; the first that can be written is taken.
        backend: ``onnx`` or ``openvino``.
        precision: That of its weights, as ``export`` has it.
    """

    opening: Opening
    folders: tuple[Path, ...]
    backend: str
    precision: str

    @property
    def kept(self) -> Path | None:
        """The folder, if it is there."""
        return next((folder for folder in self.folders if is_export(folder)), None)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of it: :class:`Measured` by arithmetic; or why it ``failed``."""
        for folder in self.folders:
            with suppress(DataError):
                found = read_json(_beside(folder))
                if isinstance(found, dict):
                    return found
        return {}

    def measured(self, dtype: str) -> Measured | None:
        """What was measured of it in an arithmetic."""
        try:
            return Measured(**self.record[dtype])
        except (KeyError, TypeError):
            return None

    def note(self, **found: Any) -> None:
        """Add to what is known; where nothing can be written, it is not kept."""
        found = {key: asdict(value) if isinstance(value, Measured) else value for key, value in found.items()}
        told = json.dumps(self.record | found, indent=1)
        for folder in self.folders:
            with suppress(OutputError):
                write_text(_beside(folder), told)
                return

    def outdated(self) -> list[Path]:
        """Conversions with the same options, of other weights or versions."""
        kind, _, name = self.folders[0].name.rpartition("-")
        found = [path for folder in self.folders for path in folder.parent.glob(f"{kind}-*")]
        return [path for path in found if path.is_dir() and path.suffix != ".partial" and not path.name.endswith(name)]

    def make(self) -> Path:
        """Convert, unless it is there by now; conversions of other weights are removed.

        Raises:
            SecateurError: ``export`` fails; or no place can be written.
        """
        from secateur.exporting.export import export  # with all that scores it

        with _made_once(self.folders) as folder:
            if (made := self.kept) is None:
                with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
                    file = Path(scratch) / "texts.jsonl"
                    texts = self.opening.calibration if self.precision == "int8" else TEN_SCRIPTS
                    write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))
                    export(
                        self.opening.model,
                        out=folder,
                        to=self.backend,
                        precision=self.precision,
                        data=[file] if file.stat().st_size else [],
                        min_cosine=LEAST,
                        pooling=self.opening.pooling,
                        max_length=self.opening.max_length,
                        trust_remote_code=self.opening.trust_remote_code,
                    )
                made = folder
        for path in self.outdated():
            shutil.rmtree(path, ignore_errors=True)
            _beside(path).unlink(missing_ok=True)
        return made


def conversion_of(opening: Opening, backend: str, dtype: str) -> Conversion | None:
    """The conversion that multiplies in ``dtype`` on a backend; None of a model of the Hub that is not here yet."""
    source = resolve(opening.model)
    if isinstance(source, Path):
        weights = fingerprint_files(source)
    else:
        try:
            weights = Path(snapshot_download(source, local_files_only=True)).name  # the commit
        except (OSError, ValueError):
            return None
    precision = precision_of(backend, dtype)
    libraries = ("secateur", *ENCODING, *LIBRARIES[backend])
    made_of = [weights, versions_of(libraries)]
    options = [opening.pooling, opening.max_length, opening.trust_remote_code]
    name = f"{backend}-{precision}-{_short(options)}-{_short(made_of)}"
    own = _short([str(source.resolve())]) if isinstance(source, Path) else source.replace("/", "--")
    places = [source / FOLDER] if isinstance(source, Path) and source.is_dir() else []
    places.append(_cache_directory() / FOLDER / own)
    return Conversion(opening, tuple(place / name for place in places), backend, precision)


def precision_of(backend: str, dtype: str) -> str:
    """The precision of the weights that a backend multiplies in ``dtype``; OpenVINO takes a float32 graph for both."""
    return "float32" if (backend, dtype) == ("openvino", "bfloat16") else dtype


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


def _cache_directory() -> Path:
    """Where programs of this user keep what can be made again."""
    home = os.environ.get("LOCALAPPDATA") if os.name == "nt" else os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "secateur"


@contextmanager
def _made_once(folders: Sequence[Path]) -> Iterator[Path]:
    """The first of the folders whose place can be written; within, no other process makes one there."""
    for folder in folders:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder.parent):
                pass
        except OSError:
            continue
        with lock(folder.parent, wait=True):
            yield folder
        return
    raise OutputError(folders[-1], "cannot be written, so that no conversion can be kept", "--backend torch needs none")
