"""The blocks of a model: found, cut with everything that counts them, or passed over.

Finding them is :mod:`.stacks`, knowing which may go is :mod:`.legality`; both are had from here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.models.legality import (
    build,
    check_keep,
    cut_config,
    encoder_class,
    late_modules,
    legal_depths,
    legal_plan,
    opens_at,
    packed_tensors,
    skeleton,
)
from secateur.models.stacks import (
    Stack,
    blocks_of,
    depth_of,
    embeddings_of,
    final_norm,
    find_stack,
    head_of,
    linear_names,
    states_of,
    tail_is_norm,
    tensor_of_block,
    text_config,
)

__all__ = [
    "Stack",
    "blocks_of",
    "bypassed",
    "check_keep",
    "cut",
    "cut_config",
    "depth_of",
    "embeddings_of",
    "encoder_class",
    "final_norm",
    "find_stack",
    "head_of",
    "late_modules",
    "legal_depths",
    "linear_names",
    "opens_at",
    "packed_tensors",
    "skeleton",
    "states_of",
    "tail_is_norm",
    "tensor_of_block",
    "text_config",
]


def cut(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Cut a model in place to the kept blocks, with its configuration and every copy of their positions.

    Tensors outside the blocks that pack one slice for each block are sliced; caches are switched off, for an encoder
    needs none, and hybrids cut below their first attention block fail with one.

    Args:
        model: The model; the weights of its blocks are not copied.
        keep: Indices of the blocks that stay, ascending.

    Raises:
        IllegalDepth: The model cannot be cut to these blocks; it is unchanged then.
        UnsupportedArchitecture: The model cannot be cut at all.
    """
    path = find_stack(model).path
    blocks = blocks_of(model)
    plan = legal_plan(build(type(model), copy.deepcopy(model.config)), keep)
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.ModuleList([blocks[i] for i in keep]))
    for module, name, value in plan.values:
        setattr(model.get_submodule(module), name, value)
    for module, name, axis in plan.packed:
        _slice(model.get_submodule(module), name, axis, len(blocks), keep)
    for module in reversed(plan.unused):
        parent, _, index = module.rpartition(".")
        del model.get_submodule(parent)[int(index)]
    for config in _configs(model, path):
        cut_config(config, keep)
    for part in model.modules():
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False


@torch.no_grad()
def _slice(module: nn.Module, name: str, axis: int, depth: int, keep: Sequence[int]) -> None:
    """Keep the slices of the kept blocks in a tensor that packs one for each block along an axis."""
    tensor = getattr(module, name)
    slices = tensor.chunk(depth, axis)
    kept = torch.cat([slices[i] for i in keep], axis)
    setattr(module, name, nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept)


def _configs(model: PreTrainedModel, path: str) -> list[PretrainedConfig]:
    """The distinct configurations that describe the blocks: T5's encoder holds a copy of the model's."""
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    configs = [text_config(owner) for owner in owners if isinstance(owner, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


@contextlib.contextmanager
def bypassed(model: PreTrainedModel, keep: Sequence[int]) -> Iterator[None]:
    """Within: the uncut model gives what it would give if it had the kept blocks only.

    The other blocks are run, and hand on what they were given: nothing of what :func:`cut` or a cut configuration does
    is used, so that both can be checked by it.
    """
    others = [block for i, block in enumerate(blocks_of(model)) if i not in set(keep)]
    hooks = [block.register_forward_hook(_hand_on, with_kwargs=True) for block in others]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hand_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs["hidden_states"]
    return (given, *output[1:]) if isinstance(output, tuple) else given
