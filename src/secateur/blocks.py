"""Where an architecture keeps its blocks and final norm; cuts them, and the configuration with them.

Nothing here knows an architecture by name. The blocks are found by what transformers says of every model (the classes
whose outputs it records, the classes it does not split), and a cut is judged by one question: *is the model that
transformers builds from the cut configuration the cut model?* Both are built without weights (on the ``meta`` device,
some hundredths of a second), and compared module by module: classes, shapes, and the numbers that a module computed
from its configuration or its position. What differs is either a copy of the position or the depth, which the cut
brings in step, or a tensor that packs one slice for each block, which the cut slices, or a reason to refuse.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from secateur.errors import IllegalDepth, SecateurError, UnsupportedArchitecture

# Fields that list the indices of some layers. Any other list of one item for each layer is sliced.
INDEX_LISTS = frozenset(
    "attn_layer_indices cross_attention_layers full_attn_idxs hybrid_layer_ids mlp_only_layers moe_layers "
    "ple_layer_ids rope_scaling_layers".split()
)
# Fields that count layers from the first, or from the last.
COUNTS_FROM_FRONT = ("first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers")
COUNTS_FROM_BACK = ("num_kv_shared_layers",)
# Lists that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = re.compile(r"^_|token_ids?$|^architectures$|^pos_att_type$|^time_step_limit$|^mrope_section$")
# Attributes of modules that only repeat where a block stands, or how many blocks there are.
POSITIONS = frozenset("block_idx index kv_shared_layer_index layer_id layer_idx layer_index layer_number".split())
DEPTHS = frozenset("first_kv_shared_layer_idx n_layer n_layers num_hidden_layers num_layers".split())
# Flags of modules that say whether a later block wants this block's keys and values; never change its own output.
FOR_LATER_BLOCKS = frozenset({"store_full_length_kv"})
NOT_COMPARED = frozenset({"training", "gradient_checkpointing"})


@dataclass(frozen=True)
class Stack:
    """Where a model keeps its blocks.

    Attributes:
        path: Dotted path of the ``ModuleList`` from the model, such as ``layers`` or ``language_model.layers``.
        norm: Dotted path of the final norm; None where the blocks end normed (post-LN encoders).
        found_by: The rule that told the blocks from other lists of modules.
    """

    path: str
    norm: str | None
    found_by: str


def text_config(model_or_config: PreTrainedModel | PretrainedConfig) -> PretrainedConfig:
    """The part of a configuration that describes the text encoder's blocks. Edits to it are edits to the whole."""
    config = getattr(model_or_config, "config", model_or_config)
    encoder = getattr(config, "encoder", None)
    if isinstance(encoder, PretrainedConfig):
        return encoder
    # Without arguments: with decoder= or encoder=, transformers hands out a copy for older encoder-decoders.
    return config.get_text_config()


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the list of blocks and the final norm by structure.

    Raises:
        UnsupportedArchitecture: The model has no list of as many blocks as its configuration counts.
    """
    if model.config.is_encoder_decoder and hasattr(model, "decoder"):
        raise UnsupportedArchitecture(_name(model), "is an encoder-decoder", "open its encoder alone")
    depth = text_config(model).num_hidden_layers
    prefix, tower = _text_tower(model)
    lists = [
        (path, module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    for found_by, is_block in _rules(tower):
        hits = [path for path, blocks in lists if all(map(is_block, blocks))]
        if hits:
            path = min(hits, key=lambda hit: hit.count("."))
            norm = _find_norm(tower, path)
            return Stack(prefix + path, None if norm is None else prefix + norm, found_by)
    raise UnsupportedArchitecture(_name(model), *_why_no_blocks(model, depth))


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__


def _text_tower(model: PreTrainedModel) -> tuple[str, nn.Module]:
    """The part of a model that the text configuration describes, and its path with a dot at the end."""
    config = text_config(model)
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            return f"{path}." if path else "", module
    return "", model


def _rules(tower: nn.Module) -> tuple[tuple[str, Callable[[nn.Module], bool]], ...]:
    """Ways to tell blocks, the surest first."""
    parts = [module for module in tower.modules() if isinstance(module, PreTrainedModel)]
    recorded = tuple({cls for part in parts for cls in _recorded(part)})
    unsplit = {name for part in parts for name in part._no_split_modules or ()}
    return (
        ("recorded outputs", lambda block: isinstance(block, recorded)),
        ("unsplit modules", lambda block: type(block).__name__ in unsplit),
        ("checkpointed layers", lambda block: isinstance(block, GradientCheckpointingLayer)),
        ("length", lambda block: True),
    )


def _recorded(model: PreTrainedModel) -> list[type]:
    """The classes whose outputs transformers records as hidden states."""
    recorders = _CAN_RECORD_REGISTRY.get(model).get("hidden_states")
    recorders = recorders if isinstance(recorders, (list, tuple)) else [recorders]
    classes = [item.target_class if isinstance(item, OutputRecorder) else item for item in recorders]
    return [cls for cls in classes if isinstance(cls, type)]


def _why_no_blocks(model: PreTrainedModel, depth: int) -> tuple[str, str]:
    groups = getattr(text_config(model), "num_hidden_groups", depth)
    if groups < depth:
        return f"its {depth} layers share the weights of {groups} block(s), so no block can be taken out", ""
    return f"{type(model).__name__} has no list of {depth} blocks", "only stacks of separate blocks can be cut"


def _find_norm(tower: nn.Module, path: str) -> str | None:
    """A norm beside the blocks: registered after them, or before them under a name that says it is the final one."""
    hidden = text_config(tower).hidden_size
    owner_path, _, attribute = path.rpartition(".")
    for place, anchor in ((owner_path, attribute), ("", path.partition(".")[0])):
        children = dict(tower.get_submodule(place).named_children())
        names = list(children)
        position = names.index(anchor)
        before = [name for name in names[:position] if re.search(r"final|ln_f|norm_f|^norm$", name)]
        for name in (*names[position + 1 :], *before):
            if _is_norm(children[name], hidden) and not name.startswith("per_layer"):
                return f"{place}.{name}" if place else name
    return None


def _is_norm(module: nn.Module, hidden: int) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and (weight is None or weight.shape == (hidden,))


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks, in order."""
    blocks = model.get_submodule(find_stack(model).path)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def depth_of(model: PreTrainedModel) -> int:
    """How many blocks the model has."""
    return len(blocks_of(model))


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm after the last block; an ``nn.Identity`` where there is none."""
    norm = find_stack(model).norm
    return nn.Identity() if norm is None else model.get_submodule(norm)


def embeddings_of(model: PreTrainedModel) -> nn.Module:
    """The table of token embeddings."""
    return model.get_input_embeddings()


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The language-model head, None where the model was opened without one."""
    return model.get_output_embeddings()


