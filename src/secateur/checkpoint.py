"""Reads only the tensors of the kept blocks, from disk or from the Hub: pruning by depth as a streaming job.

The model is never built with weights. transformers says, of a model without weights (on the ``meta`` device), which
of its tensors each tensor of the checkpoint becomes; the bytes of those that stay are copied into new shards under
their new names, and of the others nothing is read. What is to be written is first shown to transformers as a model to
load, without a byte of weights: a checkpoint in a layout that it would convert wrongly, or that does not match its
configuration, is refused before the first byte is written.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers import logging as transformers_logging
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from secateur.artifacts import output_error
from secateur.blocks import check_keep, cut_config, encoder_class, find_stack, skeleton, tensor_of_block, text_config
from secateur.errors import ConfigError, ModelError, OutputError, SecateurError, UnsupportedArchitecture
from secateur.lora import CONFIG as ADAPTER_CONFIG
from secateur.lora import FLOATS, Adapter, Factors, check_fits, merged, read_adapter
from secateur.shards import (
    BUFFER,
    DTYPES,
    INDEX,
    SINGLE,
    Folder,
    Hub,
    Moved,
    Source,
    Tensor,
    absent,
    open_source,
    read_header,
    read_json,
    shard_names,
    write_all,
)

CONFIG = "config.json"
# Files beside the weights that belong to the text encoder. On the Hub, where there is no listing to match, by name.
COMPANIONS = (
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt", "merges*.txt",
    "*.model", "chat_template*.json", "chat_template*.jinja", "generation_config.json",
)  # fmt: skip
HUB_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
MAX_COMPANION_BYTES = 100_000_000
DEPTH_FIELDS = frozenset({"num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_decoder_layers"})
# A head that reads the last block's states and changes none of them; checkpoints of other heads come without it.
OPTIONAL = re.compile(r"pooler\.")


@dataclass(frozen=True)
class Pruned:
    """What :func:`prune_checkpoint` did.

    Attributes:
        kept: Names of the written tensors.
        dropped: Names, in the source, of the tensors that were left out: other blocks, heads, a vision tower.
        missing: Names that the source never had and transformers fills anew; only ever of a pooler.
        bytes_kept: Bytes of the written tensors.
        bytes_read: Bytes read from the source's weights, headers included.
        shards: Names of the written files, in order.
        keep: Indices of the kept blocks, of ``depth`` in all.
        depth: Blocks of the source.
        left_out: What of ``dropped`` belongs to no block, by module: heads, a decoder, a vision tower.
        base: Where the weights came from: ``source``, or the base that an adapter named.
        adapter: The adapter that was merged.
    """

    kept: tuple[str, ...]
    dropped: tuple[str, ...]
    missing: tuple[str, ...]
    bytes_kept: int
    bytes_read: int
    shards: tuple[str, ...]
    keep: tuple[int, ...]
    depth: int
    left_out: tuple[str, ...]
    base: str
    adapter: str | None


def prune_checkpoint(
    source: str | Path,
    keep: Sequence[int] | Callable[[int], Sequence[int]],
    out: Path,
    *,
    adapter: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    mirror: Path | None = None,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> Pruned:
    """Write the checkpoint of a model cut to some of its blocks, reading only what stays.

    The written folder is the base model (no language-model head; of a multimodal model, the text tower), for
    ``AutoModel.from_pretrained`` (``AutoModelForTextEncoding`` for the encoder of an encoder-decoder).

    Args:
        source: A folder with ``config.json`` and safetensors, or a model on the Hub; or a LoRA adapter that names one.
        keep: Indices of the blocks that stay, ascending; or a function that gives them for the source's depth.
        out: An empty folder to write to. It is empty again after an error.
        adapter: A LoRA adapter as peft saves it, to merge on the way; a folder, or on the Hub.
        revision: Branch, tag or commit of ``source`` on the Hub.
        token: For the Hub; by default what ``hf auth login`` or ``HF_TOKEN`` left.
        endpoint: Address of the Hub; by default ``HF_ENDPOINT``.
        mirror: An empty folder to leave what is read of a model on the Hub in (:class:`secateur.shards.Hub`).
        max_shard_bytes: The most bytes of tensors in one written file (a larger tensor has a file to itself).
        progress: Called as ``progress(bytes done, bytes in all)``.

    Raises:
        ModelError: The source is missing, broken, or disagrees with its own configuration.
        UnsupportedArchitecture: It is of a kind that cannot be cut, or not without building it.
        IllegalDepth: The model cannot be cut to these blocks.
        OutputError: ``out`` is not empty, or cannot be written.
    """
    out = Path(out)
    if max_shard_bytes < 1:
        raise ConfigError("max_shard_bytes", max_shard_bytes, f"{max_shard_bytes} is not a size", "at least 1")
    with _all_or_nothing(out):
        opened, change = _open(source, adapter, revision, token, endpoint, mirror)
        config_file = _config_file(opened)
        names = shard_names(opened)
        config = _read_config(opened, config_file, len(names))
        if callable(keep):
            keep = keep(text_config(config).num_hidden_layers)
        cut = _plan_cut(opened, config, keep)
        outputs, dropped = _choose(opened, names, cut, change)
        missing = _check_loads(opened, outputs, cut)
        shards = _share_out(outputs, max_shard_bytes)
        _check_space(out, sum(item.size for item in outputs) * (2 if mirror and isinstance(opened, Hub) else 1))
        _write_shards(out, shards, opened, change, cut, progress)
        if isinstance(opened, Hub):
            opened.complete_mirror(set(names.values()))
        cut.target.config.save_pretrained(out)
        _copy_companions(opened, out)
    return Pruned(
        kept=tuple(item.name for items in shards.values() for item in items),
        dropped=dropped,
        missing=missing,
        bytes_kept=sum(item.size for item in outputs),
        bytes_read=opened.bytes_read + (change.source.bytes_read if change else 0),
        shards=tuple(shards),
        keep=cut.keep,
        depth=cut.depth,
        left_out=_left_out(dropped, cut),
        base=opened.name,
        adapter=change.source.name if change else None,
    )


@contextlib.contextmanager
def _all_or_nothing(out: Path) -> Iterator[None]:
    """An empty folder is filled, or stays empty."""
    if not out.is_dir() or any(out.iterdir()):
        raise OutputError(out, "is not an empty folder", "name a new one")
    try:
        yield
    except BaseException as error:
        for item in out.iterdir():
            with contextlib.suppress(OSError):
                shutil.rmtree(item) if item.is_dir() and not item.is_symlink() else item.unlink()
        if isinstance(error, OSError):
            raise output_error(out, error) from error
        raise


def _open(
    source: str | Path,
    adapter: str | Path | None,
    revision: str | None,
    token: str | None,
    endpoint: str | None,
    mirror: Path | None,
) -> tuple[Source, Adapter | None]:
    """The base, and the adapter to merge into it. A source that is itself an adapter names its base."""
    opened = open_source(source, revision=revision, token=token, endpoint=endpoint, mirror=mirror)
    if adapter is not None:
        return opened, read_adapter(open_source(adapter, token=token, endpoint=endpoint))
    if opened.find(CONFIG) is not None or opened.find(ADAPTER_CONFIG) is None:
        return opened, None
    change = read_adapter(opened)
    if not isinstance(change.base, str) or not change.base:
        raise ModelError(opened.where(ADAPTER_CONFIG), "names no base model", "give the base, and this as its adapter")
    revision = change.base_revision
    return open_source(change.base, revision=revision, token=token, endpoint=endpoint, mirror=mirror), change


def _config_file(source: Source) -> Path:
    file = source.find(CONFIG)
    if file is None:
        raise absent(source, CONFIG)
    return file


def _read_config(source: Source, file: Path, tensors: int) -> PretrainedConfig:
    """The configuration of the whole model. No code of the model's own is run."""
    where = source.where(CONFIG)
    content = read_json(file)
    if not isinstance(content, dict):
        raise ModelError(where, "is not a JSON object")
    if _has(content, "quantization_config"):
        hint = "prune the weights it was quantized from, and quantize the result"
        raise UnsupportedArchitecture(source.name, "its weights are quantized", hint)
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for field in DEPTH_FIELDS & part.keys():
            # Before anything is built: a model without weights takes time and memory for each block too.
            if not isinstance(part[field], int) or not 0 <= part[field] <= tensors:
                raise ModelError(where, f"{field} is {part[field]!r}, but its weights are {tensors} tensors")
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        problem = f"transformers does not know the model_type {kind!r}"
        raise UnsupportedArchitecture(source.name, problem, "a model's own code is not run here")
    try:
        with _quiet():
            return CONFIG_MAPPING[kind].from_pretrained(file)
    except Exception as error:  # each configuration class checks itself, and raises what it likes
        raise ModelError(where, f"transformers refuses it ({_last_line(error)})") from error


