"""An encoder as a graph, in the formats of ONNX Runtime and OpenVINO, and its weights in fewer bits.

The graph takes token ids and gives finished vectors: pooling (without the prompt where the model leaves it out) and all
after it are in it, so that no consumer can do them in another way. It is traced once, in float32, by transformers' own
exporters; fewer bits are made from the written graph, by the tools of the backend that will run it.
docs/reference/exports.md says what each precision stores and computes.

For int8, input channels that are far larger than all others are kept in floats. One scale serves a whole tensor of
activations, and where a few channels are a hundred times as large as the rest (massive activations, arXiv 2402.17762),
it rounds the rest to nearly nothing. A product with such an input is written as two: the few channels in floats, the
others in int8 (LLM.int8(), arXiv 2208.07339).
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import normalize

from secateur.errors import ConfigError, MissingPackage, ModelError
from secateur.progress import quiet
from secateur.runtime.encoder import switch_off_telemetry

PROMPT_LENGTH = "prompt_length"
"""The input that says how many tokens of each text are its prompt's, where the model does not pool them."""
OUTLIER = 8.0
"""An outlier channel's greatest magnitude is more than so many times that of the channel at :data:`QUANTILE`."""
QUANTILE = 0.99
"""At most the hundredth part of all channels can be outliers, so that what stays in floats costs next to nothing."""

Features = dict[str, npt.NDArray[np.int64]]
"""Inputs of the graph, by name."""
Shapes = frozenset[tuple[int, ...]]
"""Shapes of matrices that stay in floats, the shorter side first: by these a backend's graph shows which they are."""
LARGEST_PROTOBUF = 1_900_000_000
SMOOTHING = 0.6
"""How much of the spread between channels goes from activations to weights (alpha of SmoothQuant, arXiv 2211.10438).

NNCF's own 0.95 leaves 3.6 times the squared error with all-MiniLM-L6-v2.
"""
SMALL = 1024
"""Initializers of fewer numbers, and rows, stay as they are: they save nothing, and some are scales."""


class EncoderGraph(nn.Module):
    """A ``SentenceTransformer`` of one transformer, one pooling and what follows, as a function of tensors.

    Args:
        model: Raises ModelError where it is made of other modules.
        dimensions: Keep so many dimensions of each vector, and normalise it again (Matryoshka, arXiv 2205.13147).
            Default: as many as the model's ``truncate_dim`` keeps, as they are.
    """

    def __init__(self, model: SentenceTransformer, dimensions: int | None = None) -> None:
        super().__init__()
        first, *rest = model
        poolings = [isinstance(module, Pooling) for module in rest]
        if not isinstance(first, Transformer) or poolings[:1] != [True] or sum(poolings) > 1:
            name = model.model_card_data.base_model or "model"
            found = ", ".join(type(module).__name__ for module in model)
            raise ModelError(name, f"is made of {found}", "only a transformer followed by a pooling can be exported")
        self.transformer = first.auto_model
        self.config = self.transformer.config
        self.pooling, self.rest = rest[0], nn.ModuleList(rest[1:])
        self.dimensions, self.truncate_dim = dimensions, model.truncate_dim
        accepted = inspect.signature(self.transformer.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    @property
    def takes_prompt(self) -> bool:
        """Whether vectors depend on how many of the tokens are a prompt's."""
        return not self.pooling.include_prompt

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor | None = None
    ) -> dict[str, Tensor]:
        """From ids (batch, length), of whose texts the first ``prompt_length`` (1,) tokens are the prompt's, to
        ``token_embeddings`` (batch, length, width) and ``sentence_embedding`` (batch, dimension).
        """
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **self._options)
        states = output.last_hidden_state
        vectors = pool(self.pooling, states, attention_mask, prompt_length)
        features = {"token_embeddings": states, "attention_mask": attention_mask, "sentence_embedding": vectors}
        for module in self.rest:
            features = module(features)
        vectors = features["sentence_embedding"]
        if self.dimensions is not None:
            vectors = normalize(vectors[:, : self.dimensions], dim=-1)
        elif self.truncate_dim is not None:
            vectors = vectors[:, : self.truncate_dim]
        return {"token_embeddings": states, "sentence_embedding": vectors}


def pool(pooling: Pooling, states: Tensor, mask: Tensor, prompt_length: Tensor | None) -> Tensor:
    """What a pooling module makes of states (batch, length, width): (batch, dimension).

    sentence-transformers' own pooling branches on the data, which a graph cannot.
    """
    place = torch.cumsum(mask, dim=1)  # of each token in its text, from 1, whichever side is padded
    text = mask if prompt_length is None else mask * (place > prompt_length).to(mask.dtype)
    modes = (pooling.pooling_mode,) if isinstance(pooling.pooling_mode, str) else pooling.pooling_mode
    return torch.cat([_pool_by(mode, states, text, place) for mode in modes], dim=-1)


