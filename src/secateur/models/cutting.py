"""Which layers a model can be cut to, and what else the cut changes, told without weights.

A cut is judged by one question: *is the model that transformers builds from the cut configuration the cut model?* Both
are built without weights, and compared module by module: classes, shapes, and numbers. What differs is a copy of the
position or the depth, which the cut brings in step; a tensor that packs one slice for each layer, which the cut slices;
or a reason to refuse.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from secateur.errors import IllegalDepth
from secateur.models.blocks import (
    blocks_of,
    build,
    depth_of,
    find_stack,
    last_line,
    shares_weights,
    skeleton,
    text_config,
)
from secateur.models.compat import cut_layer_overrides, drop_layer_pattern, tensors_of
from secateur.progress import quiet

# Fields that list the indices of some layers. Any other list of one item for each layer is sliced.
INDEX_LISTS = {
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "rope_scaling_layers",
}
# Fields that count layers from the first.
COUNTS = {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers"}
# Lists that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = re.compile(r"^_|token_ids?$|^architectures$|^pos_att_type$|^time_step_limit$|^mrope_section$")
# Attributes of a layer's modules that only repeat where the layer stands, or how many layers (of a kind) there are.
POSITIONS = {"block_idx", "index", "kv_shared_layer_index", "layer_id", "layer_idx", "layer_index", "layer_number"}
DEPTHS = {"n_layer", "n_layers", "num_fwd_mem_blocks", "num_hidden_layers", "num_layers"}
# Whether a later layer wants this layer's keys and values; changes nothing in the layer's own output.
FOR_LATER = {"store_full_length_kv"}


def cut_config(config: PretrainedConfig, keep: Sequence[int]) -> None:
    """Edit a configuration in place (of a multimodal one, its text part) so that it describes the kept layers."""
    config = text_config(config)
    depth, place = config.num_hidden_layers, {old: new for new, old in enumerate(keep)}
    for name, value in list(vars(config).items()):
        if name in INDEX_LISTS and isinstance(value, (list, tuple)):
            setattr(config, name, [place[i] for i in value if i in place])
        elif name == "ple_layer_ids":  # which counts from 1
            setattr(config, name, [place[i - 1] + 1 for i in value if i - 1 in place])
        elif isinstance(value, (list, tuple)) and len(value) == depth and not NOT_PER_LAYER.search(name):
            setattr(config, name, [value[i] for i in keep])
            if name == "indexer_types" and value[keep[0]] == "shared":
                raise _Misfit(f"layer {keep[0]} takes what an earlier one selects, and would be the first")
        elif name in COUNTS and isinstance(value, int):
            setattr(config, name, sum(i < value for i in keep))
        elif name == "num_kv_shared_layers" and isinstance(value, int):  # the last ones
            setattr(config, name, sum(i >= depth - value for i in keep))
        elif name == "num_blocks" and value == depth:
            setattr(config, name, len(keep))
        elif name == "scale_depth" and value is not None:
            # MiniCPM scales each residual by scale_depth / sqrt(depth): the quotient must stay.
            setattr(config, name, value * math.sqrt(len(keep) / depth))
    config.num_hidden_layers = len(keep)
    drop_layer_pattern(config)
    cut_layer_overrides(config, keep)


@dataclass(frozen=True)
class Plan:
    """What a cut changes besides the list of layers.

    Attributes:
        values: (module, attribute, value), by the paths of the cut model.
        packed: (module, tensor, axis) of tensors that pack one slice for each layer along an axis.
        unused: Modules, by the paths of the cut model, that only layers now gone have used.
    """

    values: tuple[tuple[str, str, Any], ...] = ()
    packed: tuple[tuple[str, str, int], ...] = ()
    unused: tuple[str, ...] = ()


def check_keep(config: PretrainedConfig, keep: Sequence[int]) -> None:
    """Raise what :func:`cut` would, where a model cannot be cut to these layers. Needs no weights."""
    legal_plan(skeleton(config), keep)


def legal_depths(config: PretrainedConfig, layers: Callable[[int], Sequence[int]] = range) -> tuple[int, ...]:
    """The depths that a model can be cut to, saved and reloaded unchanged, ascending. Needs no weights.

    ``layers`` gives the indices of the layers that stay at a depth. Default: the first ones.
    """
    return tuple(depth for depth, _ in _cuts(skeleton(config), layers))


def legal_plan(full: PreTrainedModel, keep: Sequence[int]) -> Plan:
    """The plan of a cut, or an error that names the nearest legal depths."""
    depth, kept = depth_of(full), list(keep)
    try:
        if not kept:
            raise _Misfit("at least one layer must stay")
        if not all(0 <= i < depth for i in kept):
            raise _Misfit(f"its layers are 0 to {depth - 1}")
        if kept != sorted(set(kept)):
            raise _Misfit("layers must ascend, each at most once")
        return _plan(full, kept)
    except _Misfit as misfit:
        problem = str(misfit)
    asked = str(len(kept)) if kept == list(range(len(kept))) else f"layers {', '.join(map(str, kept))}"
    legal, wanted = [legal for legal, _ in _cuts(full)], max(1, len(kept))
    nearest = (*[k for k in legal if k <= wanted][-1:], *[k for k in legal if k > wanted][:1])
    raise IllegalDepth(asked, depth, problem, nearest)


def packed_tensors(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the tensors outside the layers that pack one slice for each layer, as per-layer embeddings do."""
    cuts = _cuts(build(type(model), copy.deepcopy(model.config)))
    plan = next((plan for _, plan in cuts), Plan())
    return tuple(f"{module}.{tensor}".lstrip(".") for module, tensor, _ in plan.packed)


