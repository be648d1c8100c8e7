"""What runs a model on this processor, and in what it multiplies: PyTorch, or a conversion for another runtime.

``auto`` is the quickest of what is installed whose vectors keep a cosine to those of PyTorch in float32, measured on
texts of the run. Converting takes a while: a job that is done sooner does not wait for it, and what is converted is
kept (:mod:`.conversions`).
"""

from __future__ import annotations

import itertools
import math
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from secateur import runtime
from secateur.data.vectors import fingerprint_model
from secateur.errors import ConfigError, MissingPackage, ModelError, OutputError
from secateur.exporting.convert import form_of
from secateur.inference.conversions import Conversion, Measured, conversion_of, precision_of
from secateur.inference.encoders import MIXED, ModelEncoder, mix_products
from secateur.inference.opening import AUTO, TORCH, Opening
from secateur.measures.metrics import paired_cosines
from secateur.models.open_model import check_device, open_model
from secateur.models.save import PROBES, TEN_SCRIPTS
from secateur.progress import quiet
from secateur.provenance import fingerprint_files
from secateur.runtime.core import CPU_BATCH, Encoder, Vectors

STORED = "stored"
"""The dtype of the weights as they are."""

BFLOAT16 = "bfloat16"
Way = tuple[str, str]
"""A backend, and what it multiplies in."""
WAYS: tuple[Way, ...] = (
    ("openvino", "int8"),
    ("openvino", BFLOAT16),
    ("onnx", "int8"),
    ("openvino", "float32"),
    ("onnx", "float32"),
)
"""What ``auto`` tries, the quickest on most processors first."""

INT8_KEEPS = 0.995
"""No int8 keeps a cosine like this."""

PATIENCE = 2.0
"""What a job must take in PyTorch, in times of what a conversion takes, to wait for one."""

CONVERSION_SECONDS, PARAMETER_SECONDS = 20.0, 0.3e-6
"""About what a conversion takes on two cores: of any model, and for each of its parameters."""

CHECKED_CHARACTERS, TIMED_CHARACTERS = 200, 10_000
"""How much of each text cosines are measured on, for rounding shows where texts are short; of all texts speeds."""


@dataclass(frozen=True)
class Chosen:
    """An encoder, how to open its like anywhere, and in a line: what was taken, and what it gains."""

    encoder: Encoder
    opening: Opening
    told: str


def fingerprint_encoder(encoder: Encoder) -> str:
    """A hash of all that an encoder's vectors depend on, but for its dtype."""
    return fingerprint_model(encoder.model) if isinstance(encoder, ModelEncoder) else fingerprint_files(encoder.name)


def open_encoder(opening: Opening) -> Encoder:
    """Open a model, an export, or a conversion, which is made where it is not kept.

    Raises:
        ConfigError: There is no such device or dtype; or an export has decided what was chosen.
        ModelError: It cannot be opened.
        MissingPackage: A runtime is not installed, or what converts for it.
    """
    if opening.exported:
        return _open_export(opening)
    if opening.backend not in (AUTO, TORCH):
        conversion = conversion_of(opening, opening.backend, opening.dtype)
        if conversion is None:  # it is fetched
            open_model(opening.model, device="cpu", trust_remote_code=opening.trust_remote_code)
            conversion = conversion_of(opening, opening.backend, opening.dtype)
            assert conversion is not None
        return _open_conversion(opening, conversion, opening.dtype)
    return _open_torch(opening)


def _open_torch(opening: Opening) -> ModelEncoder:
    if opening.threads:
        torch.set_num_threads(opening.threads)
    dtype = {AUTO: "float32" if opening.on_cpu else AUTO, STORED: AUTO, MIXED: "float32"}
    model = open_model(
        opening.model,
        dtype=dtype.get(opening.dtype, opening.dtype),
        pooling=opening.pooling,
        max_length=opening.max_length,
        device=opening.device,
        trust_remote_code=opening.trust_remote_code,
    )
    encoder = ModelEncoder(model, opening.model, batch_tokens=opening.batch_tokens, length_step=opening.length_step)
    if opening.dtype == MIXED:
        mix_products(model)
        encoder.dtype = MIXED
    return encoder


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


def _open_conversion(opening: Opening, conversion: Conversion, dtype: str) -> Encoder:
    folder = conversion.kept
    if folder is None:
        form_of(conversion.backend, conversion.precision, None)  # says what is not installed before anything is opened
        with quiet():
            folder = conversion.make()
    encoder = runtime.load(folder, threads=opening.threads, dtype=dtype)
    encoder.batch_tokens = opening.batch_tokens or CPU_BATCH
    return encoder


# --- the choice -------------------------------------------------------------------------------------------------------


def all_prompts(encoder: Encoder) -> list[str]:
    """What may go before a text: nothing, and each of the model's prompts."""
    return sorted({"", *encoder.prompts.values()})