def states_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns: itself, or the first of a tuple."""
    return output[0] if isinstance(output, (tuple, list)) else output


@torch.no_grad()
def tail_is_norm(model: PreTrainedModel, features: Mapping[str, torch.Tensor]) -> bool:
    """Whether the final norm of the last block's output is what the model itself returns.

    Where it is, one forward pass with hooks gives every depth. It is not where something else stands after the blocks
    (OPT-350m's projection, Gemma 3n's merging of streams): there, each depth takes a forward pass of its own.

    Args:
        model: The model, in evaluation mode.
        features: A batch: ``input_ids`` and ``attention_mask``, (texts, tokens).
    """
    caught: list[torch.Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(lambda *call: caught.append(states_of(call[-1])))
    try:
        expected = model(**features).last_hidden_state
    finally:
        hook.remove()
    if caught[-1].shape != expected.shape:
        return False
    real = features["attention_mask"].bool()
    found = final_norm(model)(caught[-1])
    return bool(torch.allclose(found[real].float(), expected[real].float(), rtol=1e-3, atol=1e-4))


def cut_config(config: PretrainedConfig, keep: Sequence[int]) -> None:
    """Edit a configuration in place so that it describes the kept blocks.

    Args:
        config: Of the whole model; a multimodal one's text part is edited.
        keep: Indices of the blocks that stay, ascending.
    """
    config = text_config(config)
    depth = config.num_hidden_layers
    overrides = getattr(config, "_heterogeneity_spec", None)
    for name, value in _cut_fields(config, depth, keep).items():
        setattr(config, name, value)
    config.num_hidden_layers = len(keep)
    if overrides is not None:
        # In place: the public setter checks it against a configuration that is half edited.
        kept = {
            new: overrides.per_layer_overrides[old]
            for new, old in enumerate(keep)
            if old in overrides.per_layer_overrides
        }
        overrides.per_layer_overrides.clear()
        overrides.per_layer_overrides.update(kept)


def _cut_fields(config: PretrainedConfig, depth: int, keep: Sequence[int]) -> dict[str, Any]:
    """The fields that a cut changes, but for the depth itself."""
    place = {old: new for new, old in enumerate(keep)}
    edits: dict[str, Any] = {}
    for name, value in vars(config).items():
        if name in INDEX_LISTS and isinstance(value, (list, tuple)):
            edits[name] = [place[i] for i in value if i in place]
        elif isinstance(value, (list, tuple)) and len(value) == depth and not NOT_PER_LAYER.search(name):
            edits[name] = [value[i] for i in keep]
        elif name in COUNTS_FROM_FRONT and isinstance(value, int):
            edits[name] = sum(i < value for i in keep)
        elif name in COUNTS_FROM_BACK and isinstance(value, int):
            edits[name] = sum(i >= depth - value for i in keep)
        elif name == "scale_depth" and value is not None:
            # MiniCPM scales each residual by scale_depth / sqrt(depth): the quotient must stay.
            edits[name] = value * math.sqrt(len(keep) / depth)
    return edits


def check_keep(config: PretrainedConfig, keep: Sequence[int]) -> None:
    """Make sure that a model can be cut to these blocks. Needs no weights.

    Raises:
        IllegalDepth: The blocks are not there, not ascending, or the architecture cannot be cut to them.
        UnsupportedArchitecture: The architecture cannot be cut at all.
    """
    _check_indices(keep, text_config(config).num_hidden_layers)
    full = skeleton(config)
    problem = _plan(full, keep).problem
    if problem:
        raise IllegalDepth(_say(keep), len(blocks_of(full)), problem, _nearest(legal_depths(config), len(keep)))


def legal_depths(config: PretrainedConfig) -> tuple[int, ...]:
    """The depths k for which the first k blocks are a model that saves and reloads unchanged. Needs no weights.

    Raises:
        UnsupportedArchitecture: The architecture cannot be cut at all.
    """
    full = skeleton(config)
    return tuple(k for k in range(1, depth_of(full) + 1) if not _plan(full, range(k)).problem)


def _check_indices(keep: Sequence[int], depth: int) -> None:
    asked = _say(keep)
    if not len(keep):
        raise IllegalDepth(asked, depth, "at least one block must stay", (1,))
    outside = [i for i in keep if not 0 <= i < depth]
    if outside:
        raise IllegalDepth(asked, depth, f"its blocks are 0 to {depth - 1}", (depth,))
    if list(keep) != sorted(set(keep)):
        raise IllegalDepth(asked, depth, "blocks must ascend, each at most once", (len(set(keep)),))


def _say(keep: Sequence[int]) -> str:
    """A prefix as its length, another set as its indices."""
    return str(len(keep)) if list(keep) == list(range(len(keep))) else f"blocks {', '.join(map(str, keep))}"


def _nearest(legal: Sequence[int], depth: int) -> tuple[int, ...]:
    """The legal depths on either side."""
    below = [k for k in legal if k <= depth]
    above = [k for k in legal if k > depth]
    return (*below[-1:], *above[:1])


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a configuration describes, without weights (on the ``meta`` device).

    Of an encoder-decoder, the encoder alone.

    Raises:
        UnsupportedArchitecture: transformers has no such model.
    """
    if config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return _build(MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)], config)
    try:
        return _build(AutoModel.from_config, config)
    except ValueError as error:
        raise UnsupportedArchitecture(config.name_or_path or config.model_type, _first_line(error)) from None


