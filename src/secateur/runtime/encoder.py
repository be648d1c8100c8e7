"""An exported folder as an encoder: texts in, vectors out, as ``SentenceTransformer.encode`` does it.

All that decides a vector comes from the folder: the tokenizer, the prompts, the length after which a text is cut, the
graph. Batches are made by :mod:`.core`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from secateur.errors import ConfigError, DataError, MissingPackage, ModelError
from secateur.files import read_json
from secateur.provenance import EXPORT
from secateur.runtime.core import CPU_BATCH, Encoder, Tokens, Vectors

NEEDED = (
    *("backend", "precision", "quantization", "graph", "dimension", "max_length", "truncation_side", "vectors"),
    *("ranges", "prompts", "default_prompt_name", "padding", "special"),
)
"""Keys that a manifest must have."""
OUTPUT = "sentence_embedding"
DYNAMIC_GROUP = 32
"""Inputs of a matrix that share one scale, where OpenVINO rounds activations while it runs."""

VectorFormat = Literal["float32", "int8", "uint8", "binary", "ubinary"]
FORMATS: tuple[str, ...] = get_args(VectorFormat)
Ids = NDArray[np.int64]
Session = Callable[[dict[str, Ids]], Vectors]
"""From ``input_ids`` and ``attention_mask`` (batch, length), and ``prompt_length``, to vectors (batch, dimension)."""


def load(folder: str | Path, *, threads: int | None = None, dtype: str | None = None) -> ExportEncoder:
    """Open an exported folder.

    Args:
        folder: What ``secateur export`` wrote.
        threads: Threads of the backend; default: all cores.
        dtype: ``bfloat16`` has OpenVINO multiply an export in float32 so; default: as it was exported.

    Raises:
        ConfigError: The export does not go with the ``dtype``.
        ModelError: The folder is no export, or not whole.
        MissingPackage: Its backend is not installed.
    """
    folder = Path(os.path.expanduser(folder))  # noqa: PTH111 - Path.expanduser fails where nobody is called so
    try:
        manifest = read_json(folder / EXPORT)
    except DataError as error:
        raise ModelError(folder, error.problem, "give a folder that secateur export wrote") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "export":
        raise ModelError(folder, f"{EXPORT} is no manifest of an export", "give a folder that secateur export wrote")
    missing = [name for name in NEEDED if name not in manifest]
    if missing:
        raise ModelError(folder, f"{EXPORT} has no {missing[0]!r}", "export again")
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises plain Exception
        raise ModelError(folder, f"has no readable tokenizer.json ({error})") from error
    backend, precision = manifest["backend"], manifest["precision"]
    if dtype not in (None, precision) and (backend, precision, dtype) != ("openvino", "float32", "bfloat16"):
        problem = f"{dtype} is not for an export of {backend} in {precision}"
        raise ConfigError("dtype", dtype, problem, "leave it out; bfloat16 is for openvino's float32")
    manifest["precision"] = dtype or precision
    return ExportEncoder(folder, manifest, tokenizer, open_session(folder, manifest, threads))


def open_session(folder: Path, manifest: Mapping[str, Any], threads: int | None) -> Session:
    """Open an export's graph on the processor; nothing else knows of its backend."""
    opening = {"onnx": (_open_onnx, "ONNX Runtime"), "openvino": (_open_openvino, "OpenVINO")}
    backend, file = manifest["backend"], folder / manifest["graph"]
    if backend not in opening:
        raise ModelError(file, f"is for the backend {backend!r}", f"this version knows {', '.join(opening)}")
    if not file.is_file():
        raise ModelError(file, "no such file", "the export is not whole; export again")
    open_graph, name = opening[backend]
    try:
        return open_graph(file, manifest, threads)
    except ImportError:
        package = backend if backend == "openvino" else "onnxruntime"
        raise MissingPackage(package, f"an {name} export", f"pip install {package}") from None
    except Exception as error:  # onnxruntime's errors have no common base but this
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(file, f"{name} cannot open it ({first[:200]})") from error


def _open_onnx(file: Path, manifest: Mapping[str, Any], threads: int | None) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    known = {port.name for port in (*session.get_inputs(), *session.get_overridable_initializers())}

    def run(inputs: dict[str, Ids]) -> Vectors:
        return session.run([OUTPUT], {name: inputs[name] for name in known & inputs.keys()})[0]

    return run


