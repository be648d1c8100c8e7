"""What runs a model: PyTorch, an export, or a conversion of the model for ONNX Runtime or OpenVINO.

``auto`` is the quickest of what is installed whose vectors keep a cosine to those of PyTorch in float32, measured on
texts of the run. A conversion is a folder that ``export`` wrote, made once and kept in ``conversions`` in the model's
own folder, or in the user's cache. Its name holds what it was made from: the options that decide vectors, the weights,
and the versions of the libraries. What was measured of it stands in a JSON file of the same name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import tempfile
import timeit
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import snapshot_download

from secateur import runtime
from secateur.errors import ConfigError, DataError, ExportTooFar, MissingPackage, ModelError, OutputError
from secateur.exporting.convert import form_of
from secateur.files import lock, output_errors, read_json, write_text
from secateur.inference.encoders import AUTO, STORED, TORCH, ModelEncoder, Opening, open_torch
from secateur.measures.metrics import paired_cosines
from secateur.models import resolve
from secateur.models.open_model import open_model
from secateur.models.save import PROBES, TEN_SCRIPTS
from secateur.progress import quiet
from secateur.provenance import ENCODING, fingerprint_files, is_export, versions_of
from secateur.runtime.core import CPU_BATCH, Encoder, Vectors

FOLDER = "conversions"
LIBRARIES = {"onnx": ("onnxruntime", "onnx"), "openvino": ("openvino", "nncf")}
"""Those by whose version a conversion changes, by backend."""
WAYS = (
    ("openvino", "int8"),
    ("openvino", "bfloat16"),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("onnx", "float32"),
)
"""What ``auto`` tries, the quickest on most processors first: a backend, and what it multiplies in."""
INT8_KEEPS = 0.995
"""No int8 keeps a cosine like this."""
PATIENCE = 2.0
"""What a job must take in PyTorch, in times of what a conversion takes, to wait for one."""
CONVERSION_SECONDS, PARAMETER_SECONDS = 20.0, 0.3e-6
"""About what a conversion takes on two cores: of any model, and for each of its parameters."""
CHECKED_CHARACTERS, TIMED_CHARACTERS = 200, 10_000
"""How much of each text cosines are measured on, for rounding shows where texts are short; of all texts speeds."""


def open_encoder(opening: Opening) -> Encoder:
    """Open a model, an export, or a conversion, which is made where it is not kept.

    Raises:
        ModelError: The model cannot be opened; or it was replaced since its ``fingerprint`` was taken.
    """
    if opening.fingerprint and opening.fingerprint != fingerprint_files(opening.model):
        problem = "has been replaced since the work began, and vectors of two models do not go together"
        raise ModelError(opening.model, problem, "put its files back, or begin anew")
    if opening.exported:
        return _open_export(opening)
    return open_torch(opening) if opening.backend in (AUTO, TORCH) else conversion_of(opening).open()


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


@dataclass(frozen=True)
class Measured:
    """What was found of a conversion: its least cosine to float32, and how many times as fast as torch it was."""

    cosine: float
    gain: float


@dataclass(frozen=True)
class Conversion:
    """Where a conversion is, or will be, and how it is opened."""

    opening: Opening
    folder: Path

    @property
    def kept(self) -> bool:
        """Whether it is there."""
        return is_export(self.folder)

    @property
    def record(self) -> dict[str, Any]:
        """What is known of it: :class:`Measured` by dtype, of a server's after any prompt; or why it ``failed``."""
        with suppress(DataError):
            found = read_json(_beside(self.folder))
            if isinstance(found, dict):
                return found
        return {}

    def note(self, what: str, found: Any) -> None:
        """Add to what is known; where nothing can be written, it is not kept."""
        with suppress(OutputError):
            write_text(_beside(self.folder), json.dumps(self.record | {what: found}, indent=1))

    def open(self) -> Encoder:
        """Open it; it is made where it is not kept."""
        opening = self.opening
        if not self.kept:
            form_of(opening.backend, _precision(opening), None)  # says what is not installed before anything is opened
            with output_errors(self.folder.parent):
                self.folder.parent.mkdir(parents=True, exist_ok=True)
            with quiet(), lock(self.folder.parent, wait=True):
                self._make()
        encoder = runtime.load(self.folder, threads=opening.threads, dtype=opening.dtype)
        encoder.batch_tokens = opening.batch_tokens or CPU_BATCH
        return encoder

    def _make(self) -> None:
        """Convert, unless another process has by now; conversions of other weights or versions are removed."""
        from secateur.exporting.export import export  # with all that scores it

        opening, precision = self.opening, _precision(self.opening)
        texts = opening.calibration if precision == "int8" else TEN_SCRIPTS
        lines = [json.dumps({"text": text}) + "\n" for text in texts if text.strip()]
        with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
            file = Path(scratch) / "texts.jsonl"
            write_text(file, "".join(lines))
            if not self.kept:
                export(
                    opening.model,
                    out=self.folder,
                    to=opening.backend,
                    precision=precision,
                    data=[file] if lines else [],
                    min_cosine=-1.0 if precision == "int8" else None,  # how near int8 comes is measured here
                    pooling=opening.pooling,
                    max_length=opening.max_length,
                    trust_remote_code=opening.trust_remote_code,
                )
        kind, _, made_of = self.folder.name.rpartition("-")
        for path in self.folder.parent.glob(f"{kind}-*"):
            if path.is_dir() and not path.name.endswith(made_of):
                shutil.rmtree(path, ignore_errors=True)
                _beside(path).unlink(missing_ok=True)


