"""A whole encoder as one module that can be traced: token ids in, finished vectors out.

Pooling, with the prompt left out where the model leaves it out, and everything after it (dense layers, normalisation,
shortened vectors) become part of the graph, so that no reader of the graph can do them in another way. Pooling is
written anew here because sentence-transformers' own branches on the data, which a graph cannot.
"""

from __future__ import annotations

import inspect

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn.functional import normalize

from secateur.errors import ModelError

TOKENS, VECTORS = "token_embeddings", "sentence_embedding"
INPUTS = ("input_ids", "attention_mask", "prompt_length")


class EncoderGraph(nn.Module):
    """A ``SentenceTransformer`` of one transformer, one pooling and what follows, as a function of tensors.

    Args:
        model: The model.
        dimensions: Keep so many numbers of each vector, and make its length 1 again (Matryoshka, arXiv 2205.13147).
            Default: as many as the model's ``truncate_dim`` keeps, as they are.

    Raises:
        ModelError: The model is built of other modules.
    """

    def __init__(self, model: SentenceTransformer, dimensions: int | None = None) -> None:
        super().__init__()
        first, *rest = model
        poolings = [module for module in rest if isinstance(module, Pooling)]
        if not isinstance(first, Transformer) or len(poolings) != 1 or rest[0] is not poolings[0]:
            name = model.model_card_data.base_model or "model"
            found = ", ".join(type(module).__name__ for module in model)
            raise ModelError(name, f"is made of {found}", "only a transformer followed by a pooling can be exported")
        self.transformer = first.auto_model
        self.config = self.transformer.config
        self.pooling = poolings[0]
        self.rest = nn.ModuleList(rest[1:])
        self.dimensions = dimensions
        self.kept = model.truncate_dim
        accepted = inspect.signature(self.transformer.forward).parameters
        self._options = {"use_cache": False} if "use_cache" in accepted else {}

    @property
    def takes_prompt(self) -> bool:
        """Whether vectors depend on how many of the tokens are a prompt's."""
        return not self.pooling.include_prompt

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_length: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Encode a batch.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, length), 1 where there is a token.
            prompt_length: (1,), how many of each text's first tokens are the prompt's.

        Returns:
            ``token_embeddings`` (batch, length, width) and ``sentence_embedding`` (batch, dimension).
        """
        output = self.transformer(input_ids=input_ids, attention_mask=attention_mask, **self._options)
        states = output.last_hidden_state
        features = {TOKENS: states, "attention_mask": attention_mask}
        features[VECTORS] = pooled(self.pooling, states, attention_mask, prompt_length)
        for module in self.rest:
            features = module(features)
        vectors = features[VECTORS]
        if self.dimensions is not None:
            vectors = normalize(vectors[:, : self.dimensions], dim=-1)
        elif self.kept is not None:
            vectors = vectors[:, : self.kept]
        return {TOKENS: states, VECTORS: vectors}


def pooled(pooling: Pooling, states: Tensor, mask: Tensor, prompt_length: Tensor | None) -> Tensor:
    """What a pooling module makes of states (batch, length, width), without branches: (batch, dimension)."""
    place = torch.cumsum(mask, dim=1)  # of each token in its text, from 1, whichever side is padded
    text = mask if prompt_length is None else mask * (place > prompt_length).to(mask.dtype)
    modes = (pooling.pooling_mode,) if isinstance(pooling.pooling_mode, str) else pooling.pooling_mode
    return torch.cat([_pooled_by(mode, states, text, place) for mode in modes], dim=-1)


def _pooled_by(mode: str, states: Tensor, mask: Tensor, place: Tensor) -> Tensor:
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
