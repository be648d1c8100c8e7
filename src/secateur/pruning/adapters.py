"""LoRA adapters as peft saves them, merged into the weights of a model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import ModelError, UnsupportedArchitecture
from secateur.files import read_json
from secateur.models import resolve
from secateur.models.checks import as_model_error
from secateur.models.compat import forget_origin, is_ignored
from secateur.models.open_model import fetch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base as it was; PiSSA, OLoRA, CorDA and LoftQ change it."""
BASE = "is this its base?"
HINT = "merge it with peft (merge_and_unload) and prune the merged model"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter that was saved alone."""
    names = ("config.json", "modules.json")
    return (folder / CONFIG).is_file() and not any((folder / name).is_file() for name in names)


def base_of(folder: Path) -> tuple[str | Path, str | None]:
    """Where the base model is that an adapter names, and its revision."""
    content = read_json(folder / CONFIG)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    if not isinstance(base, str) or not base:
        raise ModelError(folder / CONFIG, "names no base model", "give the base, and this as its adapter")
    try:
        return resolve(base), content.get("revision")
    except ModelError:
        hint = "give the base where it is now, and this as its adapter"
        raise ModelError(folder / CONFIG, f"names the base {base}, which is not there", hint) from None


def adapter_folder(adapter: str | Path) -> Path:
    """Where an adapter is on this disk; one on the Hub is fetched."""
    found = resolve(adapter)
    if isinstance(found, str):
        found = fetch(found)
    for name, hint in ((CONFIG, "give the folder that peft's save_pretrained wrote"), (WEIGHTS, "save as safetensors")):
        if not (found / name).is_file():
            raise ModelError(adapter, f"has no {name}", hint)
    return found


def merge_adapter(model: PreTrainedModel, folder: Path, gone: Sequence[str], outside: Collection[str]) -> None:
    """Merge the adapter in a folder into its base's weights, with peft.

    Left out are changes of layers whose names begin as in ``gone`` (``layers.3.``), and of modules of the whole base
    that are not in the model (``outside``: a head).
    """
    config = _read_config(folder)
    with as_model_error(folder / WEIGHTS):
        weights = load_file(folder / WEIGHTS)
    if not weights:
        raise ModelError(folder / WEIGHTS, "holds no LoRA weights")
    modules = dict(model.named_modules())
    changes: dict[str, Tensor] = {}
    places: dict[str, str] = {}  # what the adapter calls them
    for name, tensor in weights.items():
        path, found, rest = name.removeprefix("base_model.model.").partition(".lora_")
        place = _place(path.removesuffix(".base_layer.weight"), modules, model.base_model_prefix)
        if not found:  # beside a change of token embeddings, peft saves these, too
            same = path.endswith(".base_layer.weight") and place in modules
            if same and torch.equal(tensor, modules[place].weight.to(tensor.dtype)):
                continue
            raise UnsupportedArchitecture(folder / WEIGHTS, f"holds {name}, which no LoRA of linear layers has", HINT)
        if place in modules and not place.startswith(tuple(gone)):
            places[place] = path
            changes[f"{place}.lora_{rest}"] = tensor
        is_outside = set(path.split(".")) & {"lm_head", *outside} or is_ignored(model, path)
        if place not in modules and not is_outside:
            raise ModelError(folder, f"changes {path}, which {model.name_or_path} has not", BASE)
    if not places:
        return
    config.target_modules = "|".join(map(re.escape, sorted(places)))
    for field in ("rank_pattern", "alpha_pattern"):  # whose names may be those of the model with its head
        given = getattr(config, field) or {}
        own = {re.escape(place): given.get(get_pattern_key(given, path)) for place, path in places.items()}
        setattr(config, field, {place: value for place, value in own.items() if value is not None})
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    try:
        inject_adapter_in_model(config, model)
        loaded = set_peft_model_state_dict(model, changes)
    except (RuntimeError, TypeError, ValueError) as error:  # of shapes, numbers, or a layer that takes no adapter
        first = " ".join(str(error).split())[:200]
        raise ModelError(folder, f"does not fit {model.name_or_path} ({first})", BASE) from error
    missing = [key for key in loaded.missing_keys if "lora_" in key]
    if missing or loaded.unexpected_keys:
        raise ModelError(folder / WEIGHTS, f"has no weights for {[*missing, *loaded.unexpected_keys][0]}")
    merge_adapters(folder, model)


def _place(path: str, modules: Collection[str], prefix: str) -> str:
    """The name in the model of a module that an adapter of the model with its head calls ``path``."""
    parts = path.split(".")
    known = {"model", "transformer", "language_model", prefix}
    while ".".join(parts) not in modules and len(parts) > 1 and parts[0] in known:
        parts.pop(0)
    return ".".join(parts)


def _read_config(folder: Path) -> LoraConfig:
    """What peft has to know of an adapter; refuses what is more than LoRA of linear layers."""
    where, content = folder / CONFIG, read_json(folder / CONFIG)
    if not isinstance(content, dict) or content.get("peft_type") != "LORA":
        found = content.get("peft_type") if isinstance(content, dict) else type(content).__name__
        raise UnsupportedArchitecture(where, f"is a {found} adapter, not a LoRA", HINT)
    start, bias = content.get("init_lora_weights"), content.get("bias", "none")
    if start not in HARMLESS_STARTS:
        raise UnsupportedArchitecture(where, f"init_lora_weights {start!r} changes the base itself", HINT)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    beyond = (set(content) - known) | {"modules_to_save", "trainable_token_indices"}
    used = sorted(key for key in beyond if content.get(key) not in (None, False, "", [], {}))
    used += ["bias"] if bias != "none" else []
    if used:
        raise UnsupportedArchitecture(where, f"uses {', '.join(used)}, beyond LoRA of linear layers", HINT)
    return LoraConfig(**{key: value for key, value in content.items() if key in known})


@torch.no_grad()
def merge_adapters(name: str | Path, model: PreTrainedModel) -> None:
    """Fold each adapter, if any, into the layer it stands on, and put that layer back in its place.

    Computed in float32 at least, and rounded once to the type of the layer's weight.
    """
    adapted = [(place, layer) for place, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    for place, layer in adapted:
        base: nn.Module = layer.get_base_layer()
        dtype = next(base.parameters()).dtype
        layer.to(torch.promote_types(dtype, torch.float32))
        try:
            layer.merge(safe_merge=True)
        except (NotImplementedError, RuntimeError, ValueError) as error:
            raise UnsupportedArchitecture(name, f"the adapter cannot be merged ({error})") from error
        model.set_submodule(place, base.to(dtype))
    if adapted:
        forget_origin(model)
