"""Token states → one vector, prompts excluded: the same arithmetic at every depth, in training and in encoding.

Everything after the transformer (pooling, normalisation, a dense head) is what the model's own sentence-transformers
modules do; :func:`pool` runs them on the states of any depth. The one pooling that sentence-transformers does not
have is the paper's, :class:`L3PrunePooling`, which only a profile uses.
"""

from __future__ import annotations

from typing import Any, get_args

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor

from secateur.models.compat import text_mask
from secateur.options import PoolingName, SavedPooling

POOLINGS: tuple[str, ...] = get_args(SavedPooling)


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
