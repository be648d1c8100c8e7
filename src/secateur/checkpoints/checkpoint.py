"""Reads only the tensors of the kept blocks, from disk or from the Hub: pruning by depth as a streaming job.

The model is never built with weights. transformers says, of a model without weights (on the ``meta`` device), which
of its tensors each tensor of the checkpoint becomes; the bytes of those that stay are copied into new shards under
their new names, and of the others nothing is read. What is to be written is first shown to transformers as a model to
load, without a byte of weights: a checkpoint in a layout that it would convert wrongly, or that does not match its
configuration, is refused before the first byte is written.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from secateur.checkpoints.cut_plan import (
    CONFIG,
    check_loads,
    choose_tensors,
    last_line,
    left_out,
    plan_cut,
    quiet_transformers,
)
from secateur.checkpoints.lora import CONFIG as ADAPTER_CONFIG
from secateur.checkpoints.lora import Adapter, read_adapter
from secateur.checkpoints.shard_writer import share_out, write_shards
from secateur.checkpoints.shards import Source, read_json, shard_names
from secateur.checkpoints.sources import Folder, Hub, open_source
from secateur.errors import ConfigError, ModelError, OutputError, UnsupportedArchitecture
from secateur.files import output_error
from secateur.models.blocks import text_config

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
        mirror: An empty folder to leave what is read of a model on the Hub in (:class:`.Hub`).
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
        cut = plan_cut(opened, config, keep)
        outputs, dropped = choose_tensors(opened, names, cut, change)
        missing = check_loads(opened, outputs, cut)
        shards = share_out(outputs, max_shard_bytes)
        _check_space(out, sum(item.size for item in outputs) * (2 if mirror and isinstance(opened, Hub) else 1))
        write_shards(out, shards, opened, change, cut, progress)
        if isinstance(opened, Hub):
            opened.complete_mirror(set(names.values()))
        cut.target.config.save_pretrained(out)
        _copy_companions(_tokenizer_source(opened, change if adapter is None else None), out)
    return Pruned(
        kept=tuple(item.name for items in shards.values() for item in items),
        dropped=dropped,
        missing=missing,
        bytes_kept=sum(item.size for item in outputs),
        bytes_read=opened.bytes_read + (change.source.bytes_read if change else 0),
        shards=tuple(shards),
        keep=cut.keep,
        depth=cut.depth,
        left_out=left_out(dropped, cut),
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
        raise source.absent(CONFIG)
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
        with quiet_transformers():
            return CONFIG_MAPPING[kind].from_pretrained(file)
    except Exception as error:  # each configuration class checks itself, and raises what it likes
        raise ModelError(where, f"transformers refuses it ({last_line(error)})") from error


def _has(content: Mapping[str, Any], field: str) -> bool:
    parts = (content, *(value for value in content.values() if isinstance(value, dict)))
    return any(part.get(field) for part in parts)


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        problem = f"the disk is too full: the result needs {needed:,} bytes, and {free:,} are free"
        raise OutputError(out, problem, concerns_all=True)


def _tokenizer_source(base: Source, change: Adapter | None) -> Source:
    """Whose tokenizer is meant: an adapter that is opened as a model has often its own."""
    own = change is not None and any(change.source.exists(name) for name in ("tokenizer.json", "tokenizer_config.json"))
    return change.source if change is not None and own else base


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
