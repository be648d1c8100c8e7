"""Which blocks a model can be cut to, and what else the cut changes, told without weights.

A cut is judged by one question: *is the model that transformers builds from the cut configuration the cut model?* Both
are built without weights (on the ``meta`` device, some hundredths of a second), and compared module by module: classes,
shapes, and the numbers that a module computed from its configuration or its position. What differs is either a copy of
the position or the depth, which the cut brings in step, or a tensor that packs one slice for each block, which the cut
slices, or a reason to refuse.
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
from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

from secateur.errors import IllegalDepth, UnsupportedArchitecture
from secateur.models.stacks import blocks_of, depth_of, find_stack, text_config

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
    # The rule from which Gemma 3 makes its layer_types, which no longer follow it.
    vars(config).pop("_sliding_window_pattern", None)
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
    legal_plan(skeleton(config), keep)


def legal_depths(config: PretrainedConfig) -> tuple[int, ...]:
    """The depths k for which the first k blocks are a model that saves and reloads unchanged. Needs no weights.

    Raises:
        UnsupportedArchitecture: The architecture cannot be cut at all.
    """
    return _legal_depths(skeleton(config))


def _legal_depths(full: PreTrainedModel) -> tuple[int, ...]:
    return tuple(k for k in range(1, depth_of(full) + 1) if not _plan(full, range(k)).problem)


def opens_at(config: PretrainedConfig, depth: int) -> bool:
    """Whether transformers opens the first blocks of an uncut checkpoint when its configuration is cut to them.

    It does not where the cut is illegal, or a tensor packs one slice for each block.
    """
    plan = _plan(skeleton(config), range(depth))
    return not plan.problem and not plan.packed


def packed_tensors(model: PreTrainedModel) -> tuple[str, ...]:
    """Names of the tensors outside the blocks that pack one slice for each block, as per-layer embeddings do."""
    _, plan = next(_cuts(model), (0, Plan()))
    return tuple(f"{module}.{tensor}".lstrip(".") for module, tensor, _ in plan.packed)


def late_modules(model: PreTrainedModel) -> dict[str, int]:
    """Modules of a shared block that only a later block uses, as Zamba 2's adapters → the index of that block."""
    weights = [weight for block in blocks_of(model) for weight in block.parameters()]
    if len(set(map(id, weights))) == len(weights):  # no block is shared
        return {}
    return {name: depth for depth, plan in _cuts(model) for name in plan.unused}


def _cuts(model: PreTrainedModel) -> Iterator[tuple[int, Plan]]:
    """The depths that a model can be cut to, from the shallowest, and what each cut changes."""
    full = build(type(model), copy.deepcopy(model.config))
    for depth in range(1, depth_of(full)):
        plan = _plan(full, range(depth))
        if not plan.problem:
            yield depth, plan


def legal_plan(full: PreTrainedModel, keep: Sequence[int]) -> Plan:
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
        return build(encoder or AutoModel.from_config, config)
    except Exception as error:  # of whatever kind: a configuration that is not whole, or a package that it needs
        problem = f"transformers {transformers_version} cannot build it ({_last_line(error)})"
        raise UnsupportedArchitecture(name, problem) from error


def build(make: Callable[[PretrainedConfig], PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Make a model without weights; ``config`` becomes its own."""
    for part in (config, text_config(config)):
        # save_pretrained leaves the type's name in its place, of which some models (Apertus) cannot make tensors.
        if isinstance(part.dtype, str):
            part.dtype = getattr(torch, part.dtype)
    with no_init_weights(), torch.device("meta"):
        return make(config)


def _last_line(error: Exception) -> str:
    """What an error of transformers says, without the lines around it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


@dataclass(frozen=True)
class Plan:
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


def _plan(full: PreTrainedModel, keep: Sequence[int]) -> Plan:
    """Compare the model, cut, with the one that transformers builds from the cut configuration."""
    config = copy.deepcopy(full.config)
    path = find_stack(full).path
    try:
        with _quiet():
            cut_config(config, keep)
            _check_survives(config)
            target = build(type(full), config)
    except _Misfit as misfit:
        return Plan(str(misfit))
    except Exception as error:  # of whatever kind: transformers does not take the cut configuration
        return Plan(f"transformers refuses the cut configuration ({_last_line(error)})")
    try:
        return _compare(_cut_modules(full, path, keep), dict(target.named_modules()), path, keep)
    except _Misfit as misfit:
        return Plan(str(misfit))


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
        for attribute, old, new in _changed_values(before[name], module):
            if not (_is_copy(attribute, old, new, place) if inside else isinstance(new, int)):
                raise _Misfit(f"{name}.{attribute} depends on place or depth: {old} would become {new}")
            values.append((name, attribute, new))
        for tensor, old_shape, new_shape in _changed_shapes(before[name], module):
            axis = None if inside else _packed_axis(old_shape, new_shape, ratio)
            if axis is None:
                raise _Misfit(f"{name}.{tensor} depends on place or depth: {old_shape} would become {new_shape}")
            packed.append((name, tensor, axis))
    return Plan("", tuple(values), tuple(packed), _unused(before, after, keep))


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
