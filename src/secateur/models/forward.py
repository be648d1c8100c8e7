"""Texts → token states → vectors, as cheaply as a machine can: what a profile and bulk encoding have in common.

Texts are tokenized together, sorted by length and run in batches of about as many tokens each. What all of them start
with (an instruction) is computed once where a model attends only backwards, since its keys and values cannot depend
on what follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from secateur.errors import DataError
from secateur.models.compat import text_mask
from secateur.options import PoolingName, SavedPooling

BUDGET = 2048
"""Tokens in a batch, padding included."""
SHORTEST_PREFIX = 4
"""Tokens in common below which sharing them saves nothing."""
POOLINGS: tuple[str, ...] = get_args(SavedPooling)
REFUSALS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What models raise that cannot go on from a cache of keys and values."""


def tokenize(model: SentenceTransformer, texts: Sequence[str], prompt: str = "") -> dict[str, Any]:
    """Tokenize texts as the model's own ``encode`` does, but padded on the right: there a text has the positions that
    it has alone. Gives tensors (texts, longest), and what else the model's modules want to know.
    """
    right = {"text": {"padding_side": "right"}}
    features: dict[str, Any] = dict(model.preprocess(list(texts), prompt=prompt or None, processing_kwargs=right))
    lengths = lengths_of(features)
    if not bool(lengths.all()):
        empty = texts[int(lengths.argmin())]
        raise DataError("texts", f"{empty!r:.60} has no tokens", "leave empty texts out")
    return features


def lengths_of(features: dict[str, Any]) -> Tensor:
    """Real tokens of each text, (texts,), those of its prompt included."""
    return features["attention_mask"].sum(dim=1)


def batch_of(features: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """What :func:`tokenize` gave for some of the texts, padded to the longest of them."""
    shape, width = features["attention_mask"].shape, int(lengths_of(features)[rows].max())
    return {
        key: value[rows, :width] if isinstance(value, Tensor) and value.shape == shape else value
        for key, value in features.items()
    }


def common_start(features: dict[str, Any]) -> Tensor:
    """The token ids that all texts start with, at least one of each text left out: (tokens,), maybe none."""
    ids: Tensor = features["input_ids"]
    same = (ids == ids[:1]).all(dim=0)[: int(lengths_of(features).min()) - 1]
    return ids[0, : int(same.long().cumprod(dim=0).sum())]


@dataclass(frozen=True, eq=False)
class Prefix:
    """What all texts start with: its token ids (tokens,), keys and values, and the last states (1, tokens, width)."""

    ids: Tensor
    cache: DynamicCache
    states: Tensor


def run_prefix(transformer: PreTrainedModel, ids: Tensor) -> Prefix:
    """Run the tokens (tokens,) that all texts start with."""
    cache, row = DynamicCache(), ids[None].to(transformer.device)
    output = transformer(input_ids=row, attention_mask=torch.ones_like(row), past_key_values=cache, use_cache=True)
    return Prefix(ids, cache, output.last_hidden_state)


def run_after(transformer: PreTrainedModel, prefix: Prefix, features: dict[str, Any]) -> Any:
    """Run what follows the prefix of each text; the texts are padded on the right."""
    ids = features["input_ids"][:, len(prefix.ids) :]
    shape = (len(ids), -1, -1, -1)
    cache = DynamicCache((layer.keys.expand(shape), layer.values.expand(shape)) for layer in prefix.cache.layers)
    mask = features["attention_mask"]
    return transformer(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given. A CPU has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---- states to vectors


class L3PrunePooling(Pooling):  # type: ignore[misc]
    """The paper's weighted mean: weights 1, 2, …, n from the first token of the *text*, the prompt not pooled.

    L3Prune (arXiv 2410.14578), after SGPT (arXiv 2202.08904). The stock ``Pooling("weightedmean",
    include_prompt=False)`` pools the same tokens but starts to count at the first token of the *prompt*, so that a long
    prompt flattens the weights. Without a prompt the two are the same. No saved folder can hold this module.
    """

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__(embedding_dimension, "weightedmean", include_prompt=False)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool ``token_embeddings`` (batch, length, width) into ``sentence_embedding`` (batch, width)."""
        if "prompt_length" not in features:
            return dict(super().forward(features, **kwargs))
        # With the prompt masked out, the stock module takes it for left padding and counts from the text.
        prompt_length = int(torch.as_tensor(features["prompt_length"]).flatten()[0])
        text_only = {key: value for key, value in features.items() if key != "prompt_length"}
        text_only["attention_mask"] = text_mask(self, features["attention_mask"], prompt_length)
        return features | {"sentence_embedding": super().forward(text_only, **kwargs)["sentence_embedding"]}


@torch.no_grad()
def state_width(transformer: Transformer) -> int:
    """How many numbers a token's state has: measured, since OPT may project states to another width than it tells."""
    ids = torch.tensor([[5, 6]], device=transformer.auto_model.device)
    states: Tensor = transformer.auto_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    return states.shape[-1]


def make_pooling(name: PoolingName, width: int) -> Pooling:
    """The pooling module called ``name`` for token states of ``width`` numbers; prompts are not pooled."""
    if name == "l3prune":
        return L3PrunePooling(width)
    mode = "weightedmean" if name == "weighted_mean" else name
    return Pooling(width, mode, include_prompt=name in ("cls", "lasttoken"))


def pooling_name(model: SentenceTransformer) -> str:
    """What a model pools by, in this package's terms; ``"own"`` where it is a combination or something else."""
    if any(isinstance(module, L3PrunePooling) for module in model):
        return "l3prune"
    modes = [str(module.pooling_mode) for module in model if isinstance(module, Pooling)]
    return {"weightedmean": "weighted_mean"}.get(modes[0], modes[0]) if len(modes) == 1 else "own"


def pool(model: SentenceTransformer, states: Tensor, features: dict[str, Any]) -> Tensor:
    """Vectors (batch, dimension), as ``model`` would give them if its transformer ended with ``states``.

    ``states`` are normed token states (batch, length, width) of any depth; ``features``: what ``model.preprocess``
    gave for these texts (mask, prompt length).
    """
    current: dict[str, Any] = dict(features, token_embeddings=states)
    for module in list(model)[1:]:
        current = module(current)
    return current["sentence_embedding"]
