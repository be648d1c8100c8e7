"""Channels far larger than all others, kept out of int8.

One scale serves a whole tensor of activations. Where one or two channels are a hundred times as large as the rest, as
in some gated blocks of language models (massive activations, arXiv 2402.17762), that scale rounds the rest to nearly
nothing. A product with such an input is written as two: the few channels in floats, the others in int8 (LLM.int8(),
arXiv 2208.07339).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from secateur.exporting.graph import EncoderGraph

FAR = 8.0
"""A channel stands out when its greatest value is so many times that of the channel at :data:`QUANTILE`."""

QUANTILE = 0.99
"""At most the hundredth part of all channels can stand out, so that what stays in floats costs next to nothing."""

Features = dict[str, npt.NDArray[np.int64]]
"""Inputs of the graph, by name."""

Shapes = frozenset[tuple[int, ...]]
"""Of matrices that are to stay in floats, the shorter side first: by these a backend's graph shows which they are."""


class SplitLinear(nn.Module):
    """A linear layer as the sum of two products: of a few channels, and of all others.

    Args:
        linear: The layer, which is kept as it is.
        channels: Places of the few among its inputs.
    """

    channels: Tensor
    others: Tensor
    few: Tensor

    def __init__(self, linear: nn.Linear, channels: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("channels", channels)
        self.register_buffer("others", torch.ones(linear.in_features).index_fill(0, channels, 0))
        self.register_buffer("few", linear.weight.detach()[:, channels].T.contiguous())

    def forward(self, states: Tensor) -> Tensor:
        """States (…, in) → (…, out)."""
        found: Tensor = self.linear(states * self.others) + states.index_select(-1, self.channels) @ self.few
        return found


@contextmanager
def outliers_apart(graph: EncoderGraph, samples: Sequence[Features]) -> Iterator[Shapes]:
    """Have the transformer's linear layers split where ``samples`` show channels that stand out; put back at the end.

    Args:
        graph: The encoder, in float32.
        samples: What it is shown; of nothing, nothing stands out.

    Yields:
        Shapes of the matrices that are to stay in floats.
    """
    layers = {name: layer for name, layer in graph.transformer.named_modules() if type(layer) is nn.Linear}
    split = {name: SplitLinear(layers[name], channels) for name, channels in _standing_out(graph, layers, samples)}
    try:
        for name, layer in split.items():
            graph.transformer.set_submodule(name, layer)
        yield frozenset(tuple(sorted(layer.few.shape)) for layer in split.values())
    finally:
        for name in split:
            graph.transformer.set_submodule(name, layers[name])


def _standing_out(
    graph: EncoderGraph, layers: Mapping[str, nn.Linear], samples: Sequence[Features]
) -> Iterator[tuple[str, Tensor]]:
    """Layers, each with the places of the input channels that stand out."""
    greatest = _greatest(graph, layers, samples)
    for name, values in greatest.items():
        channels = (values > FAR * values.quantile(QUANTILE, interpolation="lower")).nonzero().flatten()
        if len(channels):
            yield name, channels


@torch.no_grad()
def _greatest(graph: EncoderGraph, layers: Mapping[str, nn.Linear], samples: Sequence[Features]) -> dict[str, Tensor]:
    """The greatest magnitude in each input channel (in,) of each layer that is used."""
    greatest: dict[str, Tensor] = {}

    def look(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = args[0].abs().flatten(0, -2).amax(0)
        greatest[name] = torch.maximum(greatest.get(name, found), found)

    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    try:
        for sample in samples:
            graph(**{name: torch.from_numpy(values) for name, values in sample.items()})
    finally:
        for hook in hooks:
            hook.remove()
    return greatest
