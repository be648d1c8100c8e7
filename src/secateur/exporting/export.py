"""A model for runtimes without torch: traced, written, run by that runtime, and compared with the original.

The folder that comes out is complete: the graph does all that lies between token ids and a finished vector, and
``export.json`` and ``tokenizer.json`` tell the rest. :mod:`.runtime` runs it, here already: what is compared is
what users will get. No folder appears whose vectors, or whose scores, differ by more than is allowed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from secateur import runtime
from secateur.data.demo import pairs_of
from secateur.data.sources import Data, read_sources
from secateur.errors import ConfigError, ExportTooFar, ModelError
from secateur.exporting.compatibility import compatibility
from secateur.exporting.convert import Form, convert, form_of
from secateur.exporting.faithfulness import cosines, reference_vectors, score_both
from secateur.exporting.graph import EncoderGraph
from secateur.exporting.manifest import Export
from secateur.exporting.outliers import Features
from secateur.files import new_folder
from secateur.models.open_model import open_model
from secateur.models.save import NO_LIMIT, longest_text, write_files
from secateur.options import SavedPooling
from secateur.progress import Progress, silent
from secateur.provenance import Fingerprint, provenance
from secateur.runtime.vectors import FORMATS, VectorFormat

STEP = "export"
COMPARED, CALIBRATED = 64, 96
"""Texts that an export is compared on, and other ones that it is calibrated on."""

LONG = 1024
"""Tokens in the longest text that an export is compared on, where the model would read more."""

CALIBRATION_LENGTH = 128
LEAST_COSINE = {"float32": 0.9999, "float16": 0.9995, "bfloat16": 0.995, "int8": 0.9}
"""Of the text that fares worst. Measured: docs/export.md."""

WORLD = (
    "The gardener cut the hedge back to half its height.",
    "Садовник подстриг живую изгородь наполовину.",
    "园丁把树篱修剪到一半高。",
    "庭師は生け垣を半分の高さに刈り込んだ。",
    "정원사가 울타리를 절반 높이로 다듬었다.",
    "قلّم البستاني السياج إلى نصف ارتفاعه.",
    "הגנן גזם את הגדר החיה לחצי מגובהה.",
    "माली ने बाड़ को आधी ऊँचाई तक काट दिया।",
    "คนสวนตัดแต่งรั้วต้นไม้ให้เหลือครึ่งหนึ่ง",
    "Ο κηπουρός κλάδεψε τον φράχτη στο μισό ύψος.",
    "def prune(model, depth): return model[:depth]  # 🌿",
)
"""Ten scripts and a line of code, beside the texts of the user or of the documentation that is installed."""


def export(
    model: str | Path,
    *,
    to: str = "onnx",
    precision: str = "float32",
    quantization: str | None = None,
    data: Data = (),
    dimensions: int | None = None,
    vectors: VectorFormat = "float32",
    tasks: Sequence[str | Path] = (),
    sample: int | None = None,
    seed: int = 42,
    min_cosine: float | None = None,
    max_loss: float = 0.5,
    pooling: SavedPooling | None = None,
    max_length: int = 512,
    trust_remote_code: bool = False,
    out: str | Path,
    progress: Progress = silent,
) -> Export:
    """Write a model for ONNX Runtime or OpenVINO, and compare it with the original.

    Args:
        model: Anything :func:`.open_model` opens.
        to: ``onnx`` or ``openvino``.
        precision: ``float32``, ``float16``, ``bfloat16`` or ``int8``; see :mod:`.convert`.
        quantization: In int8, how activations are rounded: ``static`` or ``dynamic``. Default: what is faster.
        data: Files of texts or pairs, or folders, to calibrate and compare on. Default: documentation of Python.
        dimensions: Keep so many numbers of each vector.
        vectors: Form in which the runtime gives vectors: ``float32``, ``int8``, ``uint8``, ``binary``, ``ubinary``.
        tasks: Tasks to score the original and the export on, as for :func:`.evaluate`.
        sample: Use a seeded sample of this size of each task.
        seed: Of the samples.
        min_cosine: Least cosine that any text may have. Default: by precision, :data:`LEAST_COSINE`.
        max_loss: Points (of 100) that the average over the tasks may fall by.
        pooling: For a bare language model.
        max_length: For a bare language model.
        trust_remote_code: As for ``open_model``.
        out: The folder to write; it must not hold anything yet.
        progress: Told how much is done, in per cent.

    Returns:
        The manifest, which is in the folder as ``export.json``.

    Raises:
        ModelError, DataError, ConfigError, OutputError: Bad input.
        MissingPackage: The backend is not installed.
        ExportTooFar: The export's vectors or scores are too far from the original's; no folder is left.
    """
    form = form_of(to, precision, quantization)
    if vectors not in FORMATS:
        raise ConfigError("vectors", vectors, f"no such form as {vectors!r}", f"one of {', '.join(FORMATS)}")
    least = LEAST_COSINE[precision] if min_cosine is None else min_cosine
    if not -1 <= least <= 1:
        raise ConfigError("min_cosine", least, f"{least} is no cosine", "-1 to 1")
    with new_folder(out) as folder:
        progress(STEP, 0, 100)
        compared, calibration, sources = _texts(data, seed)
        opened = open_model(
            model,
            pooling=pooling,
            max_length=max_length,
            dtype="float32",
            device="cpu",
            trust_remote_code=trust_remote_code,
        )
        compared.append(_long_text(opened, compared))
        graph = EncoderGraph(opened, _check_dimensions(dimensions, opened))
        progress(STEP, 10, 100)
        convert(graph, form, folder, lambda: _features(opened, graph, calibration))
        _write_rest(opened, folder)
        progress(STEP, 50, 100)
        expected = reference_vectors(opened, [*compared, *calibration], dimensions)
        about = _describe(opened, form, folder, expected, vectors) | {"least_cosine": least, "model": str(model)}
        about |= {"provenance": provenance(sources, seed)}
        draft = Export(**about, cosine_min=0.0, cosine_mean=0.0, compared=len(compared))
        draft.save(folder)
        progress(STEP, 60, 100)
        encoder = runtime.load(folder)
        found = cosines(opened, encoder, compared, expected[: len(compared)], dimensions)
        if not found.min() >= least:
            problem = f"the least cosine between its vectors and the original's is {found.min():.4f}, below {least:g}"
            raise ExportTooFar(out, problem, "another --precision or --to, or a lower --min-cosine")
        progress(STEP, 70, 100)
        scores = score_both(opened, encoder, tasks, sample, seed, dimensions)
        about |= {"cosine_min": float(found.min()), "cosine_mean": float(found.mean()), "scores_by_task": scores}
        result = Export(**about, compared=len(compared), readers=_readers(folder))
        if result.points_lost is not None and not result.points_lost <= max_loss:
            problem = f"it loses {result.points_lost:.2f} points on the average of the tasks, more than {max_loss:g}"
            raise ExportTooFar(out, problem, "another --precision or --to, or a higher --max-loss")
        result.save(folder)
        progress(STEP, 100, 100)
    return result


def _check_dimensions(dimensions: int | None, model: SentenceTransformer) -> int | None:
    whole = int(model.get_embedding_dimension() or 0)
    if dimensions is not None and not 0 < dimensions <= whole:
        raise ConfigError("dimensions", dimensions, f"cannot be {dimensions}", f"1 to {whole}")
    return dimensions


def _texts(data: Data, seed: int) -> tuple[list[str], list[str], tuple[Fingerprint, ...]]:
    """Texts to compare on, other texts to calibrate on, and the files that they come from."""
    count = COMPARED + CALIBRATED
    sources: tuple[Fingerprint, ...] = ()
    if data:
        whole = read_sources(data)
        opened = [source.sample(-(-count // len(whole)), seed) for source in whole]
        sources = tuple(source.source for source in opened)
        rows = (row if isinstance(row, str) else row.positive for source in opened for row in source.rows)
        texts = list(dict.fromkeys(rows))
    else:
        texts = [f"{summary} {body}" for summary, body in itertools.islice(pairs_of(""), count)]
    # Both get every second one: what stands side by side in a file is often alike.
    compared, calibration = texts[::2][:COMPARED], texts[1::2] or texts
    return [*compared, *WORLD], [*calibration, *WORLD][:CALIBRATED], sources


def _long_text(model: SentenceTransformer, texts: Sequence[str]) -> str:
    """Texts as one that the model has to cut, or that has :data:`LONG` tokens: in it alone other limits show."""
    limit = min(longest_text(model) or LONG, LONG)
    found: list[str] = []
    tokens = 0
    for text in itertools.cycle(texts):
        found.append(text)
        tokens += len(model.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])
        if tokens > limit:
            break
    return " ".join(found)


def _features(model: SentenceTransformer, graph: EncoderGraph, texts: Sequence[str]) -> list[Features]:
    """Inputs of the graph for each text alone."""
    features = []
    for text in texts:
        read = model.preprocess([text])
        one = {name: read[name].numpy()[:, :CALIBRATION_LENGTH] for name in ("input_ids", "attention_mask")}
        if not one["input_ids"].size:
            continue
        features.append(one | ({"prompt_length": np.zeros(1, np.int64)} if graph.takes_prompt else {}))
    return features


def _write_rest(model: SentenceTransformer, folder: Path) -> None:
    """All but the weights: tokenizer, configuration, modules."""
    if getattr(model.tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(type(model.tokenizer).__name__, "is a tokenizer in Python alone", "it cannot run without it")
    write_files(model, folder, weights=False)
    model[0].auto_model.config.save_pretrained(folder)


def _describe(
    model: SentenceTransformer, form: Form, folder: Path, vectors: npt.NDArray[np.float32], given: VectorFormat
) -> dict[str, Any]:
    """The manifest's fields that follow from the model and from the written files."""
    tokenizer = model.tokenizer
    files = {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}
    return {
        "backend": form.backend,
        "precision": form.precision,
        "quantization": form.quantization,
        "graph": form.file,
        "dimension": vectors.shape[1],
        "vectors": given,
        "ranges": tuple(tuple(map(float, edge)) for edge in (vectors.min(axis=0), vectors.max(axis=0))),
        "max_length": longest_text(model) or NO_LIMIT,
        "truncation_side": tokenizer.truncation_side,
        "padding": tokenizer.pad_token_id or 0,
        "special": tuple(sorted(tokenizer.all_special_ids)),
        "prompts": dict(model.prompts),
        "default_prompt_name": model.default_prompt_name,
        "files": files,
    }


def _readers(folder: Path) -> dict[str, dict[str, str]]:
    return {note.reader: {"loads": note.loads, "why": note.why} for note in compatibility(folder)}
