"""A whole encoder as one module that can be traced: token ids in, finished vectors out.

Pooling (without the prompt where the model leaves it out) and everything after it (dense layers, normalisation,
shortened vectors) are part of the graph, so that no consumer of the graph can do them in another way. Pooling is
written anew here because sentence-transformers' own branches on the data, which a graph cannot.

For int8, input channels that are far larger than all others are kept in floats. One scale serves a whole tensor of
activations, and where a few channels are a hundred times as large as the rest (massive activations, arXiv 2402.17762),
it rounds the rest to nearly nothing. A product with such an input is written as two: the few channels in floats, the
others in int8 (LLM.int8(), arXiv 2208.07339).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import normalize

from secateur.errors import ModelError

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


class EncoderGraph(nn.Module):
    """A ``SentenceTransformer`` of one transformer, one pooling and what follows, as a function of tensors.

    Args:
        model: The model.
        dimensions: Keep so many dimensions of each vector, and normalise it again (Matryoshka, arXiv 2205.13147).
            Default: as many as the model's ``truncate_dim`` keeps, as they are.

    Raises:
        ModelError: The model is made of other modules.
    """

    def __init__(self, model: SentenceTransformer, dimensions: int | None = None) -> None:
        super().__init__()
        first, *rest = model
        if not (
            isinstance(first, Transformer)
            and rest
            and isinstance(rest[0], Pooling)
            and not any(isinstance(module, Pooling) for module in rest[1:])
        ):
            name = model.model_card_data.base_model or "model"
            found = ", ".join(type(module).__name__ for module in model)
            raise ModelError(name, f"is made of {found}", "only a transformer followed by a pooling can be exported")
        self.transformer = first.auto_model
        self.config = self.transformer.config
        self.pooling = rest[0]
        self.rest = nn.ModuleList(rest[1:])
        self.dimensions = dimensions
        self.truncate_dim = model.truncate_dim
        accepted = inspect.signature(self.transformer.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    @property
    def takes_prompt(self) -> bool:
        """Whether vectors depend on how many of the tokens are a prompt's."""
        return not self.pooling.include_prompt

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode ids (batch, length), of whose texts the first ``prompt_length`` (1,) tokens are the prompt's.

        Returns:
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
    """What a pooling module makes of states (batch, length, width), without branches: (batch, dimension)."""
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
def split_outliers(graph: EncoderGraph, samples: Sequence[Features]) -> Iterator[Shapes]:
    """Split the transformer's linear layers where ``samples`` show outlier channels, until the end of the block.

    Yields the shapes of the matrices that are to stay in floats.
    """
    layers = {name: layer for name, layer in graph.transformer.named_modules() if type(layer) is nn.Linear}
    maxima: dict[str, Tensor] = {}  # the greatest magnitude in each input channel (in,) of each layer that is used

    def observe(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        found = args[0].abs().flatten(0, -2).amax(0)
        maxima[name] = torch.maximum(maxima.get(name, found), found)

    hooks = [layer.register_forward_pre_hook(partial(observe, name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for sample in samples:
                graph(**{name: torch.from_numpy(values) for name, values in sample.items()})
    finally:
        for hook in hooks:
            hook.remove()
    split: dict[str, SplitLinear] = {}
    for name, values in maxima.items():
        channels = (values > OUTLIER * values.quantile(QUANTILE, interpolation="lower")).nonzero().flatten()
        if len(channels):
            split[name] = SplitLinear(layers[name], channels)
    try:
        for name, layer in split.items():
            graph.transformer.set_submodule(name, layer)
        yield frozenset(tuple(sorted(layer.few.shape)) for layer in split.values())
    finally:
        for name in split:
            graph.transformer.set_submodule(name, layers[name])
