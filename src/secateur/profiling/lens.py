"""The logit lens: how well each depth predicts the next token, through the final norm and the language-model head.

After nostalgebraist (2020) and *Tuned Lens* (arXiv 2303.08112). It shows that generation needs a depth that encoding
does not. Models are opened as encoders, without their head; here it is found again: in the embeddings, where the two
share their weights, or in the checkpoint, of which nothing else is read.
"""

from __future__ import annotations

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

from secateur.models.blocks import embeddings_of, text_config
from secateur.models.open_model import is_causal

FEWEST, MOST = 32, 256
CHUNK = 64


def positions(texts: int) -> int:
    """How many tokens to sample from so many texts.

    At a vocabulary of 50,000 a token through the head at every depth costs about as much as encoding ten, so one text
    in sixteen gives one.
    """
    return max(FEWEST, min(MOST, texts // 16))


class _Output(BaseModelOutputWithPast):  # type: ignore[misc]
    """States and nothing else, whatever a language model asks its transformer for besides."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _States(nn.Module):
    """Stands where the transformer was, and gives the states it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.states = torch.zeros(1, 1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> _Output:
        return _Output(last_hidden_state=self.states)


class Lens:
    """The head of a language model: states → logits, as the model's own class computes them (scales, caps and all)."""

    def __init__(self, language_model: PreTrainedModel, states: _States) -> None:
        self._language_model = language_model
        self._states = states

    @torch.no_grad()
    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Next-token loss at every depth.

        Args:
            states: (sampled, depths, width), through the final norm.
            targets: (sampled,), the token that follows each.

        Returns:
            (depths,), mean cross-entropy in nats.
        """
        sums = torch.zeros(states.shape[1], dtype=torch.float64)
        for start in range(0, len(states), CHUNK):
            expected = targets[start : start + CHUNK]
            for depth in range(states.shape[1]):
                self._states.states = states[start : start + CHUNK, depth][None]
                logits = self._language_model(input_ids=expected[None], use_cache=False).logits[0].float()
                sums[depth] += float(functional.cross_entropy(logits, expected, reduction="sum"))
        return sums / len(states)


def find_lens(model: SentenceTransformer) -> Lens | None:
    """The language-model head of an opened model; None where it has none, or where its checkpoint does not hold it."""
    transformer: PreTrainedModel = model[0].auto_model
    kind = type(transformer.config)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING or not is_causal(model[0]):
        return None
    with torch.device("meta"):
        language_model = MODEL_FOR_CAUSAL_LM_MAPPING[kind]._from_config(transformer.config)
    head = language_model.get_output_embeddings()
    place = language_model.base_model_prefix
    if head is None or not isinstance(getattr(language_model, place, None), PreTrainedModel):
        return None
    name = next(name for name, module in language_model.named_modules() if module is head)
    weights = _weights(transformer, name, list(dict(head.named_parameters())))
    if weights is None or any(weights[key].shape != value.shape for key, value in head.named_parameters()):
        return None
    head.load_state_dict(weights, assign=True)
    states = _States()
    setattr(language_model, place, states)
    rest = [
        key for key, value in [*language_model.named_parameters(), *language_model.named_buffers()] if value.is_meta
    ]
    return None if rest else _usable(Lens(language_model.to(transformer.dtype).eval(), states), transformer)


def _usable(lens: Lens, transformer: PreTrainedModel) -> Lens | None:
    """Some classes reach inside their transformer (OPT, Falcon-H1): their head cannot be had alone."""
    states = torch.zeros(1, 1, text_config(transformer).hidden_size, dtype=transformer.dtype, device=transformer.device)
    try:
        lens.losses(states, torch.ones(1, dtype=torch.long, device=transformer.device))
    except AttributeError:
        return None
    return lens


def _weights(transformer: PreTrainedModel, head: str, keys: list[str]) -> dict[str, Tensor] | None:
    """The head's tensors, as the model has them in memory or on disk."""
    if getattr(transformer.config, "tie_word_embeddings", False):
        if keys != ["weight"]:
            return None
        weight = embeddings_of(transformer).weight
        assert isinstance(weight, Tensor)
        return {"weight": weight.detach()}
    folder = _folder_of(transformer)
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = set(tensors.keys())
            found |= {key: tensors.get_tensor(f"{head}.{key}") for key in keys if f"{head}.{key}" in names}
    on = transformer.device
    return {key: value.to(on, transformer.dtype) for key, value in found.items()} if len(found) == len(keys) else None


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
