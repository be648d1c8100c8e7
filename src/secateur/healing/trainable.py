"""What a training changes: adapters, the blocks, or everything; made ready before it and folded back after it.

``lora``    adapters on every linear layer of the blocks, merged at the end (Hu et al. 2021, arXiv:2106.09685)
``blocks``  all weights of the blocks and the final norm, but not the tokens' table
``all``     every weight
``auto``    ``blocks`` where the optimizer fits into memory with ease, else ``lora``
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import psutil  # type: ignore[import-untyped]
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from sentence_transformers import SentenceTransformer

from secateur.healing.on_cpu import use_bits_dropout
from secateur.healing.recipe import Recipe
from secateur.models.blocks import blocks_of, final_norm, linear_names

BYTES_PER_WEIGHT = 16
"""Of a trained weight in float32: itself, its gradient and AdamW's two moments."""

SHARE_OF_MEMORY = 0.5
"""What ``auto`` gives to them at most; the other half is for the model, its activations and everybody else."""


def decide(model: SentenceTransformer, recipe: Recipe) -> Recipe:
    """The recipe with ``auto`` and the learning rate decided for this model on this machine.

    Training all weights of the blocks is the default where it fits: for small cuts it is quicker than adapters and
    not worse (docs/healing.md). The memory is the device's whole, so that a training that was stopped finds the same
    answer when it goes on.
    """
    train = recipe.train
    if train == "auto":
        weights = sum(p.numel() for p in blocks_of(model[0].auto_model).parameters())
        fits = BYTES_PER_WEIGHT * weights <= SHARE_OF_MEMORY * _memory(model.device)
        train = "blocks" if fits else "lora"
    decided = replace(recipe, train=train)
    return replace(decided, learning_rate=decided.peak_learning_rate)


def _memory(device: torch.device) -> int:
    """Bytes of the device."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.virtual_memory().total)


def prepare(model: SentenceTransformer, recipe: Recipe) -> Mapping[str, torch.dtype]:
    """Make a model's weights trainable as a decided recipe says, in place.

    Weights that are trained are kept in float32, whatever the arithmetic: an update is often smaller than the last
    bit of a bfloat16.

    Returns:
        The number format of each weight before; :func:`finish` wants it back.
    """
    before = {name: p.dtype for name, p in model.named_parameters()}
    if recipe.train == "lora":
        torch.manual_seed(recipe.seed)
        model.add_adapter(
            LoraConfig(
                r=recipe.lora_rank,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                bias="none",
                target_modules=list(linear_names(model[0].auto_model)),
            )
        )
        use_bits_dropout(model)
        return before
    if recipe.train == "blocks":
        model.requires_grad_(False)
        for part in (blocks_of(model[0].auto_model), final_norm(model[0].auto_model)):
            part.requires_grad_(True)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    return before


def finish(model: SentenceTransformer, before: Mapping[str, torch.dtype]) -> None:
    """The model as it came, but trained, in place: adapters merged, number formats restored, in evaluation mode."""
    merge_adapters(model)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(before[name])
        parameter.requires_grad_(True)
        parameter.grad = None
    model.eval()


@contextmanager
def as_written(model: SentenceTransformer, before: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Within: the model computes with the weights and in the number formats that :func:`finish` would leave it with.

    A merged adapter, and a float32 weight, are rounded to the format of the model that came. Afterwards the weights are
    those of the training again, bit for bit.
    """
    trained = [(parameter, parameter.data) for parameter in model.parameters()]
    autocast = vars(model).pop("forward", None)  # the trainer's, around the model's own
    adapted = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    try:
        for layer in adapted:
            layer.merge(safe_merge=True)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(before.get(name, parameter.dtype))
        yield
    finally:
        for parameter, data in trained:
            parameter.data = data
        for layer in adapted:
            layer.merged_adapters.clear()
        if autocast is not None:
            model.forward = autocast


def merge_adapters(model: SentenceTransformer) -> None:
    """Fold each adapter into the layer it stands on, and put that layer back in its place."""
    transformer = model[0].auto_model
    adapted = [(name, layer) for name, layer in transformer.named_modules() if isinstance(layer, BaseTunerLayer)]
    for name, layer in adapted:
        layer.merge(safe_merge=True)
        owner, _, attribute = name.rpartition(".")
        setattr(transformer.get_submodule(owner), attribute, layer.get_base_layer())
    # transformers would otherwise go on to save an adapter in place of the model.
    transformer._hf_peft_config_loaded = False
    if hasattr(transformer, "peft_config"):
        del transformer.peft_config