def _pool_by(mode: str, states: Tensor, mask: Tensor, place: Tensor) -> Tensor:
    weights = mask.to(states.dtype)
    if mode == "weightedmean":
        weights = weights * place.to(states.dtype)
    elif mode == "cls":
        # A text of which nothing is pooled gives its first token, as the stock module does.
        first = mask.to(torch.int32).argmax(dim=1)
        return states[torch.arange(states.shape[0], device=states.device), first]
    elif mode == "lasttoken":
        weights = ((torch.cumsum(mask, dim=1) == mask.sum(dim=1, keepdim=True)) * mask).to(states.dtype)
        return (states * weights.unsqueeze(-1)).sum(dim=1)
    elif mode == "max":
        return states.masked_fill(mask.unsqueeze(-1) == 0, float("-inf")).amax(dim=1)
    total = (states * weights.unsqueeze(-1)).sum(dim=1)
    count = weights.sum(dim=1, keepdim=True).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


class SplitLinear(nn.Module):
    """A linear layer as the sum of two products: of its outlier channels (places among its inputs), and of the rest."""

    def __init__(self, linear: nn.Linear, channels: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.channels = nn.Buffer(channels)
        self.others = nn.Buffer(torch.ones(linear.in_features).index_fill(0, channels, 0))
        self.few = nn.Buffer(linear.weight.detach()[:, channels].T.contiguous())

    def forward(self, states: Tensor) -> Tensor:
        """States (…, in) → (…, out)."""
        return self.linear(states * self.others) + states.index_select(-1, self.channels) @ self.few


@contextlib.contextmanager
def split_outliers(graph: EncoderGraph, samples: Sequence[Features]) -> Iterator[Shapes]:
    """Split linear layers where ``samples`` show outlier channels, until the end of the block; gives the shapes of the
    matrices that are to stay in floats.
    """
    layers = {name: layer for name, layer in graph.transformer.named_modules() if type(layer) is nn.Linear}
    maxima: dict[str, Tensor] = {}  # the greatest magnitude in each input channel (in,) of each layer that is used

    def observe(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = args[0].abs().flatten(0, -2).amax(0)
        maxima[name] = torch.maximum(maxima.get(name, found), found)

    with contextlib.ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(partial(observe, name)))
        for sample in samples:
            graph(**{name: torch.from_numpy(values) for name, values in sample.items()})
    split: dict[str, SplitLinear] = {}
    for name, values in maxima.items():
        channels = (values > OUTLIER * values.quantile(QUANTILE, interpolation="lower")).nonzero().flatten()
        if len(channels):
            split[name] = SplitLinear(layers[name], channels)
    try:
        for name, both in split.items():
            graph.transformer.set_submodule(name, both)
        yield frozenset(tuple(sorted(both.few.shape)) for both in split.values())
    finally:
        for name in split:
            graph.transformer.set_submodule(name, layers[name])


class Form(NamedTuple):
    """What to write. ``quantization`` is ``static`` or ``dynamic`` in int8, else None."""

    backend: str
    precision: str
    quantization: str | None


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
"""Where sentence-transformers, transformers.js and the servers look for such a graph."""
FASTEST = {"onnx": "dynamic", "openvino": "static"}
"""The faster quantization to int8 on each backend (docs/explanation/speed.md)."""

PACKAGES = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("openvino",)}


def form_of(backend: str, precision: str, quantization: str | None) -> Form:
    """What to write, with the default quantization filled in; MissingPackage where what writes it is not installed."""
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
    """Write a graph into an export's folder, where :data:`FILES` says; int8 by the inputs that ``calibration`` gives.

    Raises ModelError where the architecture cannot be traced, ConfigError where weights do not fit the precision.
    """
    switch_off_telemetry()
    file = folder / FILES[form]
    file.parent.mkdir(parents=True, exist_ok=True)
    write = {"onnx": _write_onnx, "openvino": _write_openvino}[form.backend]
    samples = calibration() if form.precision == "int8" else ()
    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        write(graph, form, file, samples, stack.enter_context(split_outliers(graph, samples)))


def _trace(graph: EncoderGraph, exporter: Any, config: Any) -> Any:
    """The graph as ``exporter``'s program, for batches of every size."""
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
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
        if item.data_type != onnx.TensorProto.FLOAT or len(item.dims) < 2 or np.prod(item.dims) < SMALL:
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
