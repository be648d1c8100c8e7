"""The logit lens: how well each depth predicts the next token, through the final norm and the language-model head.

After nostalgebraist (2020) and *Tuned Lens* (arXiv 2303.08112). It shows that generation needs a depth that encoding
does not. Models are opened as encoders, without their head; here it is found again: in the embeddings, where the two
share their weights, or in the checkpoint, of which nothing else is read.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import safe_open
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from torch.nn import functional
from transformers import CONFIG_NAME, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from secateur.models.blocks import embeddings_of
from secateur.models.open_model import is_causal

FEWEST, MOST = 32, 256
CHUNK = 64


def positions(texts: int) -> int:
    """How many tokens to sample from so many texts.

    At a vocabulary of 50,000 a token through the head at every depth costs about as much as encoding ten, so one text
    in sixteen gives one.
    """
    return max(FEWEST, min(MOST, texts // 16))


def next_token_positions(
    features: dict[str, Any], skipped: int, picks: Sequence[float | None]
) -> tuple[Tensor, Tensor]:
    """Rows and places (after the ``skipped`` first tokens) of sampled tokens that have a next one in their text."""
    mask = features["attention_mask"]
    start = int(torch.as_tensor(features.get("prompt_length", 0)).flatten()[0])
    found = []
    for row, share in enumerate(picks):
        if share is not None:
            options = mask[row].nonzero().flatten()[start:-1] - skipped
            options = options[options >= 0]
            found += [(row, int(options[int(share * len(options))]))] if len(options) else []
    table = torch.tensor(found, dtype=torch.long, device=mask.device).reshape(-1, 2)
    return table[:, 0], table[:, 1]


@torch.no_grad()
def next_token_losses(model: SentenceTransformer, states: Tensor, targets: Tensor) -> list[float] | None:
    """Next-token loss at every depth, as the language model's own class computes it (scales, caps and all).

    ``states`` (sampled, depths, width) went through the final norm; ``targets`` (sampled,) are the tokens that follow.

    Returns:
        Mean cross-entropy in nats, by depth; None where the model has no language-model head, its checkpoint does not
        hold it, or its class reaches inside the transformer (OPT, Falcon-H1), so that the head cannot be used alone.
    """
    language_model = _language_model(model[0].auto_model) if is_causal(model[0]) else None
    if language_model is None:
        return None
    given = _States()
    setattr(language_model, language_model.base_model_prefix, given)
    if any(t.is_meta for t in (*language_model.parameters(), *language_model.buffers())):
        return None
    language_model.to(model[0].auto_model.dtype).eval()
    sums = torch.zeros(states.shape[1], dtype=torch.float64)
    try:
        for start in range(0, len(states), CHUNK):
            expected = targets[start : start + CHUNK]
            for depth in range(states.shape[1]):
                given.states = states[start : start + CHUNK, depth][None]
                logits = language_model(input_ids=expected[None], use_cache=False).logits[0].float()
                sums[depth] += float(functional.cross_entropy(logits, expected, reduction="sum"))
    except AttributeError:
        return None
    losses: list[float] = (sums / len(states)).tolist()
    return losses


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
        found = {"weight": embeddings_of(transformer).weight.detach()}  # type: ignore[operator]
    else:
        path = next(name for name, module in language_model.named_modules() if module is head)
        for file in sorted(_folder_of(transformer).glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                stored = set(tensors.keys())
                found |= {key: tensors.get_tensor(f"{path}.{key}") for key in shapes if f"{path}.{key}" in stored}
    if {key: value.shape for key, value in found.items()} != shapes:
        return None
    weights = {key: value.to(transformer.device, transformer.dtype) for key, value in found.items()}
    head.load_state_dict(weights, assign=True)
    return language_model


def _folder_of(transformer: PreTrainedModel) -> Path:
    """Where the files are that the model was opened from."""
    name = transformer.name_or_path
    if Path(name).is_dir():
        return Path(name)
    try:
        found = try_to_load_from_cache(name, CONFIG_NAME, revision=getattr(transformer.config, "_commit_hash", None))
    except HFValidationError:
        found = None
    return Path(found).parent if isinstance(found, str) else Path(name)