def conversion_of(opening: Opening) -> Conversion:
    source = resolve(opening.model)
    if isinstance(source, Path):
        weights, own = fingerprint_files(source), _short([str(source.resolve())])
    else:
        weights, own = _commit(source, opening.trust_remote_code), source.replace("/", "--")
    made_of = [weights, versions_of(("secateur", *ENCODING, *LIBRARIES[opening.backend]))]
    options = [opening.pooling, opening.max_length, opening.trust_remote_code]
    name = f"{opening.backend}-{_precision(opening)}-{_short(options)}-{_short(made_of)}"
    caches = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_CACHE_HOME") or Path.home() / ".cache"
    place = Path(caches) / "secateur" / FOLDER / own
    if isinstance(source, Path) and source.is_dir():
        beside = source / FOLDER
        written = beside if beside.exists() else source
        if is_export(beside / name) or (written.is_dir() and os.access(written, os.W_OK)):
            place = beside
    return Conversion(opening, place / name)


def _commit(name: str, trust_remote_code: bool) -> str:
    """The commit of a model of the Hub that is here; one that is not is fetched, by opening it."""
    try:
        return Path(snapshot_download(name, local_files_only=True)).name
    except (OSError, ValueError):
        open_model(name, device="cpu", trust_remote_code=trust_remote_code)
        return Path(snapshot_download(name, local_files_only=True)).name


def _precision(opening: Opening) -> str:
    """The precision of a conversion's weights, as ``export`` has it; OpenVINO takes float32 for bfloat16, too."""
    return "float32" if (opening.backend, opening.dtype) == ("openvino", "bfloat16") else opening.dtype


