"""Which tensors of a checkpoint stay when a model is cut, and under which names they are written.

transformers says it, of models without weights (on the ``meta`` device): which of its tensors each tensor of the
checkpoint becomes, and whether it can load what is to be written.
"""

from __future__ import annotations

import contextlib
import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from secateur.checkpoints.lora import FLOATS, Adapter, Factors, check_fits
from secateur.checkpoints.shards import DTYPES, INDEX, Source, Tensor, read_header
from secateur.errors import ModelError, SecateurError, UnsupportedArchitecture
from secateur.models.blocks import (
    check_keep,
    cut_config,
    encoder_class,
    find_stack,
    skeleton,
    tensor_of_block,
    text_config,
)

CONFIG = "config.json"

OPTIONAL = re.compile(r"pooler\.")
"""A head that reads the last block's states and changes none of them; checkpoints of other heads come without it."""


def last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """What transformers would log or draw while it loads nothing is not for the user."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@dataclass(frozen=True)
class Loader:
    """What transformers makes of the names in a checkpoint when it loads this model (without weights here)."""

    model: PreTrainedModel

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: tensor.shape for name, tensor in self.model.state_dict().items()}

    @cached_property
    def _rules(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]

    def load(self, name: str) -> tuple[str, bool]:
        """The tensor of the model that a checkpoint's tensor goes to, and whether it is converted on the way.

        The first name is not in ``shapes`` where the model has no use for the tensor.
        """
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(name, *self._rules, prefix, self.shapes)
        if target not in self.shapes and name in self.shapes:
            target, pattern = rename_source_key(name, [], [], prefix, self.shapes)
        return target, pattern is not None


@dataclass(frozen=True)
class Cut:
    """The whole model and the cut one, both without weights.

    Attributes:
        full: What transformers makes of the source.
        part: What it makes of the result.
        tower: Path, in the whole model, of the part that is kept, with a dot at the end; empty for all of it.
        path: Path of the blocks in the whole model.
        keep: Indices of the kept blocks.
        depth: Number of blocks of the whole model.
    """

    full: Loader
    part: Loader
    tower: str
    path: str
    keep: tuple[int, ...]
    depth: int

    @property
    def target(self) -> PreTrainedModel:
        return self.part.model

    def block(self, name: str) -> int | None:
        """The block of the whole model that one of its tensors is in."""
        place = tensor_of_block(name, self.path) if name.startswith(f"{self.path}.") else None
        return place[0] if place else None

    def place(self, name: str) -> str | None:
        """The name that a tensor of the whole model has in the cut one; None where it has none."""
        index = self.block(name)
        if index is not None:
            if index not in self.keep:
                return None
            name = f"{self.path}.{self.keep.index(index)}.{name[len(f'{self.path}.{index}.') :]}"
        name = name.removeprefix(self.tower) if name.startswith(self.tower) else ""
        return name if name in self.part.shapes else None


def plan_cut(source: Source, config: PretrainedConfig, keep: Sequence[int]) -> Cut:
    """Build the whole and the cut model without weights."""
    # Errors of the blocks name the model by this.
    config.name_or_path = source.name
    try:
        with quiet_transformers():
            check_keep(config, keep)
            full = skeleton(config)
            path = find_stack(full).path
            tower = _text_tower(full)
            small = copy.deepcopy(text_config(config) if tower else config)
            small.dtype = small.dtype or config.dtype
            depth = text_config(small).num_hidden_layers
            cut_config(small, keep)
            target = skeleton(small)
    except SecateurError:
        raise
    except Exception as error:  # whatever it is, it says that the configuration describes no model
        problem = f"transformers can build no model from it ({last_line(error)})"
        raise ModelError(source.where(CONFIG), problem) from error
    target.config.is_encoder_decoder = small.is_encoder_decoder
    _settle(target)
    return Cut(Loader(full), Loader(target), tower, path, tuple(keep), depth)


def _text_tower(full: PreTrainedModel) -> str:
    """Path of the part that encodes text, with a dot: of a multimodal model its tower, else empty for the whole."""
    config = text_config(full)
    if encoder_class(full.config) or config is full.config:
        return ""
    for path, module in full.named_modules():
        if path and isinstance(module, PreTrainedModel) and module.config is config:
            if type(skeleton(config)) is type(module):
                return f"{path}."
            break
    problem = f"the text tower of {type(full).__name__} is no model of its own"
    raise UnsupportedArchitecture(full.name_or_path, problem, "open it whole and cut it")


def _settle(target: PreTrainedModel) -> None:
    """What the written configuration says besides its blocks: an encoder, of a class of transformers' own."""
    config = target.config
    config.architectures = [type(target).__name__]
    config.name_or_path = ""
    vars(config).pop("auto_map", None)
    for part in (config, text_config(config)):
        # An encoder needs no cache, and hybrids cut below their first attention block fail with one.
        if getattr(part, "use_cache", False):
            part.use_cache = False