def late_modules(model: PreTrainedModel) -> dict[str, int]:
    """Modules of a shared layer that only a later layer uses, as Zamba 2's adapters → the index of that layer."""
    if not shares_weights(model):
        return {}
    full = build(type(model), copy.deepcopy(model.config))
    return {name: depth for depth, plan in _cuts(full) for name in plan.unused}


def _cuts(full: PreTrainedModel, layers: Callable[[int], Sequence[int]] = range) -> Iterator[tuple[int, Plan]]:
    """The depths that a model without weights can be cut to, from the shallowest, and what each cut changes."""
    for depth in range(1, depth_of(full) + 1):
        try:
            plan = _plan(full, layers(depth))
        except _Misfit:
            continue
        yield depth, plan


def cut(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Cut a model in place to the layers of these indices, with its configuration and every copy of their positions.

    No weights of the layers are copied. Caches are switched off: an encoder needs none, and hybrids cut below their
    first attention layer fail with one.

    Raises:
        IllegalDepth: The model cannot be cut to these layers; it is unchanged then.
        UnsupportedArchitecture: The model cannot be cut at all.
    """
    path = find_stack(model).path
    blocks = blocks_of(model)
    plan = legal_plan(build(type(model), copy.deepcopy(model.config)), keep)
    model.set_submodule(path, nn.ModuleList([blocks[i] for i in keep]))
    for module, name, value in plan.values:
        setattr(model.get_submodule(module), name, value)
    for module, name, axis in plan.packed:
        tensor = getattr(model.get_submodule(module), name)
        slices = tensor.detach().chunk(len(blocks), axis)
        kept = torch.cat([slices[i] for i in keep], axis)
        kept = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
        setattr(model.get_submodule(module), name, kept)
    for module in reversed(plan.unused):
        parent, _, index = module.rpartition(".")
        del model.get_submodule(parent)[int(index)]
    # T5's encoder holds a copy of the model's configuration.
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    configs = [text_config(part) for part in owners if isinstance(part, PreTrainedModel)]
    for config in {id(config): config for config in configs}.values():
        cut_config(config, keep)
    for part in model.modules():
        if getattr(getattr(part, "config", None), "use_cache", False):
            part.config.use_cache = False


@contextlib.contextmanager
def bypassed(model: PreTrainedModel, keep: Sequence[int]) -> Iterator[None]:
    """Within: the uncut model gives what it would give if it had the kept layers only, in training too.

    Layers before the first kept one run, and what they give is dropped. Those between kept ones are skipped, and their
    weights never read. Those after the last are out of the list: a model may collect what each layer in it was given
    (Inkling 2), even a skipped one. It uses nothing of :func:`cut`, which is checked by it.
    """
    last: list[Any] = []  # what the latest of the kept layers gave

    def hand_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, (tuple, list)) else given

    def note(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        last[:] = [output]

    path, blocks = find_stack(model).path, blocks_of(model)
    skipped = [blocks[i] for i in range(min(keep), max(keep)) if i not in set(keep)]
    hooks = [block.register_forward_hook(hand_on, with_kwargs=True) for block in blocks[: min(keep)]]
    hooks += [blocks[i].register_forward_hook(note) for i in keep]
    for block in skipped:
        block.forward = lambda *args, **kwargs: last[0]
    model.set_submodule(path, nn.ModuleList(blocks[: max(keep) + 1]))
    try:
        yield
    finally:
        model.set_submodule(path, blocks)
        for hook in hooks:
            hook.remove()
        for block in skipped:
            del block.forward


class _Misfit(Exception):
    """Why the cut model is not the model that its configuration describes."""


def _plan(full: PreTrainedModel, keep: Sequence[int]) -> Plan:
    """Compare the model, cut, with the one that transformers builds from the cut configuration."""
    config = copy.deepcopy(full.config)
    path = find_stack(full).path
    try:
        with quiet():  # what transformers logs of configurations that are tried is not for the user
            cut_config(config, keep)
            _check_survives(config)
            target = build(type(full), config)
    except _Misfit:
        raise
    except Exception as error:  # of whatever kind: transformers does not take the cut configuration
        raise _Misfit(f"transformers refuses the cut configuration ({last_line(error)})") from error
    return _compare(_cut_modules(full, path, keep), dict(target.named_modules()), path, keep)


def _check_survives(config: PretrainedConfig) -> None:
    """A configuration must come back from its own file as it was written."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        back = type(config).from_pretrained(folder)
    written, read = text_config(config).to_dict(), text_config(back).to_dict()
    for name, value in written.items():
        # Names with an underscore tell where a configuration was read from; None stands for a default to fill in.
        if not (name.startswith("_") or value is None or read.get(name, value) == value):
            raise _Misfit(f"{config.model_type} would rewrite {name} on loading, from {value} to {read[name]}")


def _cut_modules(full: PreTrainedModel, path: str, keep: Sequence[int]) -> dict[str, nn.Module]:
    """The modules of a model by the paths that they have after the cut."""
    place = {str(old): str(new) for new, old in enumerate(keep)}
    modules = {}
    for name, module in full.named_modules():
        if name.startswith(f"{path}."):
            index, dot, rest = name[len(path) + 1 :].partition(".")
            if index not in place:
                continue
            name = f"{path}.{place[index]}{dot}{rest}"
        modules[name] = module
    return modules


def _compare(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], path: str, keep: Sequence[int]) -> Plan:
    """Compare a cut model's modules with those that its configuration would give it."""
    for name, module in after.items():
        if type(before.get(name)) is not type(module):
            found = type(before[name]).__name__ if name in before else "nothing"
            raise _Misfit(f"{name} depends on place or depth: {found} would become {type(module).__name__}")
    values, packed = [], []
    place = {old: new for new, old in enumerate(keep)}
    ratio = Fraction(len(keep), len(before[path]))  # type: ignore[arg-type]  # a ModuleList
    for name, module in after.items():
        inside = name.startswith(f"{path}.")
        for attribute, old, new in changed_values(before[name], module):
            # In a layer, what only repeats its position, the depth, or what later layers want of it; outside, a count.
            repeats = (attribute in POSITIONS and place.get(old) == new) or attribute in DEPTHS | FOR_LATER
            if not (repeats if inside else isinstance(new, int)):
                raise _Misfit(f"{name}.{attribute} depends on place or depth: {old} would become {new}")
            values.append((name, attribute, new))
        for attribute, old, new in changed_shapes(before[name], module):
            # The one axis that shrinks as the depth does.
            axes = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if sizes[0] != sizes[1]]
            if inside or len(old) != len(new) or len(axes) != 1 or old[axes[0]] * ratio != new[axes[0]]:
                raise _Misfit(f"{name}.{attribute} depends on place or depth: {old} would become {new}")
            packed.append((name, attribute, axes[0]))
    return Plan(tuple(values), tuple(packed), _unused(before, after, keep))


