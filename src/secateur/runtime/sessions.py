"""One function from tokens to vectors for each backend, and nothing else of the backend anywhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from secateur.errors import MissingPackage, ModelError

OUTPUT = "sentence_embedding"
PRECISION_HINTS = {"bfloat16": "bf16"}
DYNAMIC_GROUP = 32
"""Inputs of a matrix that share one scale, where OpenVINO rounds activations while it runs."""

Ids = npt.NDArray[np.int64]
Session = Callable[[Ids, Ids, int], npt.NDArray[np.float32]]
"""``session(input_ids, attention_mask, prompt_length)``: two arrays (batch, length) to vectors (batch, dimension)."""


def open_session(file: Path, backend: str, precision: str, dynamic: bool, threads: int | None) -> Session:
    """Open a graph on the processor.

    Args:
        file: The graph.
        backend: ``onnx`` or ``openvino``.
        precision: Of the graph's arithmetic.
        dynamic: Whether activations are rounded to int8 while it runs.
        threads: Threads of the backend; None: all cores.

    Raises:
        MissingPackage: The backend is not installed.
        ModelError: The backend cannot read the file.
    """
    opening = {"onnx": _open_onnx, "openvino": _open_openvino}
    if backend not in opening:
        raise ModelError(file, f"is for the backend {backend!r}", f"this version knows {', '.join(opening)}")
    if not file.is_file():
        raise ModelError(file, "no such file", "the export is not whole; export again")
    return opening[backend](file, precision, dynamic, threads)


def _open_onnx(file: Path, precision: str, dynamic: bool, threads: int | None) -> Session:
    try:
        import onnxruntime
    except ImportError:
        raise MissingPackage("onnxruntime", "an ONNX export", "pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base but this
        raise ModelError(file, f"ONNX Runtime cannot open it ({_first_line(error)})") from error
    known = {port.name for port in (*session.get_inputs(), *session.get_overridable_initializers())}

    def run(ids: Ids, mask: Ids, prompt_length: int) -> npt.NDArray[np.float32]:
        vectors: npt.NDArray[np.float32] = session.run([OUTPUT], _feed(known, ids, mask, prompt_length))[0]
        return vectors

    return run


def _open_openvino(file: Path, precision: str, dynamic: bool, threads: int | None) -> Session:
    try:
        import openvino
    except ImportError:
        raise MissingPackage("openvino", "an OpenVINO export", "pip install openvino") from None
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISION_HINTS.get(precision, "f32")}
    settings |= {"PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_GROUP if dynamic else 0}
    settings |= {"INFERENCE_NUM_THREADS": threads} if threads else {}
    try:
        model = openvino.Core().compile_model(str(file), "CPU", settings)
    except RuntimeError as error:
        raise ModelError(file, f"OpenVINO cannot open it ({_first_line(error)})") from error
    known = {name for port in model.inputs for name in port.names}
    request, output = model.create_infer_request(), model.output(OUTPUT)

    def run(ids: Ids, mask: Ids, prompt_length: int) -> npt.NDArray[np.float32]:
        # A copy: the next call writes into the same memory.
        return np.array(request.infer(_feed(known, ids, mask, prompt_length))[output], dtype=np.float32)

    return run


def _feed(known: set[str], ids: Ids, mask: Ids, prompt_length: int) -> dict[str, Ids]:
    whole = {"input_ids": ids, "attention_mask": mask, "prompt_length": np.array([prompt_length], np.int64)}
    return {name: value for name, value in whole.items() if name in known}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