@dataclass(frozen=True)
class Output:
    """One tensor to write.

    Attributes:
        name: Under which it is written.
        origin: Its name in the source.
        tensor: Where its bytes are.
        shape: As written.
        axis: The axis along which one slice for each block is packed; None for a tensor that is kept whole.
        factors: The change to merge into it.
        transposed: Whether it is stored (in, out), for the merge.
    """

    name: str
    origin: str
    tensor: Tensor
    shape: tuple[int, ...]
    axis: int | None = None
    factors: Factors | None = None
    transposed: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape) * DTYPES[self.tensor.dtype] // 8


def choose_tensors(
    source: Source, names: Mapping[str, str], cut: Cut, adapter: Adapter | None
) -> tuple[list[Output], tuple[str, ...]]:
    """Which tensors stay, under which names, and which do not."""
    targets = {name: cut.full.load(name) for name in names}
    _check_depth(source, [target for target, _ in targets.values()], cut)
    changes = _changes(source, adapter, names, cut) if adapter else {}
    headers: dict[str, dict[str, Tensor]] = {}
    outputs, dropped = [], []
    for name, (target, converted) in targets.items():
        place = cut.place(target) if target in cut.full.shapes else None
        suspicious = target not in cut.full.shapes and is_within(target, cut.full.model)
        if place is None and not suspicious:
            dropped.append(name)
            continue
        file = names[name]
        if file not in headers:
            headers[file] = _read_shard_header(source, file, names)
        if name not in headers[file]:
            raise ModelError(source.where(file), f"does not hold {name}, which {INDEX} says it does")
        if place is None:
            if headers[file][name].shape:  # a single number is a constant that older versions saved
                problem = f"has weights that its {CONFIG} has no place for: {name}"
                raise ModelError(source.name, problem, "one of the two is of another model")
            dropped.append(name)
            continue
        new_name = _new_name(source, name, place, converted, cut.block(target), cut)
        output = Output(new_name, name, headers[file][name], headers[file][name].shape)
        outputs.append(output if converted else _fit(source, output, target, place, cut, adapter, changes.get(target)))
    _check_unique(source, outputs)
    return outputs, tuple(dropped)


def left_out(dropped: Sequence[str], cut: Cut) -> tuple[str, ...]:
    """The modules that tensors outside the blocks belong to, where nothing of the module was kept."""
    kept = {name.partition(".")[0] for name in cut.part.shapes}
    prefixes = {"model", "transformer", cut.full.model.base_model_prefix, *cut.tower.rstrip(".").split(".")}
    modules: dict[str, None] = {}
    for name in dropped:
        target, _ = cut.full.load(name)
        parts = target.split(".")
        while len(parts) > 1 and parts[0] in prefixes:
            parts.pop(0)
        if cut.block(target) is None and parts[0] not in kept:
            modules[parts[0]] = None
    return tuple(modules)


