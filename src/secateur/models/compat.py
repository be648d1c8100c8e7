"""Every private interface of other libraries that secateur uses, in one place.

tests/test_compat.py has a test for each, which says what broke when a library changes it. Where a public way exists, it
is taken instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

# ---- transformers: models


def is_ignored(model: PreTrainedModel, name: str) -> bool:
    """Whether transformers leaves a tensor out on purpose when it loads, such as layers that predict later tokens."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def forget_origin(model: PreTrainedModel) -> None:
    """Let transformers save a model as a model under its own names, and neither as the adapter that was merged into it
    nor under the names that it was loaded from (by a ``key_mapping``, or peft's).
    """
    model._hf_peft_config_loaded = False
    for name in ("_weight_conversions", "peft_config"):
        vars(model).pop(name, None)


# ---- transformers: configurations


def drop_layer_pattern(config: PretrainedConfig) -> None:
    """Drop the rule from which Gemma 3 makes its ``layer_types``, which no longer follow it in a cut model."""
    vars(config).pop("_sliding_window_pattern", None)


def cut_layer_overrides(config: PretrainedConfig, keep: Sequence[int]) -> None:
    """Keep what a configuration says of single layers for the kept ones, under their new indices.

    The public ``per_layer_config`` checks what it is given against a configuration that is half edited here.
    """
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:
        overrides = dict(spec.per_layer_overrides)
        spec.per_layer_overrides.clear()
        spec.per_layer_overrides.update({new: overrides[old] for new, old in enumerate(keep) if old in overrides})


# ---- sentence-transformers


def text_mask(pooling: Pooling, mask: Tensor, prompt_length: int) -> Tensor:
    """The attention mask (texts, tokens) without the tokens of the prompt, on whichever side it is padded."""
    return pooling._exclude_prompt_from_mask(mask, prompt_length)


def encode_alone(model: SentenceTransformer) -> None:
    """Let a copy of a model, which is scored, encode all texts itself: sentence-transformers would give a share of them
    to the other processes, which have the model as it is trained.
    """
    vars(model).pop("_distributed_inference", None)


# ---- accelerate


def shard_on_cpus() -> None:
    """Let accelerate use FSDP on CPUs too, as torch does; else it says nothing and copies the weights."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


# ---- torch


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply in bfloat16."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def tensors_of(module: nn.Module) -> dict[str, Tensor | None]:
    """A module's own parameters and buffers, those too that are not there (None)."""
    return {**module._parameters, **module._buffers}
