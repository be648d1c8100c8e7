"""Token states → one vector, prompts excluded: the same arithmetic at every depth, in training and in encoding.

Everything after the transformer (pooling, normalisation, a dense head) is what the model's own sentence-transformers
modules do; :func:`pool` runs them on the states of any depth. The one pooling that sentence-transformers does not
have is the paper's, :class:`WeightedMean`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

PoolingName = Literal["weighted_mean", "mean", "lasttoken", "cls"]
POOLINGS: tuple[str, ...] = get_args(PoolingName)


class WeightedMean(Pooling):  # type: ignore[misc]
    """Position-weighted mean over the tokens of the text: weights 1, 2, …, n, the prompt attended to but not pooled.

    The stock ``Pooling("weightedmean", include_prompt=False)`` starts to count at the first token of the *prompt*, so
    that a long prompt flattens the weights. The paper (L3Prune, arXiv 2410.14578, after SGPT, arXiv 2202.08904)
    starts at the first token of the *text*. Without a prompt the two are the same, and :meth:`stock` gives the module
    that a saved folder holds.
    """

    def __init__(self, embedding_dimension: int) -> None:
        super().__init__(embedding_dimension, "weightedmean", include_prompt=False)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Pool ``token_embeddings`` (batch, length, width) into ``sentence_embedding`` (batch, width)."""
        if "prompt_length" not in features:
            return dict(super().forward(features, **kwargs))
        prompt_length = int(torch.as_tensor(features["prompt_length"]).flatten()[0])
        # With the prompt masked out, the stock module takes it for left padding and counts from the text.
        text_mask = self._exclude_prompt_from_mask(features["attention_mask"], prompt_length)
        text_only = {key: value for key, value in features.items() if key != "prompt_length"}
        pooled = super().forward(text_only | {"attention_mask": text_mask}, **kwargs)
        return features | {"sentence_embedding": pooled["sentence_embedding"]}

    def stock(self) -> Pooling:
        """The sentence-transformers module that computes the same for texts without a prompt."""
        return Pooling(self.embedding_dimension, "weightedmean", include_prompt=False)


def make_pooling(name: PoolingName, width: int) -> Pooling:
    """The pooling module called ``name`` for token states of ``width`` numbers; prompts are not pooled."""
    if name == "weighted_mean":
        return WeightedMean(width)
    return Pooling(width, name, include_prompt=name in ("cls", "lasttoken"))


def pooling_name(model: SentenceTransformer) -> str:
    """What a model pools by, in this package's terms; ``"own"`` where it is a combination or something else."""
    modes = [module.pooling_mode for module in model if isinstance(module, Pooling)]
    if len(modes) != 1:
        return "own"
    return {"weightedmean": "weighted_mean"}.get(str(modes[0]), str(modes[0]))


def pool(model: SentenceTransformer, states: Tensor, features: dict[str, Any]) -> Tensor:
    """Run everything that follows the transformer on token states of any depth.

    Args:
        model: The model whose modules after the first are run.
        states: Token states, normed, (batch, length, width).
        features: What ``model.preprocess`` gave for these texts (mask, prompt length).

    Returns:
        Vectors (batch, dimension), as ``model`` would give them if its transformer ended with ``states``.
    """
    current: dict[str, Any] = dict(features, token_embeddings=states)
    for module in list(model)[1:]:
        current = module(current)
    vectors: Tensor = current["sentence_embedding"]
    return vectors
