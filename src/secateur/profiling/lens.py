"""The logit lens: how well each depth predicts the next token, through the final norm and the language-model head.

After nostalgebraist (2020) and *Tuned Lens* (arXiv 2303.08112). It shows that generation needs a depth that encoding
does not. Models are opened as encoders, without their head; here it is found again: in the embeddings, where the two
share their weights, or in the checkpoint, of which nothing else is read.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from secateur.models.blocks import depth_of, final_norm
from secateur.models.checks import weight_files
from secateur.models.forward import lengths_of, tokenize
from secateur.models.open_model import is_causal
from secateur.profiling.depths import ends_with_norm, layer_outputs

BATCH = 16
SHARE, FEWEST, MOST = 32, 16, 128
"""One text in so many is sampled, within these: the head has a row for every token, and runs at every depth."""
TOKENS = 2
"""Of each sampled text."""


@torch.no_grad()
def next_token_losses(model: SentenceTransformer, texts: Sequence[tuple[str, str]], seed: int) -> list[float] | None:
    """Next-token loss at every depth, as the language model's own class computes it (scales, caps and all).

    It is that of two tokens of each text of a sample, drawn by ``seed``; ``texts`` are (prompt, text).

    Returns:
        Mean cross-entropy in nats, by depth; None where the model has no language-model head, its checkpoint does not
        hold it, or its class reaches inside the transformer (OPT, Falcon-H1), so that the head cannot be used alone.
    """
    transformer = model[0].auto_model
    language_model = _language_model(transformer) if is_causal(model[0]) else None
    if language_model is None or not ends_with_norm(model):
        return None
    given = _States()
    setattr(language_model, language_model.base_model_prefix, given)
    if any(t.is_meta for t in (*language_model.parameters(), *language_model.buffers())):
        return None
    language_model.to(transformer.dtype).eval()
    depth = depth_of(transformer)
    count = min(len(texts), max(FEWEST, min(MOST, len(texts) // SHARE)))
    sample = random.Random(seed).sample(texts, count)  # noqa: S311 - not for secrets
    losses = []
    for prompt in dict.fromkeys(prompt for prompt, _ in sample):
        own = sorted((text for before, text in sample if before == prompt), key=len)
        for first in range(0, len(own), BATCH):
            given.states, expected = _states_at(model, own[first : first + BATCH], prompt, seed)
            if not len(expected):
                continue
            try:
                logits = language_model(input_ids=expected[:, None], use_cache=False).logits[:, 0].float()
            except AttributeError:
                return None
            found = functional.cross_entropy(logits, expected, reduction="none").cpu().double()
            losses.append(found.view(depth, -1))
    return torch.cat(losses, dim=1).mean(dim=1).tolist() if losses else None


def _states_at(model: SentenceTransformer, texts: Sequence[str], prompt: str, seed: int) -> tuple[Tensor, Tensor]:
    """Some tokens of each text: their normed states after each layer, (depths x tokens, 1, width), and as often the id
    that follows each, (depths x tokens,). Texts without a token to predict are left out.
    """
    features = batch_to_device(tokenize(model, texts, prompt), model.device)
    start = features.get("prompt_length", 0)
    drawn: list[tuple[int, int]] = []
    for row, (text, length) in enumerate(zip(texts, lengths_of(features).tolist(), strict=True)):
        rng = random.Random(f"{seed} {text}")  # noqa: S311
        drawn += [(row, rng.randrange(start, length - 1)) for _ in range(TOKENS) if length - 1 > start]
    rows, places = [row for row, _ in drawn], [place for _, place in drawn]
    states: list[Tensor] = []

    def visit(depth: int, before: Tensor, after: Tensor) -> None:
        states.append(after[rows, places])

    with layer_outputs(model[0].auto_model, visit):
        model[0](dict(features))
    normed: Tensor = final_norm(model[0].auto_model)(torch.cat(states)[:, None])
    following = features["input_ids"][rows, [place + 1 for place in places]]
    return normed, following.repeat(len(states))


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    """States and nothing else, whatever a language model asks its transformer for besides."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _States(nn.Module):
    """Takes the transformer's place in a language model, and returns the states that it is given."""

    states: Tensor

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=self.states)


def _language_model(transformer: PreTrainedModel) -> PreTrainedModel | None:
    """The language model around a transformer, with weights for its head alone; None where these cannot be found."""
    kind = type(transformer.config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    with torch.device("meta"):
        language_model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](copy.deepcopy(transformer.config))
    head = language_model.get_output_embeddings()
    if head is None or not isinstance(getattr(language_model, language_model.base_model_prefix, None), PreTrainedModel):
        return None
    shapes = {name: parameter.shape for name, parameter in head.named_parameters()}
    found: dict[str, Tensor] = {}
    if getattr(transformer.config, "tie_word_embeddings", False):
        found = {"weight": transformer.get_input_embeddings().weight.detach()}
    else:
        path = next(name for name, module in language_model.named_modules() if module is head)
        for file in weight_files(transformer):
            with safe_open(file, framework="pt") as tensors:
                stored = set(tensors.keys())
                found |= {key: tensors.get_tensor(f"{path}.{key}") for key in shapes if f"{path}.{key}" in stored}
    if {key: value.shape for key, value in found.items()} != shapes:
        return None
    weights = {key: value.to(transformer.device, transformer.dtype) for key, value in found.items()}
    head.load_state_dict(weights, assign=True)
    return language_model
