"""How a model is opened for encoding: by PyTorch, as an export, or converted for ONNX Runtime or OpenVINO.

A conversion is a folder that ``export`` wrote, made once and kept in ``conversions`` in the model's own folder, or in
the user's cache. Its name holds what it was made from: the options that decide vectors, the weights, and the versions
of the libraries. What was measured of it stands in a JSON file of the same name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from sentence_transformers.util import get_device_name

from secateur import runtime
from secateur.errors import ConfigError, DataError, OutputError
from secateur.exporting.convert import form_of
from secateur.files import lock, output_errors, read_json, write_text
from secateur.inference.encoders import ModelEncoder
from secateur.models import resolve
from secateur.models.open_model import MAX_LENGTH, check_device, open_model
from secateur.models.save import TEN_SCRIPTS
from secateur.options import EncodeOptions, SavedPooling, ServeOptions
from secateur.progress import quiet
from secateur.provenance import ENCODING, fingerprint_files, is_export, versions_of
from secateur.runtime.core import CPU_BATCH, LENGTH_STEP, Encoder

AUTO, TORCH = "auto", "torch"
STORED = "stored"
"""The dtype of the weights as they are."""
BFLOAT16 = "bfloat16"
FOLDER = "conversions"
LIBRARIES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "nncf")}
"""Those by whose version a conversion changes, by backend."""


@dataclass(frozen=True)
class Opening:
    """How a model is opened: what is said once, and given to every worker.

    Attributes:
        model: A model folder, a Hub id, whatever else ``open_model`` takes; or a folder that ``export`` wrote.
        backend: What runs it; ``auto`` is for :func:`.choose` to decide, and means ``torch`` until then.
        dtype: In what it multiplies; ``auto`` as well, and means float32 on a CPU, what is stored on a GPU.
        batch_tokens: Tokens in a batch, padding included; default: by the device.
        length_step: Batches are padded to a multiple of this.
        threads: Its share of the processor; default: all of it.
        calibration: Texts of the run, by which int8 rounds; so a worker elsewhere, which converts anew, does the same.
    """

    model: str
    dtype: str = AUTO
    pooling: SavedPooling | None = None
    max_length: int = MAX_LENGTH
    device: str | None = None
    trust_remote_code: bool = False
    batch_tokens: int | None = None
    length_step: int = LENGTH_STEP
    threads: int | None = None
    backend: str = AUTO
    calibration: tuple[str, ...] = ()

    @classmethod
    def of(cls, options: EncodeOptions | ServeOptions, **others: Any) -> Opening:
        """As options say; refuses a device that this machine does not have."""
        said = {field.name: getattr(options, field.name) for field in fields(cls) if hasattr(options, field.name)}
        opening = cls(**said | {"model": str(options.model)} | others)
        if not opening.exported:
            check_device(opening.device)
        return opening

    @property
    def exported(self) -> bool:
        """Whether the model is a folder that ``secateur export`` wrote."""
        return is_export(self.model)

    @property
    def on_cpu(self) -> bool:
        """Whether it runs on the processor."""
        return self.exported or torch.device(self.device or get_device_name()).type == "cpu"


def open_encoder(opening: Opening) -> Encoder:
    """Open a model, an export, or a conversion, which is made where it is not kept."""
    if opening.exported:
        return _open_export(opening)
    if opening.backend in (AUTO, TORCH):
        return open_torch(opening)
    return open_conversion(conversion_of(opening, opening.backend, opening.dtype), opening.dtype)


def open_torch(opening: Opening) -> ModelEncoder:
    """Open a model in PyTorch."""
    if opening.threads:
        torch.set_num_threads(opening.threads)
    dtype = {AUTO: "float32" if opening.on_cpu else AUTO, STORED: AUTO}
    model = open_model(
        opening.model,
        dtype=dtype.get(opening.dtype, opening.dtype),
        pooling=opening.pooling,
        max_length=opening.max_length,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
    )
    return ModelEncoder(model, opening.model, batch_tokens=opening.batch_tokens, length_step=opening.length_step)


def _open_export(opening: Opening) -> Encoder:
    encoder = runtime.load(opening.model, threads=opening.threads)
    encoder.batch_tokens = opening.batch_tokens or CPU_BATCH
    decided = {"dtype": (AUTO, STORED, encoder.dtype), "backend": (AUTO, encoder.settings.backend)} | {
        name: (getattr(Opening, name),) for name in ("pooling", "max_length", "device", "trust_remote_code")
    }
    for name, allowed in decided.items():
        if getattr(opening, name) not in allowed:
            problem, hint = "cannot be chosen for an export, which has decided it", name.replace("_", "-")
            raise ConfigError(name, getattr(opening, name), problem, f"leave --{hint} out")
    return encoder


# --- conversions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What was found of one dtype: its least cosine to float32, and how many times as fast as torch it was."""

    cosine: float
    gain: float