def _has(content: Mapping[str, Any], field: str) -> bool:
    parts = (content, *(value for value in content.values() if isinstance(value, dict)))
    return any(part.get(field) for part in parts)


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip() if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
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
class _Loader:
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
class _Cut:
    """The whole model and the cut one, both without weights.

    Attributes:
        full: What transformers makes of the source.
        part: What it makes of the result.
        tower: Path, in the whole model, of the part that is kept, with a dot at the end; empty for all of it.
        path: Path of the blocks in the whole model.
        keep: Indices of the kept blocks.
        depth: Number of blocks of the whole model.
    """

    full: _Loader
    part: _Loader
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


def _plan_cut(source: Source, config: PretrainedConfig, keep: Sequence[int]) -> _Cut:
    """Build the whole and the cut model without weights."""
    # Errors of the blocks name the model by this.
    config.name_or_path = source.name
    try:
        with _quiet():
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
        problem = f"transformers can build no model from it ({_last_line(error)})"
        raise ModelError(source.where(CONFIG), problem) from error
    target.config.is_encoder_decoder = small.is_encoder_decoder
    _settle(target)
    return _Cut(_Loader(full), _Loader(target), tower, path, tuple(keep), depth)


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
class _Output:
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


def _choose(
    source: Source, names: Mapping[str, str], cut: _Cut, adapter: Adapter | None
) -> tuple[list[_Output], tuple[str, ...]]:
    """Which tensors stay, under which names, and which do not."""
    targets = {name: cut.full.load(name) for name in names}
    _check_depth(source, [target for target, _ in targets.values()], cut)
    changes = _changes(source, adapter, names, cut) if adapter else {}
    headers: dict[str, dict[str, Tensor]] = {}
    outputs, dropped = [], []
    for name, (target, converted) in targets.items():
        place = cut.place(target) if target in cut.full.shapes else None
        if place is None:
            dropped.append(name)
            continue
        file = names[name]
        if file not in headers:
            headers[file] = _read_shard_header(source, file, names)
        if name not in headers[file]:
            raise ModelError(source.where(file), f"does not hold {name}, which {INDEX} says it does")
        new_name = _new_name(source, name, place, converted, cut.block(target), cut)
        output = _Output(new_name, name, headers[file][name], headers[file][name].shape)
        outputs.append(output if converted else _fit(source, output, target, place, cut, adapter, changes.get(target)))
    _check_unique(source, outputs)
    return outputs, tuple(dropped)


