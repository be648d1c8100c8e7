"""Where an architecture keeps its layers, final norm and linear modules, by structure; and models without weights.

Nothing here knows an architecture by name: the layers are the outermost list of as many modules as the configuration
counts layers.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.initialization import no_init_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D

from secateur.errors import UnsupportedArchitecture

SEPARATE = "only stacks of separate layers can be cut"


@dataclass(frozen=True)
class Stack:
    """Dotted paths, from the model, of its list of layers (``language_model.layers``) and of its final norm, which is
    None where the layers end normed (post-LN encoders).
    """

    path: str
    norm: str | None


def text_config(model_or_config: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the text encoder's layers. Edits to it are edits to the whole."""
    config = getattr(model_or_config, "config", model_or_config)
    encoder = getattr(config, "encoder", None)
    # With encoder=, get_text_config hands out a copy for older encoder-decoders.
    return encoder if isinstance(encoder, PretrainedConfig) else config.get_text_config()


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the list of layers and the final norm by structure.

    Raises:
        UnsupportedArchitecture: The model has no list of as many layers as its configuration counts, or several that
            hold a part of each.
    """
    name = model.name_or_path or type(model).__name__
    if model.config.is_encoder_decoder and hasattr(model, "decoder"):
        raise UnsupportedArchitecture(name, "is an encoder-decoder", "open its encoder alone")
    depth = getattr(text_config(model), "num_hidden_layers", 0)
    prefix, tower = _described_part(model)
    lists = [
        path for path, module in tower.named_modules() if isinstance(module, nn.ModuleList) and len(module) == depth > 0
    ]
    if lists:
        path = min(lists, key=lambda path: path.count("."))
        beside = [other for other in lists if other.rpartition(".")[0] == path.rpartition(".")[0]]
        firsts = [type(tower.get_submodule(f"{other}.0")).__name__ for other in beside]
        if len(beside) > 1 and any(first.endswith("Norm") for first in firsts):
            problem = f"its layers lie in pieces, in {', '.join(prefix + other for other in beside)}"
            raise UnsupportedArchitecture(name, problem, SEPARATE)
        norm = _find_norm(tower, path)
        return Stack(prefix + path, None if norm is None else prefix + norm)
    groups = getattr(text_config(model), "num_hidden_groups", depth)
    if groups < depth:
        problem = f"its {depth} layers share the weights of {groups}, so none can be taken out"
        raise UnsupportedArchitecture(name, problem)
    problem = f"{type(model).__name__} has no list of {depth or 'its'} layers"
    raise UnsupportedArchitecture(name, problem, SEPARATE)


def _described_part(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a model that the text configuration describes, and its path with a dot at the end."""
    config = text_config(model)
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return f"{path}." if path else "", module
    return "", model


def _find_norm(tower: nn.Module, path: str) -> str | None:
    """A norm beside the layers: registered after them, or before them under a name that says it is the final one."""
    hidden = text_config(tower).hidden_size
    owner_path, _, attribute = path.rpartition(".")
    for place, anchor in ((owner_path, attribute), ("", path.partition(".")[0])):
        children = dict(tower.get_submodule(place).named_children())
        names = list(children)
        position = names.index(anchor)
        before = [name for name in names[:position] if re.search(r"final|ln_f|norm_f|^norm$", name)]
        for name in (*names[position + 1 :], *before):
            weight = getattr(children[name], "weight", None)
            is_norm = "norm" in type(children[name]).__name__.lower() and not name.startswith("per_layer")
            if is_norm and (weight is None or weight.shape == (hidden,)):
                return f"{place}.{name}" if place else name
    return None


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The layers, in order."""
    return model.get_submodule(find_stack(model).path)


def shares_weights(model: PreTrainedModel) -> bool:
    """Whether weights of one layer are those of another, as Zamba 2's."""
    weights = [weight for block in blocks_of(model) for weight in block.parameters()]
    return len(set(map(id, weights))) < len(weights)