def _short(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")


@dataclass(frozen=True)
class Chosen:
    """An encoder, how to open its like anywhere, and in a line: what was taken, and what it gains."""

    encoder: Encoder
    opening: Opening
    told: str


def choose(
    opening: Opening,
    least: float,
    texts: Sequence[str] = (),
    count: float = math.inf,
    prompts_of: Callable[[Encoder], Sequence[str]] = lambda encoder: sorted({"", *encoder.prompts.values()}),
) -> Chosen:
    """Open a model by what is asked for, or by the quickest that keeps its vectors.

    Args:
        opening: ``auto`` in it is decided here.
        least: The cosine to PyTorch in float32 that each measured text must keep.
        texts: Some of those that will be encoded, to be measured beside the probes.
        count: How many will be; 0 for too few to measure anything, infinity for a server.
        prompts_of: What will go before them; default: nothing, or any of the model's prompts.

    Raises:
        ConfigError: What is asked for does not go together.
        MissingPackage: The backend that is asked for is not installed.
        ModelError: The model cannot be opened, or converted for the backend that is asked for; or nothing on that
            backend keeps the cosine.
    """
    if not opening.exported:
        _check_together(opening)
    opening = replace(opening, calibration=tuple(texts))
    if is_decided(opening):
        try:
            encoder = open_encoder(opening)
        except ExportTooFar as error:
            problem = f"cannot be converted for {opening.backend} ({error.problem})"
            raise ModelError(opening.model, problem, "another --backend or --dtype") from error
        backend = encoder.settings.backend if isinstance(encoder, runtime.Encoder) else TORCH
        dtype = encoder.dtype if opening.dtype == AUTO else opening.dtype
        return Chosen(encoder, replace(opening, backend=backend, dtype=dtype), "")

    falls_back = opening.backend in (AUTO, TORCH) and opening.dtype != "int8"
    exact_opening = replace(opening, backend=TORCH, dtype="float32", calibration=())
    exact = cache(lambda: open_torch(exact_opening))
    reference = cache(lambda: _Reference(exact(), texts, prompts_of(exact())))
    notes: list[str] = []
    if best := _best_conversion(opening, least, count, falls_back, reference, notes):
        return best
    if not falls_back:
        problem = f"nothing that was tried keeps a cosine of {least:g} ({'; '.join(notes)})"
        raise ModelError(opening.model, problem, "--backend torch, or a lower --min-cosine")
    return Chosen(exact(), exact_opening, "; ".join(["torch float32", *notes]) if count else "")


def _best_conversion(
    opening: Opening,
    least: float,
    count: float,
    falls_back: bool,
    reference: Callable[[], _Reference],
    notes: list[str],
) -> Chosen | None:
    """The quickest conversion that keeps the cosine; ``notes`` get what is wrong with others.

    What was measured before is believed (by a server, what was measured after any prompt), but where there are texts of
    a run to measure it anew. A way that would have to be converted is tried only where no quicker one is good.
    """
    asked = opening.backend not in (AUTO, TORCH)
    best: tuple[Conversion, Measured, Encoder | None] | None = None
    for way in _ways(opening, least):
        conversion, encoder, told = conversion_of(way), None, f"{way.backend} {way.dtype}"
        record, everywhere = conversion.record, f"{way.dtype}, any prompt"
        server = count == math.inf
        known = record.get(everywhere) if server else record.get(way.dtype, record.get(everywhere))
        if conversion.kept and known and (server or not count):
            measured = Measured(**known)
        elif falls_back and not count:
            continue
        else:
            exact = reference()  # says what is wrong with the model
            if not conversion.kept:
                if best or (falls_back and exact.seconds_for(count) < PATIENCE * exact.conversion_seconds):
                    continue
                if "failed" in record and not asked:
                    notes.append(f"{way.backend} failed before ({record['failed']})")
                    continue
            try:
                encoder = conversion.open()
            except MissingPackage:
                raise
            except Exception as error:  # each converter raises what it likes
                problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                if asked:
                    raise ModelError(opening.model, f"cannot be converted for {way.backend} ({problem})") from error
                if not isinstance(error, OutputError):  # where there is a place to write, it may well succeed
                    conversion.note("failed", problem)
                notes.append(f"{told} failed ({problem})")
                continue
            measured = exact.measure(encoder)
            conversion.note(everywhere if server else way.dtype, asdict(measured))
        if measured.cosine < least:
            notes.append(f"{told} would keep {measured.cosine:.5f}")
        elif measured.gain > (best[1].gain if best else 1.0 if falls_back else 0.0):
            best = conversion, measured, encoder
        else:
            notes.append(f"{told} was {measured.gain:.1f} times as fast")
    if best is None:
        return None
    conversion, measured, encoder = best
    way = conversion.opening
    gain = f"{measured.gain:.1f} times as fast as torch float32, cosine at least {measured.cosine:.5f}"
    return Chosen(encoder or conversion.open(), way, "; ".join([f"{way.backend} {way.dtype}: {gain}", *notes]))


def _check_together(opening: Opening) -> None:
    backend, dtype = opening.backend, opening.dtype
    if not opening.on_cpu and backend not in (AUTO, TORCH):
        raise ConfigError("backend", backend, f"{backend} runs on the CPU alone here", "add --device cpu")
    if dtype == "int8" and (backend == TORCH or not opening.on_cpu):
        raise ConfigError("dtype", dtype, "int8 is not for torch", "--backend openvino or onnx, on the CPU")
    if dtype == STORED and backend not in (AUTO, TORCH):
        hint = "auto, float32, bfloat16, float16 or int8"
        raise ConfigError("dtype", dtype, f"{dtype} is for torch, not for {backend}", hint)


def is_decided(opening: Opening) -> bool:
    """Whether nothing is left to be measured."""
    alone = opening.dtype in (STORED, "bfloat16", "float16")  # in torch, where no backend is named
    return opening.exported or not opening.on_cpu or alone or AUTO not in (opening.backend, opening.dtype)


def _ways(opening: Opening, least: float) -> list[Opening]:
    """What may be tried, the quickest on most processors first; an error where what was asked for is not installed."""
    found: list[Opening] = []
    missing: MissingPackage | None = None
    for backend, dtype in WAYS:
        if opening.backend not in (AUTO, backend) or opening.dtype not in (AUTO, dtype):
            continue
        if opening.dtype == AUTO and dtype == "int8" and least > INT8_KEEPS:
            continue
        calibration = opening.calibration if dtype == "int8" else ()
        way = replace(opening, backend=backend, dtype=dtype, calibration=calibration)
        try:
            form_of(backend, _precision(way), None)
            found.append(way)
        except MissingPackage as error:
            missing = missing or error
    if missing and not found and (opening.backend not in (AUTO, TORCH) or opening.dtype == "int8"):
        raise missing
    return found


class _Reference:
    """The model in PyTorch in float32, by which others are measured, on texts of the run after each prompt."""

    def __init__(self, encoder: ModelEncoder, texts: Sequence[str], prompts: Sequence[str]) -> None:
        self._prompts = prompts
        self._probes = [*PROBES, *TEN_SCRIPTS, *(text[:CHECKED_CHARACTERS] for text in texts)]
        timed = texts or self._probes
        ends = itertools.accumulate(map(len, timed))
        self._timed = [text for text, end in zip(timed, ends, strict=True) if end <= TIMED_CHARACTERS]
        self._timed = self._timed or [timed[0][:TIMED_CHARACTERS]]
        self._vectors, self._seconds = self._encode(encoder), self._time(encoder)
        self.conversion_seconds = CONVERSION_SECONDS
        self.conversion_seconds += PARAMETER_SECONDS * sum(p.numel() for p in encoder.model.parameters())

    def seconds_for(self, count: float) -> float:
        """About what so many texts take."""
        return self._seconds / len(self._timed) * count

    def measure(self, encoder: Encoder) -> Measured:
        """Measure another encoder."""
        cosine = float(paired_cosines(self._encode(encoder), self._vectors).min())
        return Measured(cosine, self._seconds / self._time(encoder))

    def _encode(self, encoder: Encoder) -> Vectors:
        return np.concatenate([encoder.encode_texts(self._probes, prompt) for prompt in self._prompts])

    def _time(self, encoder: Encoder) -> float:
        """Seconds for the timed texts: of two runs the quicker one."""
        encode = partial(encoder.encode_texts, self._timed, self._prompts[0])
        return min(timeit.repeat(encode, number=1, repeat=2))
