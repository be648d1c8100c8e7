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
import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers import logging as transformers_logging
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING
from transformers.pytorch_utils import Conv1D
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

from secateur.errors import IllegalDepth, UnsupportedArchitecture

# Fields that list the indices of some layers. Any other list of one item for each layer is sliced.
INDEX_LISTS = {
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "mlp_only_layers",
    "moe_layers",
    "ple_layer_ids",
    "rope_scaling_layers",
}
# Fields that count layers from the first, or from the last.
COUNTS_FROM_FRONT = {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers"}
COUNTS_FROM_BACK = {"num_kv_shared_layers"}
# Fields that repeat the depth under another name.
REPEATS_OF_DEPTH = {"num_blocks"}
# Lists that have nothing to do with layers, whatever their length.
NOT_PER_LAYER = re.compile(r"^_|token_ids?$|^architectures$|^pos_att_type$|^time_step_limit$|^mrope_section$")
# Attributes of a block's modules that only repeat where the block stands, or how many blocks (of a kind) there are.
POSITIONS = {"block_idx", "index", "kv_shared_layer_index", "layer_id", "layer_idx", "layer_index", "layer_number"}
DEPTHS = {"n_layer", "n_layers", "num_fwd_mem_blocks", "num_hidden_layers", "num_layers"}
# Whether a later block wants this block's keys and values; changes nothing in the block's own output.
FOR_LATER_BLOCKS = {"store_full_length_kv"}
NOT_COMPARED = {"training", "gradient_checkpointing"}


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
    depth = getattr(text_config(model), "num_hidden_layers", 0)
    prefix, tower = _text_tower(model)
    lists = [
        (path, module)
        for path, module in tower.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth > 0
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
    recorded = tuple({cls for part in _parts(tower) for cls in _recorded(part, "hidden_states")})
    unsplit = {name for part in _parts(tower) for name in part._no_split_modules or ()}
    return (
        ("recorded outputs", lambda block: isinstance(block, recorded)),
        ("unsplit modules", lambda block: type(block).__name__ in unsplit),
        ("checkpointed layers", lambda block: isinstance(block, GradientCheckpointingLayer)),
        ("length", lambda block: True),
    )


def _parts(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _recorded(model: PreTrainedModel, what: str) -> list[type]:
    """The classes whose outputs transformers records under a name."""
    recorders = _CAN_RECORD_REGISTRY.get(model).get(what)
    recorders = recorders if isinstance(recorders, (list, tuple)) else [recorders]
    classes = [item.target_class if isinstance(item, OutputRecorder) else item for item in recorders]
    return [cls for cls in classes if isinstance(cls, type)]


def _why_no_blocks(model: PreTrainedModel, depth: int) -> tuple[str, str]:
    groups = getattr(text_config(model), "num_hidden_groups", depth)
    if groups < depth:
        return f"its {depth} layers share the weights of {groups} block(s), so no block can be taken out", ""
    return f"{type(model).__name__} has no list of {depth or 'its'} blocks", "only stacks of separate blocks can be cut"


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
    table: nn.Module = model.get_input_embeddings()
    return table


def head_of(model: PreTrainedModel) -> nn.Module | None:
    """The language-model head, None where the model was opened without one."""
    head: nn.Module | None = model.get_output_embeddings()
    return head


def states_of(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns: itself, or the first of a tuple."""
    states: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return states


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
    if not caught or caught[-1].shape != expected.shape:
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
    for name, value in _cut_fields(config, depth, keep).items():
        setattr(config, name, value)
    config.num_hidden_layers = len(keep)
    spec = getattr(config, "_heterogeneity_spec", None)
    if spec is not None:
        # In place: the public setter checks it against a configuration that is half edited.
        overrides = dict(spec.per_layer_overrides)
        spec.per_layer_overrides.clear()
        spec.per_layer_overrides.update({new: overrides[old] for new, old in enumerate(keep) if old in overrides})


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
        elif name in REPEATS_OF_DEPTH and value == depth:
            edits[name] = len(keep)
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
    _legal_plan(skeleton(config), keep)


def legal_depths(config: PretrainedConfig) -> tuple[int, ...]:
    """The depths k for which the first k blocks are a model that saves and reloads unchanged. Needs no weights.

    Raises:
        UnsupportedArchitecture: The architecture cannot be cut at all.
    """
    return _legal_depths(skeleton(config))


def _legal_depths(full: PreTrainedModel) -> tuple[int, ...]:
    return tuple(k for k in range(1, depth_of(full) + 1) if not _plan(full, range(k)).problem)


def _legal_plan(full: PreTrainedModel, keep: Sequence[int]) -> _Plan:
    """The plan of a cut, or an error that names the nearest legal depths."""
    depth = depth_of(full)
    kept = list(keep)
    asked = str(len(kept)) if kept == list(range(len(kept))) else f"blocks {', '.join(map(str, kept))}"
    if not kept:
        raise IllegalDepth(asked, depth, "at least one block must stay", _nearest(_legal_depths(full), 1))
    if not all(0 <= i < depth for i in kept):
        problem = f"its blocks are 0 to {depth - 1}"
    elif kept != sorted(set(kept)):
        problem = "blocks must ascend, each at most once"
    else:
        plan = _plan(full, kept)
        if not plan.problem:
            return plan
        problem = plan.problem
    raise IllegalDepth(asked, depth, problem, _nearest(_legal_depths(full), len(kept)))


def _nearest(legal: Sequence[int], depth: int) -> tuple[int, ...]:
    """The legal depths on either side."""
    below = [k for k in legal if k <= depth]
    above = [k for k in legal if k > depth]
    return (*below[-1:], *above[:1])


def encoder_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that holds the encoder of an encoder-decoder alone, such as ``T5EncoderModel``; None for others."""
    known = type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    found = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)] if known else None
    return found if found is not None and found.__name__.endswith("EncoderModel") else None


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a configuration describes, without weights (on the ``meta`` device).

    Of an encoder-decoder, the encoder alone.

    Raises:
        UnsupportedArchitecture: transformers has no such model.
    """
    config = copy.deepcopy(config)
    name = config.name_or_path or type(config).__name__
    encoder = encoder_class(config)
    if encoder is None and type(config) not in MODEL_MAPPING:
        problem = f"transformers {transformers_version} has no text model of the type {config.model_type}"
        raise UnsupportedArchitecture(name, problem)
    if encoder is not None:
        config.is_encoder_decoder = False
    try:
        return _build(encoder or AutoModel.from_config, config)
    except Exception as error:  # of whatever kind: a configuration that is not whole, or a package that it needs
        problem = f"transformers {transformers_version} cannot build it ({_last_line(error)})"
        raise UnsupportedArchitecture(name, problem) from error


def _build(make: Callable[[PretrainedConfig], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    with no_init_weights(), torch.device("meta"):
        return make(config)


def _last_line(error: Exception) -> str:
    """What an error of transformers says, without the lines around it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class _Plan:
    """What a cut changes besides the list of blocks.

    Attributes:
        problem: Why the cut is not possible; empty where it is.
        values: (module, attribute, value), by the paths of the cut model.
        packed: (module, tensor, axis) of tensors that pack one slice for each block along an axis.
        unused: Modules, by the paths of the cut model, that only blocks now gone have used.
    """

    problem: str = ""
    values: tuple[tuple[str, str, Any], ...] = ()
    packed: tuple[tuple[str, str, int], ...] = ()
    unused: tuple[str, ...] = ()


class _Misfit(Exception):
    """The cut model is not the model that its configuration describes."""


def _plan(full: PreTrainedModel, keep: Sequence[int]) -> _Plan:
    """Compare the model, cut, with the one that transformers builds from the cut configuration."""
    config = copy.deepcopy(full.config)
    path = find_stack(full).path
    try:
        with _quiet():
            cut_config(config, keep)
            _check_survives(config)
            target = _build(type(full), config)
    except _Misfit as misfit:
        return _Plan(str(misfit))
    except Exception as error:  # of whatever kind: transformers does not take the cut configuration
        return _Plan(f"transformers refuses the cut configuration ({_last_line(error)})")
    try:
        return _compare(_cut_modules(full, path, keep), dict(target.named_modules()), path, keep)
    except _Misfit as misfit:
        return _Plan(str(misfit))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Configurations are tried on purpose: what transformers logs of the illegal ones is not for the user."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _check_survives(config: PretrainedConfig) -> None:
    """A configuration must come back from its own file as it was written."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        back = type(config).from_pretrained(folder)
    written, read = text_config(config).to_dict(), text_config(back).to_dict()
    for name, value in written.items():
        # Names with an underscore tell where a configuration was read from; None stands for a default to fill in.
        if name.startswith("_") or value is None or read.get(name, value) == value:
            continue
        found = read[name]
        if isinstance(value, list) and isinstance(found, list) and len(value) == len(found):
            i = next(i for i, item in enumerate(value) if item != found[i])
            name, value, found = f"{name}[{i}]", value[i], found[i]
        raise _Misfit(f"{config.model_type} would rewrite {name} on loading, from {value} to {found}")


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


def _compare(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], path: str, keep: Sequence[int]) -> _Plan:
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
        for attribute, old, new in _changed_values(before[name], module):
            if not (_is_copy(attribute, old, new, place) if inside else isinstance(new, int)):
                raise _Misfit(f"{name}.{attribute} depends on place or depth: {old} would become {new}")
            values.append((name, attribute, new))
        for tensor, old_shape, new_shape in _changed_shapes(before[name], module):
            axis = None if inside else _packed_axis(old_shape, new_shape, ratio)
            if axis is None:
                raise _Misfit(f"{name}.{tensor} depends on place or depth: {old_shape} would become {new_shape}")
            packed.append((name, tensor, axis))
    return _Plan("", tuple(values), tuple(packed), _unused(before, after, keep))


def _changed_values(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """Numbers, flags and words of a module that differ: (attribute, old, new)."""
    for name, new in vars(after).items():
        old = vars(before).get(name)
        if name.startswith("_") or name in NOT_COMPARED or not isinstance(new, (int, float, str)):
            continue
        same = math.isclose(old, new, rel_tol=1e-9) if isinstance(old, float) and isinstance(new, float) else old == new
        if not same:
            yield name, old, new


def _is_copy(attribute: str, old: Any, new: Any, place: Mapping[int, int]) -> bool:
    """Whether a changed attribute of a block only repeats its position, the depth, or what others want of it."""
    return (attribute in POSITIONS and place.get(old) == new) or attribute in DEPTHS | FOR_LATER_BLOCKS


def _changed_shapes(before: nn.Module, after: nn.Module) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    old = {**before._parameters, **before._buffers}
    for name, tensor in {**after._parameters, **after._buffers}.items():
        was = old.get(name)
        if tensor is not None and (was is None or was.shape != tensor.shape):
            yield name, () if was is None else tuple(was.shape), tuple(tensor.shape)


def _packed_axis(old: tuple[int, ...], new: tuple[int, ...], ratio: Fraction) -> int | None:
    """The one axis that shrinks as the depth does."""
    axes = [axis for axis, sizes in enumerate(zip(old, new, strict=False)) if sizes[0] != sizes[1]]
    shrinks = len(old) == len(new) and len(axes) == 1 and old[axes[0]] * ratio == new[axes[0]]
    return axes[0] if shrinks else None


def _unused(before: Mapping[str, nn.Module], after: Mapping[str, nn.Module], keep: Sequence[int]) -> tuple[str, ...]:
    """Items at the end of lists that only later blocks use, as Zamba 2's adapters of its shared block."""
    gone = [name for name in before if name not in after]
    tops = [name for name in gone if name.rpartition(".")[0] in after]
    for name in tops:
        in_list = isinstance(after[name.rpartition(".")[0]], nn.ModuleList)
        if not in_list or list(keep) != list(range(len(keep))):
            raise _Misfit(f"{name} depends on place or depth: {type(before[name]).__name__} would be gone")
    return tuple(tops)


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
    plan = _legal_plan(_build(type(model), copy.deepcopy(model.config)), keep)
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
    tower may use the same names). Left out are routers of experts that return more than a product, and the
    projections of state-space mixers whose weights are read past any adapter.
    """
    prefix = find_stack(model).path + "."
    routers = tuple({cls for part in _parts(model) for cls in _recorded(part, "router_logits")})
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, routers)
    ]
    inside = [name for name in linear if name.startswith(prefix) and not _is_read_past(model, name)]
    outside = [name for name in linear if not name.startswith(prefix)]
    short = list(dict.fromkeys(name[len(prefix) :].partition(".")[2] for name in inside))
    clash = any(f".{name}".endswith(f".{end}") for name in outside for end in short)
    return tuple(inside if clash else short)


def _is_read_past(model: nn.Module, name: str) -> bool:
    parent, _, attribute = name.rpartition(".")
    mixer = model.get_submodule(parent)
    return attribute in ("dt_proj", "out_proj") and hasattr(mixer, "A_log") and hasattr(mixer, "D")