def depth_of(model: PreTrainedModel) -> int:
    """How many layers the model has."""
    return len(blocks_of(model))


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last layer; an ``nn.Identity`` where there is none."""
    norm = find_stack(model).norm
    return nn.Identity() if norm is None else model.get_submodule(norm)


def states_of(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns: itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


@torch.no_grad()
def tail_is_norm(model: PreTrainedModel, features: Mapping[str, torch.Tensor]) -> bool:
    """Whether the final norm of the last layer's output is what the model, in evaluation mode, itself returns.

    Where it is, one forward pass with hooks gives every depth; OPT-350m's projection and Gemma 3n's merging of streams
    take a pass for each. ``features`` are a batch, (texts, tokens).
    """
    caught: list[torch.Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(lambda *call: caught.append(states_of(call[-1])))
    try:
        expected = model(**features).last_hidden_state
    finally:
        hook.remove()
    if not caught or caught[-1].shape != expected.shape:
        return False
    real = features["attention_mask"].bool()
    found = final_norm(model)(caught[-1])
    return bool(torch.allclose(found[real].float(), expected[real].float(), rtol=1e-3, atol=1e-4))


def tensor_of_block(name: str, path: str) -> tuple[int, str] | None:
    """``model.layers.7.mlp.up.weight``, of layers at ``layers`` → ``(7, "mlp.up.weight")``; None for other tensors."""
    match = re.search(rf"(?:^|\.){re.escape(path)}\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else None


def linear_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The linear modules inside the layers, as peft's ``target_modules``: fused projections and GPT-2's Conv1D too.

    Names are relative to a layer (``self_attn.q_proj``). Left out are those that return more than a product (routers of
    experts) or products of groups, and the projections of state-space mixers whose weights are read past any adapter.
    """

    def is_read_past(name: str) -> bool:
        parent, _, attribute = name.rpartition(".")
        mixer = model.get_submodule(parent)
        return attribute in ("dt_proj", "out_proj") and hasattr(mixer, "A_log") and hasattr(mixer, "D")

    prefix = find_stack(model).path + "."
    linear = [name for name, module in model.named_modules() if name.startswith(prefix) and _is_product(module)]
    inside = [name[len(prefix) :] for name in linear if not is_read_past(name)]
    return tuple(dict.fromkeys(name.partition(".")[2] for name in inside))


@torch.no_grad()
def _is_product(module: nn.Module) -> bool:
    """Whether a module is linear and, where its class is a model's own, returns what a linear one does."""
    if not isinstance(module, nn.Linear) or type(module) is nn.Linear:
        return isinstance(module, (nn.Linear, Conv1D))
    try:
        found = module(module.weight.new_zeros(1, module.in_features))
    except (RuntimeError, TypeError, ValueError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == (1, module.out_features)


def encoder_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that holds the encoder of an encoder-decoder alone, such as ``T5EncoderModel``; None for others."""
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    found = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)] if known else None
    return found if found is not None and found.__name__.endswith("EncoderModel") else None


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model of a configuration, without weights (on ``meta``); of an encoder-decoder, the encoder alone."""
    config = copy.deepcopy(config)
    name = config.name_or_path or type(config).__name__
    encoder = encoder_class(config)
    if encoder is None and type(config) not in MODEL_MAPPING:
        problem = f"transformers {transformers_version} has no text model of the type {config.model_type}"
        raise UnsupportedArchitecture(name, problem)
    if encoder is not None:
        config.is_encoder_decoder = False
    try:
        return build(encoder or AutoModel.from_config, config)
    except Exception as error:  # of whatever kind: a configuration that is not whole, or a package that it needs
        problem = f"transformers {transformers_version} cannot build it ({last_line(error)})"
        raise UnsupportedArchitecture(name, problem) from error


def text_tower(model: PreTrainedModel) -> str:
    """Path of the part of a multimodal model that is a text model of its own; empty where there is no such part."""
    config = text_config(model)
    if config is model.config or encoder_class(model.config):
        return ""
    prefix, tower = _described_part(model)
    try:
        return prefix.rstrip(".") if type(skeleton(config)) is type(tower) else ""
    except UnsupportedArchitecture:
        return ""


def build(make: Callable[[PretrainedConfig], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Make a model without weights; ``config`` becomes its own."""
    for part in (config, text_config(config)):
        # save_pretrained leaves the type's name in its place, of which some models (Apertus) cannot make tensors.
        if isinstance(part.dtype, str):
            part.dtype = getattr(torch, part.dtype)
    with no_init_weights(), torch.device("meta"):
        return make(config)


def last_line(error: Exception) -> str:
    """What an error of transformers says, without the lines around it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