def _build(make: Callable[[PretrainedConfig], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        return make(config)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@dataclass(frozen=True)
class _Plan:
    """What a cut changes besides the list of blocks.

    ``values`` are (module, attribute, value) and ``packed`` (module, tensor, dimension, indices), by the paths of the cut model;
    ``problem`` says why the cut is not possible and is empty where it is.
    """

    problem: str = ""
    values: tuple[tuple[str, str, Any], ...] = ()
    packed: tuple[tuple[str, str, int], ...] = ()


class _Misfit(Exception):
    """The cut model is not the model that its configuration describes."""


def _plan(full: PreTrainedModel, keep: Sequence[int]) -> _Plan:
    """Compare the model without weights, cut, with the one that transformers builds from the cut configuration."""
    config = copy.deepcopy(full.config)
    try:
        with _quiet():
            cut_config(config, keep)
            _check_survives(config)
            target = _build(type(full), config)
            return _compare(full, target, keep)
    except _Misfit as misfit:
        return _Plan(str(misfit))
    except Exception as error:  # whatever transformers raises here, it says that such a configuration is not legal
        if isinstance(error, SecateurError):
            raise
        return _Plan(f"transformers refuses the cut configuration ({_first_line(error)})")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Legal and illegal configurations are tried on purpose: what transformers logs of them is not for the user."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_survives(config: PretrainedConfig) -> None:
    """A configuration must come back from its own JSON as it was written."""
    back = type(config).from_dict(json.loads(config.to_json_string()))
    written, read = text_config(config).to_dict(), text_config(back).to_dict()
    changed = [name for name in written if name in read and written[name] != read[name]]
    if changed:
        raise _Misfit(f"{config.model_type} rewrites {', '.join(changed)} of the cut configuration when it is loaded")


def _compare(full: PreTrainedModel, target: PreTrainedModel, keep: Sequence[int]) -> _Plan:
    path = find_stack(full).path
    blocks = f"{path}."
    old = dict(full.named_modules())
    new = dict(target.named_modules())
    source = {name: _source(name, blocks, keep) for name in new}
    expected = {name for name in old if not name.startswith(blocks) or int(name[len(blocks) :].split(".")[0]) in keep}
    if set(source.values()) != expected:
        odd = sorted(set(source.values()) ^ expected)[0]
        raise _Misfit(f"a model of the cut configuration would have other modules ({odd})")
    place = {i: j for j, i in enumerate(keep)}
    values, packed = [], []
    for name, module in new.items():
        before = old[source[name]]
        if type(module) is not type(before):
            raise _Misfit(
                f"in its new place, {source[name]} would be a {type(module).__name__}, not a {type(before).__name__}"
            )
        values += [(name, *change) for change in _changed_values(source[name], before, module, place)]
        packed += [
            (name, *change)
            for change in _changed_shapes(
                source[name], before, module, name.startswith(blocks), len(old[path]), len(keep)
            )
        ]
    return _Plan("", tuple(values), tuple(packed))


def _source(name: str, blocks: str, keep: Sequence[int]) -> str:
    """The path that a module of the cut model has in the full model."""
    if not name.startswith(blocks):
        return name
    index, dot, rest = name[len(blocks) :].partition(".")
    return f"{blocks}{keep[int(index)]}{dot}{rest}"


def _changed_values(
    path: str, before: nn.Module, after: nn.Module, place: Mapping[int, int]
) -> Iterator[tuple[str, Any]]:
    """Attributes to bring in step; a misfit where a number that matters would change with the position or depth."""
    for name, value in vars(after).items():
        old = vars(before).get(name)
        if (
            name.startswith("_")
            or name in NOT_COMPARED
            or not isinstance(value, (bool, int, float, str))
            or value == old
        ):
            continue
        moved = name in POSITIONS and place.get(old) == value
        sized = name in DEPTHS | {"in_features", "embedding_dim", "out_features"} | FOR_LATER_BLOCKS
        if not (moved or sized):
            raise _Misfit(f"in its new place, {path} would have {name} {value}, not {old}")
        yield name, value


def _changed_shapes(path, before, after, inside, depth, kept) -> Iterator[tuple[str, int]]:
    for name, tensor in (*after.named_parameters(recurse=False), *after.named_buffers(recurse=False)):
        old = before.get_parameter(name) if name in before._parameters else before.get_buffer(name)
        if old.shape == tensor.shape:
            continue
        axes = [i for i, (a, b) in enumerate(zip(old.shape, tensor.shape)) if a != b]
        if (
            inside
            or old.dim() != tensor.dim()
            or len(axes) != 1
            or old.shape[axes[0]] * kept != tensor.shape[axes[0]] * depth
        ):
            raise _Misfit(
                f"in its new place, {path}.{name} would have the shape {tuple(tensor.shape)}, not {tuple(old.shape)}"
            )
        yield name, axes[0]


def cut(model: PreTrainedModel, keep: Sequence[int]) -> None:
    """Cut a model in place to the kept blocks, with its configuration and every copy of their positions.

    Tensors outside the blocks that pack one slice for each block are sliced; caches are switched off, for an encoder
    needs none, and hybrids cut below their first attention block fail with one.

    Args:
        model: The model; its weights are not copied.
        keep: Indices of the blocks that stay, ascending.

    Raises:
        IllegalDepth: The model cannot be cut to these blocks; it is unchanged then.
        UnsupportedArchitecture: The model cannot be cut at all.
    """
    stack = find_stack(model)
    depth = depth_of(model)
    _check_indices(keep, depth)
    full = _build(type(model), copy.deepcopy(model.config))
    plan = _plan(full, keep)
    if plan.problem:
        legal = [k for k in range(1, depth + 1) if not _plan(full, range(k)).problem]
        raise IllegalDepth(_say(keep), depth, plan.problem, _nearest(legal, len(keep)))
    _keep_blocks(model, stack.path, keep)
    for path, name, value in plan.values:
        setattr(model.get_submodule(path), name, value)
    for path, name, axis in plan.packed:
        _slice(model.get_submodule(path), name, axis, depth, keep)
    for config in _configs(model, stack.path):
        cut_config(config, keep)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            module.config.use_cache = False


def _keep_blocks(model: PreTrainedModel, path: str, keep: Sequence[int]) -> None:
    owner, _, attribute = path.rpartition(".")
    blocks = blocks_of(model)
    setattr(model.get_submodule(owner), attribute, nn.ModuleList([blocks[i] for i in keep]))


@torch.no_grad()
def _slice(module: nn.Module, name: str, axis: int, depth: int, keep: Sequence[int]) -> None:
    """Keep the slices of the kept blocks in a tensor that packs one for each block along an axis."""
    tensor = getattr(module, name)
    width = tensor.shape[axis] // depth
    index = torch.cat([torch.arange(i * width, (i + 1) * width) for i in keep]).to(tensor.device)
    kept = tensor.index_select(axis, index)
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(module, name, nn.Parameter(kept, requires_grad=tensor.requires_grad) if is_parameter else kept)


def _configs(model: PreTrainedModel, path: str) -> list[PretrainedConfig]:
    """The distinct configurations that describe the blocks: T5's encoder holds a copy of the model's."""
    parts = path.split(".")
    owners = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    configs = [text_config(owner) for owner in owners if isinstance(owner, PreTrainedModel)]
    return list({id(config): config for config in configs}.values())


def tensor_of_block(name: str, path: str) -> tuple[int, str] | None:
    """Tell which block a tensor of a checkpoint belongs to.

    Args:
        name: Of the tensor, such as ``model.layers.7.mlp.up_proj.weight``.
        path: Of the blocks (:attr:`Stack.path`), such as ``layers``; the name may have a prefix before it.

    Returns:
        The block's index and the name inside the block, ``(7, "mlp.up_proj.weight")``; None for other tensors.
    """
    match = re.search(rf"(?:^|\.){re.escape(path)}\.(\d+)\.(.+)$", name)
    return (int(match[1]), match[2]) if match else None


def linear_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The linear modules inside the blocks, as peft's ``target_modules``: fused projections and GPT-2's Conv1D too.

    Names are relative to a block (``self_attn.q_proj``) where that means the blocks alone, else full paths (a vision
    tower may use the same names).
    """
    prefix = find_stack(model).path + "."
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    inside = [name for name in linear if name.startswith(prefix)]
    short = list(dict.fromkeys(name[len(prefix) :].partition(".")[2] for name in inside))
    outside = [name for name in linear if not name.startswith(prefix)]
    clash = any(f".{name}".endswith(f".{end}") for name in outside for end in short)
    return tuple(inside if clash else short)