def changed_values(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Numbers, flags and words of a module that differ: (attribute, old, new)."""
    for name, new in vars(after).items():
        old = vars(before).get(name)
        is_other = name.startswith("_") or name in ("training", "gradient_checkpointing")
        if is_other or not isinstance(new, (int, float, str)):
            continue
        same = math.isclose(old, new, rel_tol=1e-9) if isinstance(old, float) and isinstance(new, float) else old == new
        if not same:
            yield name, old, new


def changed_shapes(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Parameters and buffers of a module whose shapes differ: (attribute, old, new)."""
    tensors = tensors_of(before)
    for name, tensor in tensors_of(after).items():
        old = () if (was := tensors.get(name)) is None else tuple(was.shape)
        if tensor is not None and old != tuple(tensor.shape):
            yield name, old, tuple(tensor.shape)


def _unused(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], keep: Sequence[int]) -> tuple[str, ...]:
    """Items at the end of lists that only later layers use, as Zamba 2's adapters of its shared layer."""
    gone = [name for name in before if name not in after]
    tops = [name for name in gone if name.rpartition(".")[0] in after]
    for name in tops:
        in_list = isinstance(after[name.rpartition(".")[0]], nn.ModuleList)
        if not in_list or list(keep) != list(range(len(keep))):
            raise _Misfit(f"{name} depends on place or depth: {type(before[name]).__name__} would be gone")
    return tuple(tops)