def _left_out(dropped: Sequence[str], cut: _Cut) -> tuple[str, ...]:
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


def _check_depth(source: Source, targets: Sequence[str], cut: _Cut) -> None:
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


def _new_name(source: Source, name: str, place: str, converted: bool, index: int | None, cut: _Cut) -> str:
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
    output: _Output,
    target: str,
    place: str,
    cut: _Cut,
    adapter: Adapter | None,
    factors: Factors | None,
) -> _Output:
    """Check a tensor that is loaded as it is against the model; find what is packed in it, and what changes it."""
    tensor = output.tensor
    whole, shape = tuple(cut.full.shapes[target]), tuple(cut.part.shapes[place])
    if tensor.shape != whole:
        problem = f"{output.origin} has the shape {tensor.shape}, but by {CONFIG} it is {whole}"
        raise ModelError(source.where(tensor.file), problem)
    axis = next((i for i, (a, b) in enumerate(zip(whole, shape, strict=True)) if a != b), None)
    if factors is None or adapter is None:
        return _Output(output.name, output.origin, tensor, shape, axis)
    module = cut.full.model.get_submodule(target.rpartition(".")[0])
    transposed = isinstance(module, Conv1D)
    if not isinstance(module, (torch.nn.Linear, Conv1D)) or axis is not None:
        raise UnsupportedArchitecture(adapter.source.name, f"changes {target}, which is not a linear layer of its own")
    check_fits(adapter.source.name, target, tensor, factors, transposed=transposed)
    return _Output(output.name, output.origin, tensor, shape, None, factors, transposed)