def switch_off_telemetry() -> None:
    """OpenVINO and NNCF report their use to Intel, but not where the package that does so is missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


def _open_openvino(file: Path, manifest: Mapping[str, Any], threads: int | None) -> Session:
    switch_off_telemetry()
    import openvino

    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if manifest["precision"] == "bfloat16" else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_GROUP if manifest["quantization"] == "dynamic" else 0,
    }
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    model = openvino.Core().compile_model(str(file), "CPU", settings)
    known = {name for port in model.inputs for name in port.names}
    request, output = model.create_infer_request(), model.output(OUTPUT)

    def run(inputs: dict[str, Ids]) -> Vectors:
        found = request.infer({name: inputs[name] for name in known & inputs.keys()})
        return np.array(found[output], dtype=np.float32)  # a copy: the next call writes into the same memory

    return run


class ExportEncoder(Encoder):
    """An exported model in memory; :func:`load` makes it. One thread at a time may use it.

    ``settings`` is what the manifest says of how to encode.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], tokenizer: Tokenizer, session: Session) -> None:
        self.settings = SimpleNamespace(**manifest)
        self.name, self.dtype = str(folder), manifest["precision"]
        self.dimension, self.max_length = manifest["dimension"], manifest["max_length"]
        self.prompts, self.default_prompt = manifest["prompts"], manifest["default_prompt_name"]
        self.truncation_side = manifest["truncation_side"]
        self.vocabulary = int(tokenizer.get_vocab_size())
        self._tokenizer, self._session = tokenizer, session
        self._tokenizer.no_padding()
        self._prompt_lengths: dict[str, int] = {}

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int | None = None,
        batch_tokens: int = CPU_BATCH,
        precision: VectorFormat | None = None,
    ) -> NDArray[Any]:
        """Encode texts.

        Args:
            texts: One text or several.
            prompt_name: A name of the model's prompts; the default is the model's own default.
            prompt: Goes before each text, in place of a named one.
            batch_size: Texts in a batch, at most.
            batch_tokens: Tokens in a batch, padding included; a longer text goes alone.
            precision: Form of the vectors: ``float32``, ``int8``, ``uint8``, ``binary`` or ``ubinary``.

        Returns:
            (texts, dimension), one row for each text in their order; for one text, its row alone. A text that has no
            tokens gets a vector of zeros.

        Raises:
            DataError: A text or the prompt is not a text.
            ConfigError: There is no such prompt or precision.
            ModelError: A vector is not finite.
        """
        is_table = hasattr(texts, "columns")  # of pandas, whose items are the columns' names
        if isinstance(texts, (Mapping, Set, bytes)) or not isinstance(texts, Iterable) or is_table:
            raise DataError("texts", f"is a {type(texts).__name__}, not texts", "give one text, or a list of them")
        rows = [texts] if isinstance(texts, str) else list(texts)
        for place, text in enumerate(rows):
            _check_text("texts", f"number {place} ", text)
        form = precision or self.settings.vectors
        if form not in FORMATS:
            raise ConfigError("precision", form, f"no such form of vectors as {form!r}", f"one of {', '.join(FORMATS)}")
        if prompt is None:
            prompt = self.prompt_of(prompt_name)
        _check_text("prompt", "", prompt)
        self.batch_tokens = batch_tokens
        vectors = self.encode_texts(rows, prompt, batch_size=batch_size)
        result = quantize(vectors, form, np.asarray(self.settings.ranges, np.float32))
        return result[0] if isinstance(texts, str) else result

    def read(self, texts: Sequence[str], prompt: str, truncate: bool) -> list[Tokens]:
        if truncate:
            self._tokenizer.enable_truncation(self.max_length, direction=self.truncation_side)
        else:
            self._tokenizer.no_truncation()
        if prompt and prompt not in self._prompt_lengths:
            # Counted as sentence-transformers does: alone, without a special token at its end.
            ids = self._tokenizer.encode(prompt).ids
            self._prompt_lengths[prompt] = len(ids) - (bool(ids) and ids[-1] in self.settings.special)
        length = self._prompt_lengths.get(prompt, 0)
        found = self._tokenizer.encode_batch([prompt + text for text in texts])
        return [Tokens(np.asarray(encoding.ids, dtype=np.int32), length) for encoding in found]

    def run(self, batch: Sequence[Tokens]) -> Vectors:
        ids, mask = self.pad(batch, self.settings.padding)
        prompt_length = np.array([batch[0].prompt_length], np.int64)
        return self._session({"input_ids": ids, "attention_mask": mask, "prompt_length": prompt_length})


def _check_text(name: str, which: str, value: object) -> None:
    if not isinstance(value, str):
        raise DataError(name, f"{which}is a {type(value).__name__}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        problem = f"{which}holds half of a surrogate pair, at character {error.start}"
        raise DataError(name, problem, "decode it as UTF-8 with errors='replace'") from None


def quantize(vectors: NDArray[np.float32], form: VectorFormat, ranges: NDArray[np.float32]) -> NDArray[Any]:
    """Round vectors (texts, dimension) to bytes, or to bits packed by eight, as sentence-transformers does.

    Args:
        vectors: Vectors of length 1.
        form: ``int8`` and ``uint8``: 256 steps between each dimension's least and greatest value; ``binary`` and
            ``ubinary``: one bit a dimension, whether it is above 0, as signed and unsigned bytes.
        ranges: (2, dimension), least and greatest value of each dimension, on texts of their own.
    """
    if form == "float32":
        return vectors
    if form in ("binary", "ubinary"):
        bits: NDArray[np.uint8] = np.packbits(vectors > 0, axis=-1)
        return (bits.astype(np.int16) - 128).astype(np.int8) if form == "binary" else bits
    least, greatest = ranges
    step = (greatest - least) / np.float32(255)
    steps: NDArray[np.float32] = np.clip(np.floor((vectors - least) / np.where(step == 0, 1, step)), 0, 255)
    return (steps - 128).astype(np.int8) if form == "int8" else steps.astype(np.uint8)


def as_numbers(vectors: NDArray[Any], form: VectorFormat, dimension: int) -> NDArray[np.float32]:
    """Vectors as they are compared: bytes as numbers around 0, bits as -1 and 1."""
    if form in ("binary", "ubinary"):
        packed = (vectors.astype(np.int16) + 128).astype(np.uint8) if form == "binary" else vectors
        return np.unpackbits(packed, axis=-1, count=dimension).astype(np.float32) * 2 - 1
    numbers = vectors.astype(np.float32)
    return numbers - 128 if form == "uint8" else numbers