def _read_shard_header(source: Source, file: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors of one shard; none may be another shard's by the index, for who would know which one is meant."""
    header = read_header(source, file)
    for name in header:
        if names.get(name, file) != file:
            raise ModelError(source.where(file), f"holds {name}, which by {INDEX} is in {names[name]}")
    return header


def _check_depth(source: Source, targets: Sequence[str], cut: Cut) -> None:
    """The checkpoint must have the blocks that its configuration counts, and no others."""
    found = {index for target in targets if target in cut.full.shapes and (index := cut.block(target)) is not None}
    absent = sorted(set(range(cut.depth)) - found)
    if absent:
        problem = f"says {cut.depth} blocks, but the weights have none of block {absent[0]}"
        raise ModelError(source.where(CONFIG), problem, "one of the two is of another model")
    prefix = cut.full.model.base_model_prefix
    for target in targets:
        rest = target.removeprefix(f"{prefix}.")
        place = tensor_of_block(rest, cut.path) if rest.startswith(f"{cut.path}.") else None
        if place and place[0] >= cut.depth and not _is_ignored(rest, cut.full.model):
            problem = f"says {cut.depth} blocks, but the weights have a block {place[0]}"
            raise ModelError(source.where(CONFIG), problem, "one of the two is of another model")


def _is_ignored(name: str, model: PreTrainedModel) -> bool:
    """Whether transformers leaves a tensor out knowingly, such as blocks that predict further tokens."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    return any(re.search(pattern, f"{model.base_model_prefix}.{name}") for pattern in patterns)


def is_within(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor that the model has no use for lies inside one of its modules, and so is a part it should have.

    Not so are those of heads, decoders and other towers, those that transformers leaves out knowingly, and buffers that
    the model computes itself, which older versions saved (``rotary_emb.inv_freq`` of each block).
    """
    name = name.removeprefix(f"{model.base_model_prefix}.")
    parts = {child for child, _ in model.named_children()}
    buffers = {tuple(buffer.split(".")[-2:]) for buffer, _ in model.named_buffers()}
    is_buffer = tuple(name.split(".")[-2:]) in buffers
    return name.partition(".")[0] in parts and not is_buffer and not _is_ignored(name, model)


def _new_name(source: Source, name: str, place: str, converted: bool, index: int | None, cut: Cut) -> str:
    """The name to write a tensor under: the source's own, renumbered and without what stood before the base model.

    Of all such names, the shortest that transformers loads to the right place; else the plain name of that place.
    """
    for variant in _renumbered(name.split("."), index, cut.keep):
        for start in reversed(range(len(variant))):
            candidate = ".".join(variant[start:])
            if cut.part.load(candidate) == (place, converted):
                return candidate
    if not converted and cut.part.load(place) == (place, False):
        return place
    raise UnsupportedArchitecture(
        source.name, f"no name is known under which transformers would load {name} as {place}"
    )


def _renumbered(parts: list[str], index: int | None, keep: Sequence[int]) -> Iterator[list[str]]:
    """A name with each of its numbers that may be the block's replaced by the block's new one."""
    if index is None:
        yield parts
        return
    for position, part in enumerate(parts):
        if part == str(index):
            yield [*parts[:position], str(keep.index(index)), *parts[position + 1 :]]


def _fit(
    source: Source,
    output: Output,
    target: str,
    place: str,
    cut: Cut,
    adapter: Adapter | None,
    factors: Factors | None,
) -> Output:
    """Check a tensor that is loaded as it is against the model; find what is packed in it, and what changes it."""
    tensor = output.tensor
    whole, shape = tuple(cut.full.shapes[target]), tuple(cut.part.shapes[place])
    if tensor.shape != whole:
        problem = f"{output.origin} has the shape {tensor.shape}, but by {CONFIG} it is {whole}"
        raise ModelError(source.where(tensor.file), problem)
    axis = next((i for i, (a, b) in enumerate(zip(whole, shape, strict=True)) if a != b), None)
    if factors is None or adapter is None:
        return Output(output.name, output.origin, tensor, shape, axis)
    module = cut.full.model.get_submodule(target.rpartition(".")[0])
    transposed = isinstance(module, Conv1D)
    if not isinstance(module, (torch.nn.Linear, Conv1D)) or axis is not None:
        raise UnsupportedArchitecture(adapter.source.name, f"changes {target}, which is not a linear layer of its own")
    check_fits(adapter.source.name, target, tensor, factors, transposed=transposed)
    return Output(output.name, output.origin, tensor, shape, None, factors, transposed)


def _changes(source: Source, adapter: Adapter, names: Mapping[str, str], cut: Cut) -> dict[str, Factors]:
    """The adapter's changes by the tensor of the whole model that each one changes."""
    changes: dict[str, Factors] = {}
    for path, factors in adapter.factors.items():
        weight = f"{path}.weight"
        target, converted = cut.full.load(weight)
        if target in cut.full.shapes and not converted and target not in changes:
            changes[target] = factors
        elif target in cut.full.shapes:
            problem = f"changes {path}, which transformers puts together from several tensors"
            raise UnsupportedArchitecture(adapter.source.name, problem, "merge it with peft (merge_and_unload) first")
        elif weight not in names and path.rpartition(".")[2] != "lm_head":  # a tied head is in no file
            raise ModelError(adapter.source.name, f"changes {path}, which {source.name} has not", "is this its base?")
    return changes


def _check_unique(source: Source, outputs: Sequence[Output]) -> None:
    seen: dict[str, str] = {}
    for item in outputs:
        if item.name in seen:
            raise ModelError(source.name, f"{seen[item.name]} and {item.origin} are the same tensor of the model")
        seen[item.name] = item.origin


def check_loads(source: Source, outputs: Sequence[Output], cut: Cut) -> tuple[str, ...]:
    """Let transformers load the result by its own rules, without weights, before a byte is written.

    Returns:
        The tensors that it would fill anew, all of an optional part.
    """
    state = {
        item.name: torch.empty(item.shape, dtype=FLOATS.get(item.tensor.dtype, torch.float32), device="meta")
        for item in outputs
    }
    try:
        with quiet_transformers():
            _, report = type(cut.target).from_pretrained(
                None,
                config=copy.deepcopy(cut.target.config),
                state_dict=state,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # conversions fail in their own ways on tensors that they do not expect
        raise UnsupportedArchitecture(source.name, f"transformers cannot load the cut ({last_line(error)})") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        problem = f"{name} has the shape {tuple(found)}, but by {CONFIG} it is {tuple(expected)}"
        raise ModelError(source.name, problem)
    for key, problem in (("missing_keys", "has no tensor for"), ("unexpected_keys", "transformers has no use for")):
        names = sorted(name for name in report[key] if not OPTIONAL.match(name))
        if names:
            raise ModelError(source.name, f"{problem} {names[0]} ({len(names)} such)", "is it of this configuration?")
    return tuple(sorted(report["missing_keys"]))