def _changes(source: Source, adapter: Adapter, names: Mapping[str, str], cut: _Cut) -> dict[str, Factors]:
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


def _check_unique(source: Source, outputs: Sequence[_Output]) -> None:
    seen: dict[str, str] = {}
    for item in outputs:
        if item.name in seen:
            raise ModelError(source.name, f"{seen[item.name]} and {item.origin} are the same tensor of the model")
        seen[item.name] = item.origin


def _check_loads(source: Source, outputs: Sequence[_Output], cut: _Cut) -> tuple[str, ...]:
    """Let transformers load the result by its own rules, without weights, before a byte is written.

    Returns:
        The tensors that it would fill anew, all of an optional part.
    """
    state = {
        item.name: torch.empty(item.shape, dtype=FLOATS.get(item.tensor.dtype, torch.float32), device="meta")
        for item in outputs
    }
    try:
        with _quiet():
            _, report = type(cut.target).from_pretrained(
                None,
                config=copy.deepcopy(cut.target.config),
                state_dict=state,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # conversions fail in their own ways on tensors that they do not expect
        raise UnsupportedArchitecture(source.name, f"transformers cannot load the cut ({_last_line(error)})") from error
    for name, found, expected in sorted(report["mismatched_keys"]):
        problem = f"{name} has the shape {tuple(found)}, but by {CONFIG} it is {tuple(expected)}"
        raise ModelError(source.name, problem)
    for key, problem in (("missing_keys", "has no tensor for"), ("unexpected_keys", "transformers has no use for")):
        names = sorted(name for name in report[key] if not OPTIONAL.match(name))
        if names:
            raise ModelError(source.name, f"{problem} {names[0]} ({len(names)} such)", "is it of this configuration?")
    return tuple(sorted(report["missing_keys"]))


def _share_out(outputs: Sequence[_Output], max_shard_bytes: int) -> dict[str, list[_Output]]:
    """Which tensors go to which file, in the order of the source, so that neighbours are read at once."""
    groups: list[list[_Output]] = [[]]
    size = 0
    for item in sorted(outputs, key=lambda item: (item.tensor.file, item.tensor.start)):
        if groups[-1] and size + item.size > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += item.size
    for group in groups:
        # Larger numbers first, so that each tensor begins at a multiple of its own.
        group.sort(key=lambda item: -DTYPES[item.tensor.dtype])
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(out, f"the result needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free")


def _write_shards(
    out: Path,
    shards: Mapping[str, Sequence[_Output]],
    source: Source,
    adapter: Adapter | None,
    cut: _Cut,
    progress: Callable[[int, int], None] | None,
) -> None:
    total = sum(item.size for items in shards.values() for item in items)
    done = 0

    def moved(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    for file, items in shards.items():
        _write_shard(out / file, items, source, adapter, cut, moved)
        _check_written(out, file, items)
    if len(shards) > 1:
        weight_map = {item.name: file for file, items in shards.items() for item in items}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, items: Sequence[_Output], source: Source, adapter: Adapter | None, cut: _Cut, moved: Moved
) -> None:
    sink = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        write_all(sink, _header(items))
        for start, end, file, item in _runs(items):
            if item is None:
                source.copy(file, start, end, sink, moved)
            elif item.factors is not None and adapter is not None:
                for piece in merged(source, item.tensor, adapter, item.factors, transposed=item.transposed):
                    write_all(sink, piece)
                    moved(len(piece))
            else:
                _copy_slices(source, item, cut, sink, moved)
        os.fsync(sink)
    finally:
        os.close(sink)


def _header(items: Sequence[_Output]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in items:
        offsets = [position, position + item.size]
        header[item.name] = {"dtype": item.tensor.dtype, "shape": list(item.shape), "data_offsets": offsets}
        position = offsets[1]
    content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    content += b" " * (-len(content) % 8)
    return len(content).to_bytes(8, "little") + content


def _runs(items: Sequence[_Output]) -> Iterator[tuple[int, int, str, _Output | None]]:
    """Ranges to copy as they are, neighbours joined; with the tensor where it is not to be copied as it is."""
    run: tuple[int, int, str] | None = None
    for item in items:
        tensor = item.tensor
        plain = item.axis is None and item.factors is None
        if run and plain and run[1:] == (tensor.start, tensor.file):
            run = (run[0], tensor.end, tensor.file)
            continue
        if run:
            yield (*run, None)
        run = (tensor.start, tensor.end, tensor.file) if plain else None
        if not plain:
            yield tensor.start, tensor.end, tensor.file, item
    if run:
        yield (*run, None)


def _copy_slices(source: Source, item: _Output, cut: _Cut, sink: int, moved: Moved) -> None:
    """Copy the slices of the kept blocks out of a tensor that packs one for each along an axis."""
    tensor = item.tensor
    rows = math.prod(tensor.shape[: item.axis])
    row_bytes = (tensor.end - tensor.start) // rows
    width = row_bytes // cut.depth
    if rows == 1:
        for index in cut.keep:
            start = tensor.start + index * width
            source.copy(tensor.file, start, start + width, sink, moved)
        return
    step = max(1, BUFFER // row_bytes)
    for row in range(0, rows, step):
        start, end = (tensor.start + i * row_bytes for i in (row, min(row + step, rows)))
        content = np.frombuffer(source.read(tensor.file, start, end), np.uint8).reshape(-1, cut.depth, width)
        piece = content[:, list(cut.keep)].tobytes()
        write_all(sink, piece)
        moved(len(piece))


def _check_written(out: Path, file: str, items: Sequence[_Output]) -> None:
    """Read the new file's header back by the rules for any file."""
    written = read_header(Folder(str(out), out), file)
    if {name: (tensor.dtype, tensor.shape) for name, tensor in written.items()} != {
        item.name: (item.tensor.dtype, item.shape) for item in items
    }:
        raise ModelError(out / file, "was not written as planned")


def _copy_companions(source: Source, out: Path) -> None:
    """Copy the tokenizer's files and their like; never code, never pickles."""
    if isinstance(source, Hub):
        names: Sequence[str] = HUB_COMPANIONS
    else:
        assert isinstance(source, Folder)
        present = sorted(item.name for item in source.root.iterdir())
        names = [name for name in present if any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)]
    for name in names:
        file = source.find(name)
        if file is not None and file.stat().st_size <= MAX_COMPANION_BYTES:
            shutil.copyfile(file, out / name)
    _free_tokenizer(out / "tokenizer_config.json")


def _free_tokenizer(file: Path) -> None:
    """A multimodal model's tokenizer names the processor that it belongs to, whose images are not for a text tower."""
    content = read_json(file) if file.is_file() else None
    if isinstance(content, dict) and "processor_class" in content:
        del content["processor_class"]
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
