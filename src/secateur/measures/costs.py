"""What a model costs, layer by layer: parameters, bytes, floating-point operations and time.

Any cut costs the sum of what it keeps: the layers, and all that is outside of them. Times are measured, not scaled: the
clock is read between the layers of an ordinary ``encode``.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from secateur.models.blocks import blocks_of
from secateur.models.cutting import late_modules, packed_tensors
from secateur.models.forward import wait
from secateur.results import LayerCost

TEXT = "The gardener cut the hedge back to half its height before the rain came, on day {n}."
FLOPS_TOKENS = 128
BATCH, BATCHES = 8, 2
SINGLES = 5
_WORDS = "Return the element of the sequence at this position, or raise an error where there is none. "


Size = tuple[int, int]
"""Parameters, a weight that is used twice counted once, and the bytes of the weights."""


def layer_sizes(model: SentenceTransformer) -> tuple[Size, ...]:
    """Count what is outside the layers, then each layer; ``bytes`` are those of the weights as they are stored.

    A weight that several layers share is counted with the first of them; a tensor outside the layers that packs one
    slice for each of them is counted with the layers.
    """
    transformer = model[0].auto_model
    layers = blocks_of(transformer)
    packed = {id(tensor): tensor for tensor in map(transformer.get_parameter, packed_tensors(transformer))}
    parameters, size = _size(packed.values())
    seen = set(packed)
    late = [(index, transformer.get_submodule(name)) for name, index in late_modules(transformer).items()]
    sizes = []
    for index, layer in enumerate(layers):
        later = {id(t) for first, module in late if first > index for t in module.parameters()}
        own = size_of(layer, seen, later)
        sizes.append((own[0] + parameters // len(layers), own[1] + size // len(layers)))
    return (size_of(model, seen), *sizes)


def size_of(module: nn.Module, seen: set[int] | None = None, later: Collection[int] = ()) -> Size:
    """Size of the parameters and stored buffers, without what is computed when a model is opened.

    Those ``seen`` are counted already, and these here are added to them; ``later`` is left out.
    """
    seen = set() if seen is None else seen
    own = {id(t): t for t in module.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    own |= {id(t): t for t in module.parameters()}
    new = {key: tensor for key, tensor in own.items() if key not in seen and key not in later}
    seen.update(new)
    return _size(new.values())


def _size(tensors: Collection[Tensor]) -> Size:
    parameters = sum(tensor.numel() for tensor in tensors if isinstance(tensor, nn.Parameter))
    return parameters, sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def flops_per_token(
    model: SentenceTransformer, length: int, layers: Iterable[nn.Module] = ()
) -> tuple[list[float], int]:
    """Count the floating-point operations of a forward pass, by torch's own counter: matrix products, 2 for each
    multiply-add (attention over all pairs of tokens, whatever a mask discards), no element-wise work and no look-ups.

    Returns:
        Operations for each token, of all that is outside of ``layers``, then of each; and the text's number of tokens,
        ``length`` or what the model takes. Attention costs more for longer texts.
    """
    features = model.preprocess([_WORDS * length])
    width = min(length, features["input_ids"].shape[1])
    device = next(model.parameters()).device
    cut = {
        key: value[:, :width].to(device) if isinstance(value, Tensor) and value.ndim == 2 else value
        for key, value in features.items()
    }
    grouped = getattr(torch.ops.aten, "_grouped_mm", None)  # of experts; since torch 2.8
    counter = FlopCounterMode(display=False, custom_mapping={grouped: _grouped_flops} if grouped else None)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:  # torch's counter would look for gradients
            parameter.requires_grad_(False)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # it does not know the fused attention of CPUs
            model(cut)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    counts, names = counter.get_flop_counts(), {module: name for name, module in model.named_modules()}
    inside = [sum(counts.get(f"{type(model).__name__}.{names[layer]}", {}).values()) for layer in layers]
    return [flops / width for flops in (counter.get_total_flops() - sum(inside), *inside)], width


def _grouped_flops(first: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * torch.Size(out_shape).numel() * first[-1]


def measure_layers(model: SentenceTransformer, sizes: Sequence[Size]) -> tuple[LayerCost, ...]:
    """Count operations and measure times: of all that is outside the layers (tokenizer included), then of each."""
    flops, _ = flops_per_token(model, FLOPS_TOKENS, blocks_of(model[0].auto_model))
    latency, seconds = _median_seconds(model, 1, SINGLES), _median_seconds(model, BATCH, BATCHES)
    columns = zip(sizes, flops, latency, seconds, strict=True)
    return tuple(LayerCost(part, *size, *rest) for part, (size, *rest) in enumerate(columns))


def _median_seconds(model: SentenceTransformer, texts: int, rounds: int) -> list[float]:
    """Median wall time of one ``encode`` in one batch, by layer; a first round that prepares kernels does not count."""
    layers = blocks_of(model[0].auto_model)
    clock: list[float] = []

    def tick(*_: Any) -> None:
        wait(model.device)
        clock.append(time.perf_counter())

    found = []
    with ExitStack() as hooks:
        hooks.callback(layers[0].register_forward_pre_hook(tick).remove)
        for layer in layers:
            hooks.callback(layer.register_forward_hook(tick).remove)
        for _ in range(rounds + 1):
            clock.clear()
            started = time.perf_counter()
            model.encode([TEXT.format(n=n) for n in range(texts)], batch_size=texts, show_progress_bar=False)
            wait(model.device)
            spent = [end - start for start, end in itertools.pairwise(clock)]
            found.append([time.perf_counter() - started - sum(spent), *spent])
    return [statistics.median(layer) for layer in zip(*found[1:], strict=True)]
