"""An encoder's graph in the formats of ONNX Runtime and OpenVINO, and their weights in fewer bits.

The graph is traced once, in float32, by transformers' own exporters; fewer bits are made from the written graph, by
the tools of the backend that will run it. docs/reference/exports.md says what each precision stores and computes.
In int8, activations are quantized with ranges that are calibrated on texts (``static``) or anew in every batch
(``dynamic``); outlier channels stay in floats (:func:`.split_outliers`).
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from secateur.errors import ConfigError, MissingPackage, ModelError
from secateur.exporting.graph import PROMPT_LENGTH, EncoderGraph, Features, Shapes, split_outliers
from secateur.progress import quiet

LARGEST_PROTOBUF = 1_900_000_000
SMOOTHING = 0.6
"""How much of the spread between channels goes from activations to weights (alpha of SmoothQuant, arXiv 2211.10438).

NNCF's own 0.95 leaves 3.6 times the squared error with all-MiniLM-L6-v2.
"""

SMALL = 1024
"""Initializers of fewer numbers stay as they are: they save nothing, and some are scales."""


class Form(NamedTuple):
    """What to write. ``quantization`` is ``static`` or ``dynamic`` in int8, else None."""

    backend: str
    precision: str
    quantization: str | None

    @property
    def file(self) -> str:
        """Where sentence-transformers, transformers.js and the servers look for such a graph."""
        return FILES[self]


FILES = {
    Form("onnx", "float32", None): "onnx/model.onnx",
    Form("onnx", "float16", None): "onnx/model_fp16.onnx",
    Form("onnx", "bfloat16", None): "onnx/model_bf16.onnx",
    Form("onnx", "int8", "dynamic"): "onnx/model_quantized.onnx",
    Form("onnx", "int8", "static"): "onnx/model_static_quantized.onnx",
    Form("openvino", "float32", None): "openvino/openvino_model.xml",
    Form("openvino", "float16", None): "openvino/openvino_model_fp16.xml",
    Form("openvino", "bfloat16", None): "openvino/openvino_model_bf16.xml",
    Form("openvino", "int8", "static"): "openvino/openvino_model_qint8_quantized.xml",
    Form("openvino", "int8", "dynamic"): "openvino/openvino_model_qint8_dynamic.xml",
}
FASTEST = {"onnx": "dynamic", "openvino": "static"}
"""The faster quantization to int8 on each backend (docs/explanation/results.md)."""

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


def form_of(backend: str, precision: str, quantization: str | None) -> Form:
    """What to write, with the default quantization filled in.

    Raises:
        ConfigError: A quantization is given for another precision than int8.
        MissingPackage: A package that writes this form is not installed.
    """
    if quantization is not None and precision != "int8":
        problem = f"means nothing in {precision}"
        raise ConfigError("quantization", quantization, problem, "it goes with --precision int8")
    form = Form(backend, precision, (quantization or FASTEST[backend]) if precision == "int8" else None)
    uses_nncf = precision == "int8" and form != Form("onnx", "int8", "dynamic")
    for package in (*PACKAGES[backend], *(("nncf",) if uses_nncf else ())):
        if find_spec(package) is None:
            raise MissingPackage(package, f"export to {backend}", f"pip install 'secateur[{backend}]'")
    return form


def convert(graph: EncoderGraph, form: Form, folder: Path, calibration: Callable[[], Sequence[Features]]) -> None:
    """Write a graph into an export's folder, where ``form.file`` says.

    ``calibration`` gives the inputs that int8 is calibrated on; it is not called for anything else.

    Raises:
        ModelError: The architecture cannot be traced.
        ConfigError: Its weights do not fit the precision.
    """
    file = folder / form.file
    file.parent.mkdir(parents=True, exist_ok=True)
    write = {"onnx": _write_onnx, "openvino": _write_openvino}[form.backend]
    samples = calibration() if form.precision == "int8" else ()
    logging_before = logging.root.manager.disable
    with (
        quiet(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        split_outliers(graph, samples) as floats,
    ):
        logging.disable(logging.WARNING)
        try:
            write(graph, form, file, samples, floats)
        finally:
            logging.disable(logging_before)


def _trace(graph: EncoderGraph, exporter: Any, config: Any) -> Any:
    """The graph as ``exporter``'s program, for batches of every size."""
    ids = torch.full((2, 9), 1)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if graph.takes_prompt:
        inputs[PROMPT_LENGTH] = torch.tensor([2])
    try:
        with torch.no_grad():
            return exporter.export(graph.eval(), inputs, config=config).program
    except Exception as error:  # tracing raises errors of every kind, in every layer below
        lines = str(error).strip().splitlines() or [""]
        problem = f"cannot be traced ({type(error).__name__}: {lines[0][:200]})"
        raise ModelError(type(graph.transformer).__name__, problem, "try the other backend") from error


