"""The choice of what runs a model on this processor, and in what it multiplies.

``auto`` is the quickest of what is installed whose vectors keep a cosine to those of PyTorch in float32, measured on
texts of the run. Converting takes a while: a job that is done sooner does not wait for it, and what is converted is
kept (:mod:`.opening`).
"""

from __future__ import annotations

import itertools
import math
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial

import numpy as np

from secateur import runtime
from secateur.errors import ConfigError, MissingPackage, ModelError, OutputError
from secateur.exporting.convert import form_of
from secateur.inference.encoders import ModelEncoder
from secateur.inference.opening import (
    AUTO,
    BFLOAT16,
    STORED,
    TORCH,
    Conversion,
    Measured,
    Opening,
    conversion_of,
    open_conversion,
    open_encoder,
    open_torch,
    precision_of,
)
from secateur.measures.metrics import paired_cosines
from secateur.models.save import PROBES, TEN_SCRIPTS
from secateur.runtime.core import Encoder, Vectors

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
        least: The cosine to PyTorch in float32 that each measured text must keep.
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
        _check_together(opening)
    opening = replace(opening, calibration=tuple(texts))
    if is_decided(opening):
        encoder = open_encoder(opening)
        backend = encoder.settings.backend if isinstance(encoder, runtime.Encoder) else TORCH
        dtype = encoder.dtype if opening.dtype == AUTO else opening.dtype
        return Chosen(encoder, replace(opening, backend=backend, dtype=dtype), "")

    falls_back = opening.backend in (AUTO, TORCH) and opening.dtype != "int8"
    exact_opening = replace(opening, backend=TORCH, dtype="float32", calibration=())
    exact = cache(lambda: _Exact(open_torch(exact_opening), texts, prompts_of))
    notes: list[str] = []
    if best := _best_conversion(opening, least, count, falls_back, exact, notes):
        return best
    if not falls_back:
        problem = f"nothing that was tried keeps a cosine of {least:g} ({'; '.join(notes)})"
        raise ModelError(opening.model, problem, "--backend torch, or a lower --min-cosine")
    return Chosen(exact().encoder, exact_opening, "; ".join(["torch float32", *notes]) if count else "")


def _best_conversion(
    opening: Opening, least: float, count: float, falls_back: bool, exact: Callable[[], _Exact], notes: list[str]
) -> Chosen | None:
    """The quickest conversion that keeps the cosine; ``notes`` get what is wrong with others.

    What was measured before is believed, but where there are texts of a run to measure it anew. A way that would have
    to be converted is tried only where no quicker one is good.
    """
    asked = opening.backend not in (AUTO, TORCH)
    best: tuple[Conversion, str, Measured, Encoder | None] | None = None
    for backend, dtype in _ways(opening, least):
        conversion = conversion_of(opening, backend, dtype)
        kept, encoder = conversion.kept, None
        measured = conversion.measured(dtype) if kept and count in (0, math.inf) else None
        if measured is None:
            if falls_back and not count:
                continue
            reference = exact()  # says what is wrong with the model
            if not kept and (best or (falls_back and not reference.is_worth_a_conversion(count))):
                continue
            if not kept and not asked and (failed := conversion.record.get("failed")):
                notes.append(f"{backend} failed before ({failed})")
                continue
            try:
                encoder = open_conversion(conversion, dtype)
            except (MissingPackage, OutputError):
                raise
            except Exception as error:  # each converter raises what it likes
                problem = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
                if asked:
                    raise ModelError(opening.model, f"cannot be converted for {backend} ({problem})") from error
                conversion.note("failed", problem)
                notes.append(f"{backend} {dtype} failed ({problem})")
                continue
            measured = reference.measure(encoder)
            conversion.note(dtype, measured)
        if measured.cosine < least:
            notes.append(f"{backend} {dtype} would keep {measured.cosine:.5f}")
        elif measured.gain > (best[2].gain if best else 1.0 if falls_back else 0.0):
            best = conversion, dtype, measured, encoder
    if best is None:
        return None
    conversion, dtype, measured, found = best
    calibration = opening.calibration if dtype == "int8" else ()
    opening = replace(opening, backend=conversion.backend, dtype=dtype, calibration=calibration)
    gain = f"{measured.gain:.1f} times as fast as torch float32, cosine at least {measured.cosine:.5f}"
    told = "; ".join([f"{opening.backend} {dtype}: {gain}", *notes])
    return Chosen(found or open_conversion(conversion, dtype), opening, told)


def _check_together(opening: Opening) -> None:
    """Refuse a backend, dtype and device that do not go together."""
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
    alone = opening.dtype in (STORED, BFLOAT16, "float16")  # in torch, where no backend is named
    return opening.exported or not opening.on_cpu or alone or AUTO not in (opening.backend, opening.dtype)


def _ways(opening: Opening, least: float) -> list[Way]:
    """What may be tried, the quickest on most processors first; an error where what was asked for is not installed."""
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


class _Exact:
    """The model in PyTorch in float32, by which the others are measured, on texts of the run after each prompt."""

    def __init__(
        self, encoder: ModelEncoder, texts: Sequence[str], prompts_of: Callable[[Encoder], Sequence[str]]
    ) -> None:
        self.encoder, self._prompts = encoder, prompts_of(encoder)
        self._probes = [*PROBES, *TEN_SCRIPTS, *(text[:CHECKED_CHARACTERS] for text in texts)]
        timed = texts or self._probes
        ends = itertools.accumulate(map(len, timed))
        self._timed = [text for text, end in zip(timed, ends, strict=True) if end <= TIMED_CHARACTERS]
        self._timed = self._timed or [timed[0][:TIMED_CHARACTERS]]

    @cached_property
    def _vectors(self) -> Vectors:
        return self._encode(self.encoder)

    @cached_property
    def _seconds(self) -> float:
        return self._time(self.encoder)

    def is_worth_a_conversion(self, count: float) -> bool:
        """Whether so many texts take longer than a conversion."""
        parameters = sum(p.numel() for p in self.encoder.model.parameters())
        conversion: float = CONVERSION_SECONDS + PARAMETER_SECONDS * parameters
        return self._seconds / len(self._timed) * count >= PATIENCE * conversion

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