@dataclass(frozen=True)
class Conversion:
    """Where a conversion is, or will be.

    ``precision`` is that of its weights, as ``export`` has it.
    """

    opening: Opening
    folder: Path
    backend: str
    precision: str

    @property
    def kept(self) -> bool:
        """Whether it is there."""
        return is_export(self.folder)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of it: :class:`Measured` by dtype; or why it ``failed``."""
        with suppress(DataError):
            found = read_json(_beside(self.folder))
            if isinstance(found, dict):
                return found
        return {}

    def measured(self, dtype: str) -> Measured | None:
        """What was measured of it in one dtype."""
        found = self.record.get(dtype)
        return Measured(**found) if found else None

    def note(self, what: str, found: Measured | str) -> None:
        """Add to what is known; where nothing can be written, it is not kept."""
        told = json.dumps(self.record | {what: found if isinstance(found, str) else asdict(found)}, indent=1)
        with suppress(OutputError):
            write_text(_beside(self.folder), told)

    def make(self) -> None:
        """Convert, unless another process has by now; conversions of other weights or versions are removed."""
        with output_errors(self.folder.parent):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(self.folder.parent, wait=True):
            if not self.kept:
                self._export()
            kind, _, made_of = self.folder.name.rpartition("-")
            for path in self.folder.parent.glob(f"{kind}-*"):
                if path.is_dir() and path.suffix != ".partial" and not path.name.endswith(made_of):
                    shutil.rmtree(path, ignore_errors=True)
                    _beside(path).unlink(missing_ok=True)

    def _export(self) -> None:
        from secateur.exporting.export import export  # with all that scores it

        texts = self.opening.calibration if self.precision == "int8" else TEN_SCRIPTS
        lines = [json.dumps({"text": text}) + "\n" for text in texts if text.strip()]
        with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
            file = Path(scratch) / "texts.jsonl"
            write_text(file, "".join(lines))
            export(
                self.opening.model,
                out=self.folder,
                to=self.backend,
                precision=self.precision,
                data=[file] if lines else [],
                min_cosine=-1.0,  # it is measured here, and on other texts
                pooling=self.opening.pooling,
                max_length=self.opening.max_length,
                trust_remote_code=self.opening.trust_remote_code,
            )


def conversion_of(opening: Opening, backend: str, dtype: str) -> Conversion:
    """The conversion that multiplies in ``dtype`` on a backend."""
    source = resolve(opening.model)
    if isinstance(source, Path):
        weights, own = fingerprint_files(source), _short([str(source.resolve())])
    else:
        weights, own = _commit(source, opening.trust_remote_code), source.replace("/", "--")
    precision = precision_of(backend, dtype)
    made_of = [weights, versions_of(("secateur", *ENCODING, *LIBRARIES[backend]))]
    options = [opening.pooling, opening.max_length, opening.trust_remote_code]
    name = f"{backend}-{precision}-{_short(options)}-{_short(made_of)}"
    cache = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(cache) / "secateur" / FOLDER / own
    if isinstance(source, Path) and source.is_dir():
        beside = source / FOLDER
        written = beside if beside.exists() else source
        if is_export(beside / name) or (written.is_dir() and os.access(written, os.W_OK)):
            place = beside
    return Conversion(opening, place / name, backend, precision)


def _commit(name: str, trust_remote_code: bool) -> str:
    """The commit of a model of the Hub that is here; one that is not is fetched, by opening it."""
    try:
        return Path(snapshot_download(name, local_files_only=True)).name
    except (OSError, ValueError):
        open_model(name, device="cpu", trust_remote_code=trust_remote_code)
        return Path(snapshot_download(name, local_files_only=True)).name


def precision_of(backend: str, dtype: str) -> str:
    """The precision of the weights that a backend multiplies in ``dtype``; OpenVINO takes a float32 graph for both."""
    return "float32" if (backend, dtype) == ("openvino", BFLOAT16) else dtype


def open_conversion(conversion: Conversion, dtype: str) -> Encoder:
    """Open a conversion, to multiply in ``dtype``; it is made where it is not kept."""
    opening = conversion.opening
    if not conversion.kept:
        form_of(conversion.backend, conversion.precision, None)  # says what is not installed before anything is opened
        with quiet():
            conversion.make()
    encoder = runtime.load(conversion.folder, threads=opening.threads, dtype=dtype)
    encoder.batch_tokens = opening.batch_tokens or CPU_BATCH
    return encoder


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