def choose(
    opening: Opening,
    least: float,
    texts: Sequence[str] = (),
    count: float = math.inf,
    prompts_of: Callable[[Encoder], Sequence[str]] = all_prompts,
) -> Chosen:
    """Open a model by what is asked for, or by the quickest that keeps its vectors.

    Args:
        opening: ``auto`` in it is decided here.
        least: The cosine to PyTorch in float32 that each measured text must keep, where something is to be decided.
        texts: Some of those that will be encoded, to be measured beside the probes.
        count: How many will be; 0 for too few to measure anything, infinity for a server.
        prompts_of: What will go before them.

    Raises:
        ConfigError: What is asked for does not go together.
        MissingPackage: The backend that is asked for is not installed.
        ModelError: The model cannot be opened, or converted for the backend that is asked for; or nothing on that
            backend keeps the cosine.
    """
    if not opening.exported:
        check_device(opening.device)
        _check_together(opening)
    opening = replace(opening, calibration=tuple(texts))
    if is_decided(opening):
        encoder = open_encoder(opening)
        backend = encoder.settings.backend if isinstance(encoder, runtime.Encoder) else TORCH
        dtype = encoder.dtype if opening.dtype == AUTO else opening.dtype
        return Chosen(encoder, replace(opening, backend=backend, dtype=dtype), "")
    ways = _ways(opening, least)
    if count in (0, math.inf) and (kept := _open_kept(opening, least, ways, at_once=not count)):
        return kept
    exact_opening = replace(opening, backend=TORCH, dtype="float32", calibration=())
    exact = _open_torch(exact_opening)
    falls_back = opening.backend in (AUTO, TORCH) and opening.dtype != "int8"
    if count == 0 and falls_back:
        return Chosen(exact, exact_opening, "")
    trial = _Trial(opening, least, exact, prompts_of(exact), texts, count)
    trial.convert(ways)
    if trial.best is None and falls_back:
        return trial.in_torch(exact_opening)
    if trial.best is None:
        problem = f"nothing that was tried keeps a cosine of {least:g} ({'; '.join(trial.notes)})"
        raise ModelError(opening.model, problem, "--backend torch, or a lower --min-cosine")
    return trial.best


def _check_together(opening: Opening) -> None:
    """Refuse a backend, dtype and device that do not go together."""
    backend, dtype = opening.backend, opening.dtype
    if not opening.on_cpu and backend not in (AUTO, TORCH):
        raise ConfigError("backend", backend, f"{backend} runs on the CPU alone here", "add --device cpu")
    if dtype == "int8" and (backend == TORCH or not opening.on_cpu):
        raise ConfigError("dtype", dtype, "int8 is not for torch", "--backend openvino or onnx, on the CPU")
    if dtype in (STORED, MIXED) and backend not in (AUTO, TORCH):
        hint = "auto, float32, bfloat16, float16 or int8"
        raise ConfigError("dtype", dtype, f"{dtype} is for torch, not for {backend}", hint)


def is_decided(opening: Opening) -> bool:
    """Whether nothing is left to be measured."""
    alone = opening.dtype in (STORED, MIXED, BFLOAT16, "float16")  # in torch, where no backend is named
    return opening.exported or not opening.on_cpu or alone or AUTO not in (opening.backend, opening.dtype)


def _ways(opening: Opening, least: float) -> list[Way]:
    """What may be tried, the quickest on most processors first.

    Raises:
        MissingPackage: What was asked for needs it.
    """
    found: list[Way] = []
    missing: MissingPackage | None = None
    for backend, dtype in WAYS:
        if opening.backend not in (AUTO, backend) or opening.dtype not in (AUTO, dtype):
            continue
        if opening.dtype == AUTO and dtype == "int8" and least > INT8_KEEPS:
            continue
        try:
            form_of(backend, precision_of(backend, dtype), None)
            found.append((backend, dtype))
        except MissingPackage as error:
            missing = missing or error
    if missing and not found and (opening.backend not in (AUTO, TORCH) or opening.dtype == "int8"):
        raise missing
    return found


def _open_kept(opening: Opening, least: float, ways: Sequence[Way], at_once: bool) -> Chosen | None:
    """Open the quickest of what was converted and measured before; None where there is none, or, unless it must be had
    at once, where a way that is quicker on most processors has not been tried.
    """
    found: list[tuple[Measured, Conversion, str]] = []
    for backend, dtype in ways:
        conversion = conversion_of(opening, backend, dtype)
        measured = conversion.measured(dtype) if conversion and conversion.kept else None
        if conversion and measured and measured.cosine >= least and (measured.gain > 1 or opening.backend == backend):
            found.append((measured, conversion, dtype))
        elif not (at_once or found or measured or (conversion and "failed" in conversion.record)):
            return None
    if not found:
        return None
    measured, conversion, dtype = max(found, key=lambda one: one[0].gain)
    return _chosen(_open_conversion(opening, conversion, dtype), opening, (conversion.backend, dtype), measured)