def _write_openvino(graph: EncoderGraph, form: Form, file: Path, samples: Sequence[Features], floats: Shapes) -> None:
    import openvino
    from openvino._offline_transformations import compress_model_transformation
    from transformers.exporters import OpenVINOConfig, OpenVINOExporter

    def shape(op: Any) -> tuple[int, ...]:
        partial = op.input(1).get_partial_shape()
        return tuple(sorted(partial.to_shape())) if partial.is_static else ()

    model = _trace(graph, OpenVINOExporter(), OpenVINOConfig(dynamic=True))
    if form.precision == "int8":
        import nncf

        products = [op for op in model.get_ops() if op.get_type_name() == "MatMul"]
        spared = [op.get_friendly_name() for op in products if shape(op) in floats]
        if form.quantization == "static":
            model = _static_int8(model, samples, spared)
        else:
            scope = nncf.IgnoredScope(names=spared)
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM, ignored_scope=scope)
    if form.precision != "float32":
        _check_half(form, float(max(p.abs().max() for p in graph.parameters())))
        compress_model_transformation(model)
    hint = "bf16" if form.precision == "bfloat16" else "f32"
    model.set_rt_info(hint, ["runtime_options", "INFERENCE_PRECISION_HINT"])
    openvino.save_model(model, str(file), compress_to_fp16=False)


def _write_onnx(graph: EncoderGraph, form: Form, file: Path, samples: Sequence[Features], floats: Shapes) -> None:
    import onnx
    from transformers.exporters import OnnxConfig, OnnxExporter

    program = _trace(graph, OnnxExporter(), OnnxConfig(dynamic=True))
    traced = file.with_name("traced.onnx")
    OnnxExporter.save_program(program, traced)
    model = onnx.load(traced)
    for written in OnnxExporter.program_files(traced.name):
        (file.parent / written).unlink(missing_ok=True)
    if graph.takes_prompt:  # a default for consumers that know the ids and the mask alone: a prompt of no tokens
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(1, np.int64), PROMPT_LENGTH))
    if form.precision == "int8":
        # onnxruntime infers shapes anew, and stumbles over those of weights that it has transposed.
        weights = {item.name for item in model.graph.initializer}
        infos = [info for info in model.graph.value_info if info.name not in weights]
        del model.graph.value_info[:]
        model.graph.value_info.extend(infos)
        model = _onnx_int8(model, form, file, samples, floats)
    if form.precision != "float32":
        _store_in_half(model, form)
    if model.ByteSize() < LARGEST_PROTOBUF:
        onnx.save(model, file)
    else:  # beyond what a protobuf holds, the weights are in a second file, named as transformers.js has it
        onnx.save(model, file, save_as_external_data=True, location=f"{file.name}_data")


def _onnx_int8(model: Any, form: Form, file: Path, samples: Sequence[Features], floats: Shapes) -> Any:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    few = {item.name for item in model.graph.initializer if tuple(sorted(item.dims)) in floats}
    spared = [node.name for node in model.graph.node if few.intersection(node.input)]
    if form.quantization == "static":
        return _static_int8(model, samples, spared)
    options = {"weight_type": QuantType.QInt8, "per_channel": True, "op_types_to_quantize": ["MatMul", "Gemm"]}
    quantize_dynamic(model, file, nodes_to_exclude=spared, **options)
    quantized = onnx.load(file)
    file.unlink()
    return quantized


def _static_int8(model: Any, samples: Sequence[Features], spared: Sequence[str]) -> Any:
    """Quantize matrices and activations by their ranges on ``samples``, with NNCF, but for the nodes ``spared``."""
    import nncf
    from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters

    smoothing = AdvancedSmoothQuantParameters(matmul=SMOOTHING)
    return nncf.quantize(
        model,
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
        ignored_scope=nncf.IgnoredScope(names=list(spared)),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smoothing),
    )


def _store_in_half(model: Any, form: Form) -> None:
    """Keep large float32 weights in 16 bits, each with a cast back behind it."""
    import ml_dtypes
    import onnx

    half: Any = ml_dtypes.bfloat16 if form.precision == "bfloat16" else np.float16
    casts = []
    for i, item in enumerate(model.graph.initializer):
        if item.data_type != onnx.TensorProto.FLOAT or np.prod(item.dims) < SMALL:
            continue
        values = onnx.numpy_helper.to_array(item)
        if half is np.float16:
            _check_half(form, float(np.abs(values).max()))
        name = item.name
        model.graph.initializer[i].CopyFrom(onnx.numpy_helper.from_array(values.astype(half), f"{name}.half"))
        casts.append(onnx.helper.make_node("Cast", [f"{name}.half"], [name], to=onnx.TensorProto.FLOAT))
    for place, cast in enumerate(casts):
        model.graph.node.insert(place, cast)


def _check_half(form: Form, largest: float) -> None:
    if largest > np.finfo(np.float16).max:
        problem = f"a weight of {largest:.3g} does not fit half precision"
        raise ConfigError("precision", form.precision, problem, "export in float32")
