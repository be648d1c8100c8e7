"""A model for runtimes without torch: traced, converted, run by :mod:`.runtime`, and compared with the original.

No folder appears whose vectors, or whose scores, differ from the original's by more than is allowed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from secateur import runtime
from secateur.data.embedders import as_model
from secateur.data.sources import read_sources
from secateur.errors import ConfigError, ExportTooFar, ModelError
from secateur.evaluation.evaluate import evaluate
from secateur.exporting.convert import FILES, PROMPT_LENGTH, EncoderGraph, Features, Form, convert, form_of
from secateur.files import new_folder
from secateur.measures.metrics import paired_cosines
from secateur.models.open_model import open_model
from secateur.models.save import NO_LIMIT, TEN_SCRIPTS, longest_text, write_files
from secateur.options import ExportOptions, step
from secateur.progress import Progress, quiet, silent
from secateur.provenance import EXPORT, Fingerprint, provenance
from secateur.results import Table
from secateur.runtime.core import Vectors
from secateur.runtime.encoder import VectorFormat
from secateur.studies.demo import pairs_of

STEP = "export"
COMPARED, CALIBRATED = 64, 96
"""Texts that an export is compared on, and other ones that it is calibrated on."""
LONG = 1024
"""Tokens in the longest text that an export is compared on, where the model would read more."""
CALIBRATION_LENGTH = 128
MIN_COSINE = {"float32": 0.9999, "float16": 0.9995, "bfloat16": 0.995, "int8": 0.9}
"""Default of ``--min-cosine``. Measured: docs/explanation/speed.md."""


@dataclass(frozen=True)
class ScoreDifference:
    """One task: the original's score and the export's, 0 to 1."""

    task: str
    original: float
    exported: float


@dataclass(frozen=True)
class Export(Table, kind="export", file=EXPORT, rows_in="scores"):
    """``export.json``: what :mod:`.runtime` needs to know, and how near the export is to the original.

    Attributes:
        graph: The graph's file.
        quantization: How activations are rounded in int8: ``static`` or ``dynamic``.
        dimension: Numbers in a vector; ``vectors`` is their form where the caller asks for none, ``ranges`` the least
            and greatest value of each, (2, dimension).
        max_length: Tokens after which a text is cut, on its ``truncation_side``.
        padding: Token id of padding; ``special`` those of special tokens.
        files: Name → bytes.
        cosine_min: Least cosine between the original's vector and the export's, over ``compared`` texts, alone and
            with each prompt; ``cosine_mean`` their mean; ``least_cosine`` what was asked for.
    """

    model: str
    backend: str
    precision: str
    quantization: str | None
    graph: str
    dimension: int
    vectors: VectorFormat
    ranges: tuple[tuple[float, ...], ...]
    max_length: int
    truncation_side: str
    padding: int
    special: tuple[int, ...]
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    files: Mapping[str, int]
    cosine_min: float
    cosine_mean: float
    least_cosine: float
    compared: int
    scores: tuple[ScoreDifference, ...] = ()

    @property
    def points_lost(self) -> float | None:
        """What the average over the tasks fell by, in points of 100; None without tasks."""
        if not self.rows:
            return None
        return 100 * float(np.mean([row.original - row.exported for row in self.rows]))


@step(ExportOptions)
def export(options: ExportOptions, *, progress: Progress = silent) -> Export:
    """Write a model for ONNX Runtime or OpenVINO, and compare it with the original.

    Returns:
        The manifest, which is in the folder as ``export.json``.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input.
        MissingPackage: The backend is not installed.
        ExportTooFar: The export's vectors or scores are too far from the original's; no folder is left.
    """
    form = form_of(options.to, options.precision, options.quantization)
    least = MIN_COSINE[options.precision] if options.min_cosine is None else options.min_cosine
    with new_folder(options.out) as folder:
        progress(STEP, 0, 100)
        compared, calibration, sources = _texts(options)
        model = open_model(
            options.model,
            pooling=options.pooling,
            max_length=options.max_length,
            dtype="float32",
            device="cpu",
            trust_remote_code=options.trust_remote_code,
        )
        whole = int(model.get_embedding_dimension() or 0)
        if options.dimensions is not None and options.dimensions > whole:
            raise ConfigError("dimensions", options.dimensions, f"cannot be {options.dimensions}", f"1 to {whole}")
        if getattr(model.tokenizer, "backend_tokenizer", None) is None:
            raise ModelError(type(model.tokenizer).__name__, "is a tokenizer in Python alone", "it cannot run without")
        compared.append(_long_text(model, compared))
        graph = EncoderGraph(model, options.dimensions)
        progress(STEP, 10, 100)
        convert(graph, form, folder, lambda: _features(model, graph, calibration))
        write_files(model, folder, weights=False)
        model[0].auto_model.config.save_pretrained(folder)
        progress(STEP, 50, 100)
        vectors = _reference_vectors(model, [*compared, *calibration], options.dimensions)
        about = _describe(model, form, folder, vectors) | {"model": str(options.model), "compared": len(compared)}
        about |= {"vectors": options.vectors, "least_cosine": least, "provenance": provenance(sources, options.seed)}
        Export(**about, cosine_min=0.0, cosine_mean=0.0).save(folder)  # the runtime reads it
        progress(STEP, 60, 100)
        encoder = runtime.load(folder)
        cosines = _cosines(model, encoder, compared, options.dimensions)
        if not cosines.min() >= least:
            problem = f"the least cosine between its vectors and the original's is {cosines.min():.4f}, below {least:g}"
            raise ExportTooFar(options.out, problem, "another --precision or --to, or a lower --min-cosine")
        progress(STEP, 70, 100)
        about |= {"cosine_min": float(cosines.min()), "cosine_mean": float(cosines.mean())}
        result = Export(**about, scores=_scores(model, encoder, options))
        if result.points_lost is not None and not result.points_lost <= options.max_loss:
            problem = f"it loses {result.points_lost:.2f} points on the average of the tasks, more than"
            hint = "another --precision or --to, or a higher --max-loss"
            raise ExportTooFar(options.out, f"{problem} {options.max_loss:g}", hint)
        result.save(folder)
        progress(STEP, 100, 100)
    return result


def _texts(options: ExportOptions) -> tuple[list[str], list[str], tuple[Fingerprint, ...]]:
    """Texts to compare on, other texts to calibrate on, and the files that they come from."""
    count = COMPARED + CALIBRATED
    opened = read_sources(options.data, most=count, seed=options.seed) if options.data else []
    rows = (row if isinstance(row, str) else row.positive for source in opened for row in source.rows)
    texts = list(dict.fromkeys(rows))
    if not options.data:
        texts = _own_texts(count)
    # Both get every second one: neighbours in a file are often alike.
    compared, calibration = texts[::2][:COMPARED], texts[1::2] or texts
    sources = tuple(source.source for source in opened)
    return [*compared, *TEN_SCRIPTS], [*calibration, *TEN_SCRIPTS][:CALIBRATED], sources


@functools.cache  # a process may export several models, and reading takes seconds
def _own_texts(count: int) -> list[str]:
    return [f"{summary} {body}" for summary, body in itertools.islice(pairs_of(""), count)]


def _long_text(model: SentenceTransformer, texts: Sequence[str]) -> str:
    """One text that the model has to cut, or that has :data:`LONG` tokens: a wrong limit shows in it alone."""
    limit = min(longest_text(model) or LONG, LONG)
    found: list[str] = []
    tokens, coming = 0, itertools.cycle(texts)
    while tokens <= limit:
        found.append(next(coming))
        read = model.tokenizer(found[-1], add_special_tokens=False, truncation=False, verbose=False)
        tokens += len(read["input_ids"])
    return " ".join(found)


def _features(model: SentenceTransformer, graph: EncoderGraph, texts: Sequence[str]) -> list[Features]:
    """Inputs of the graph for each text alone; none for a text without tokens."""
    prompt = {PROMPT_LENGTH: np.zeros(1, np.int64)} if graph.takes_prompt else {}
    return [
        {name: read[name].numpy()[:, :CALIBRATION_LENGTH] for name in ("input_ids", "attention_mask")} | prompt
        for read in (model.preprocess([text]) for text in texts)
        if read["input_ids"].numel()
    ]


def _describe(model: SentenceTransformer, form: Form, folder: Path, vectors: Vectors) -> dict[str, Any]:
    found = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in found}
    return {
        "backend": form.backend,
        "precision": form.precision,
        "quantization": form.quantization,
        "graph": FILES[form],
        "dimension": vectors.shape[1],
        "ranges": tuple(tuple(map(float, edge)) for edge in (vectors.min(axis=0), vectors.max(axis=0))),
        "max_length": longest_text(model) or NO_LIMIT,
        "truncation_side": model.tokenizer.truncation_side,
        "padding": model.tokenizer.pad_token_id or 0,
        "special": tuple(sorted(model.tokenizer.all_special_ids)),
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "files": files,
    }


def _reference_vectors(
    model: SentenceTransformer, texts: Sequence[str], dimensions: int | None, prompt: str = ""
) -> Vectors:
    short = {} if dimensions is None else {"truncate_dim": dimensions, "normalize_embeddings": True}
    with quiet():
        vectors: Vectors = model.encode(list(texts), prompt=prompt, show_progress_bar=False, **short)
    if not np.isfinite(vectors).all():
        raise ModelError(type(model[0].auto_model).__name__, "gives vectors with NaN or infinity")
    return vectors.astype(np.float32, copy=False)


def _cosines(
    model: SentenceTransformer, encoder: runtime.Encoder, texts: Sequence[str], dimensions: int | None
) -> npt.NDArray[np.float64]:
    """Cosine of each text's two vectors: without a prompt, and with each of the model's."""
    found = []
    for prompt in sorted({"", *filter(None, model.prompts.values())}):
        expected = _reference_vectors(model, texts, dimensions, prompt)
        found.append(paired_cosines(expected, encoder.encode(texts, prompt=prompt, precision="float32")))
    return np.concatenate(found)


def _scores(
    model: SentenceTransformer, encoder: runtime.Encoder, options: ExportOptions
) -> tuple[ScoreDifference, ...]:
    """Both scores of each task, those of the original with vectors of the same dimension."""
    if not options.tasks:
        return ()
    model.truncate_dim = options.dimensions or model.truncate_dim  # nothing else is done with the model
    models, names = [model, as_model(encoder)], ["original", "exported"]
    rows = evaluate(models, options.tasks, sample=options.sample, seed=options.seed, names=names).rows
    tasks = len(rows) // 2
    return tuple(ScoreDifference(a.task, a.score, b.score) for a, b in zip(rows[:tasks], rows[tasks:], strict=True))