def _chosen(encoder: Encoder, opening: Opening, way: Way, measured: Measured, notes: Sequence[str] = ()) -> Chosen:
    calibration = opening.calibration if way[1] == "int8" else ()
    opening = replace(opening, backend=way[0], dtype=way[1], calibration=calibration)
    gain = f"{measured.gain:.1f} times as fast as torch float32, cosine at least {measured.cosine:.5f}"
    return Chosen(encoder, opening, "; ".join([f"{' '.join(way)}: {gain}", *notes]))


class _Trial:
    """Ways to run a model, measured against PyTorch in float32, and the best of them so far.

    Args:
        exact: The model in PyTorch, in float32.
        texts: Texts of the run, which come after each of ``prompts``.
        count: How many texts the run has.
    """

    def __init__(
        self,
        opening: Opening,
        least: float,
        exact: ModelEncoder,
        prompts: Sequence[str],
        texts: Sequence[str],
        count: float,
    ) -> None:
        self._opening, self._least, self._exact, self._prompts = opening, least, exact, prompts
        self._probes = [*PROBES, *TEN_SCRIPTS, *(text[:CHECKED_CHARACTERS] for text in texts)]
        self._vectors = self._encode(exact)
        lengths = itertools.accumulate(map(len, texts or self._probes))
        self._timed = [t for t, end in zip(texts or self._probes, lengths, strict=True) if end <= TIMED_CHARACTERS]
        self._timed = self._timed or [(*texts, *self._probes)[0][:TIMED_CHARACTERS]]
        self._seconds = self._time(exact)
        self.expected = self._seconds / len(self._timed) * count
        self.best: Chosen | None = None
        self._gain = 1.0 if opening.backend in (AUTO, TORCH) and opening.dtype != "int8" else 0.0
        self.notes: list[str] = []

    def _encode(self, encoder: Encoder) -> Vectors:
        return np.concatenate([encoder.encode_texts(self._probes, prompt) for prompt in self._prompts])

    def _time(self, encoder: Encoder) -> float:
        """Seconds for the timed texts: of two runs the quicker one."""
        encode = partial(encoder.encode_texts, self._timed, self._prompts[0])
        return min(timeit.repeat(encode, number=1, repeat=2))

    def _measure(self, encoder: Encoder) -> Measured:
        cosine = float(paired_cosines(self._encode(encoder), self._vectors).min())
        return Measured(cosine, self._seconds / self._time(encoder))

    def convert(self, ways: Sequence[Way]) -> None:
        """Try conversions: all that are kept, and new ones until one is good, where the run is worth it."""
        seconds = CONVERSION_SECONDS + PARAMETER_SECONDS * sum(p.numel() for p in self._exact.model.parameters())
        falls_back, asked = self._gain > 0, self._opening.backend not in (AUTO, TORCH)
        for way in ways:
            conversion = conversion_of(self._opening, *way)
            assert conversion is not None  # the model has been opened
            if conversion.kept is None:
                if self.best or (falls_back and self.expected < PATIENCE * seconds):
                    continue
                if (failed := conversion.record.get("failed")) and not asked:
                    self.notes.append(f"{way[0]} failed before ({failed})")
                    continue
            try:
                encoder = _open_conversion(self._opening, conversion, way[1])
            except (MissingPackage, OutputError):
                raise
            except Exception as error:  # each converter raises what it likes
                problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                if asked:
                    raise ModelError(self._opening.model, f"cannot be converted for {way[0]} ({problem})") from error
                conversion.note(failed=problem)
                self.notes.append(f"{way[0]} {way[1]} failed ({problem})")
                continue
            measured = self._measure(encoder)
            conversion.note(**{way[1]: measured})
            if measured.cosine < self._least:
                self.notes.append(f"{' '.join(way)} would keep {measured.cosine:.5f}")
            elif measured.gain > self._gain:
                self._gain, self.best = measured.gain, _chosen(encoder, self._opening, way, measured, self.notes)

    def in_torch(self, opening: Opening) -> Chosen:
        """Take PyTorch; its linear layers in bfloat16 where that turns out quicker and keeps the vectors."""
        exact = self._exact
        if self._opening.dtype == AUTO:
            layers = mix_products(exact.model)
            exact.dtype = MIXED
            measured = self._measure(exact)
            if measured.cosine >= self._least and measured.gain > 1:
                return _chosen(exact, opening, (TORCH, MIXED), measured, self.notes)
            for parent, name, layer in layers:
                setattr(parent, name, layer)
            exact.dtype = "float32"
        return Chosen(exact, opening, "; ".join(["torch float32", *self.notes]))
