"""Fetches from the Hub only what a cut model needs: the small files, and of the weights the bytes of the kept layers.

A safetensors file is the length of its header (8 bytes), the header (JSON), and the tensors' bytes end to end
(https://huggingface.co/docs/safetensors). What is wanted of a shard is fetched in ranges into a sparse file of the
shard's full size. Tensors that are not wanted are holes in it: they take no room on the disk, and are never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff  # type: ignore[attr-defined]
from safetensors import safe_open
from transformers import AutoConfig, PretrainedConfig

from secateur.errors import ModelError
from secateur.files import read_json
from secateur.models.blocks import find_stack, shares_weights, skeleton, tensor_of_block, text_config, text_tower
from secateur.models.checks import as_model_error, check_names, is_within, read_modules
from secateur.models.compat import is_ignored
from secateur.progress import Progress, quiet, silent

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
PIECE = 32 << 20
"""Bytes that are asked for at once, and once more where the connection breaks."""


def fetch_kept(
    name: str, folder: Path, choose: Callable[[int], Sequence[int]], out: Path, progress: Progress = silent
) -> Path:
    """Fetch what a model cut to some of its layers needs into ``out``, an empty folder, which is returned.

    It opens as the whole model does, with zeros for the weights of the other layers. ``folder`` is what
    :func:`.fetch` returned, without the weights; ``choose`` gives the layers that stay, for the model's depth.

    Raises:
        ModelError: The weights are missing or broken, or not those of the configuration.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (out / file.relative_to(folder)).symlink_to(file.resolve())
    root = transformer_folder(out)
    with as_model_error(name, out), quiet():
        shards = [root / shard for shard in _shards(name, root)]
        addresses = {path: path.relative_to(out).as_posix() for path in shards if not path.exists()}
        urls = {path: hf_hub_url(name, file, revision=folder.name) for path, file in addresses.items()}
        headers = {path: _fetch_header(url, path) for path, url in urls.items()}
        tensors = {tensor: entry for header in headers.values() for tensor, entry in header.items()}
        wanted = set(tensors)
        if len(urls) == len(shards):  # no shard is in the cache
            wanted = wanted_tensors(name, AutoConfig.from_pretrained(root), tensors, choose)
        spans = [(path, *span) for path, header in headers.items() for span in _spans(header, wanted)]
        total, done = sum(end - start for _, start, end in spans), 0
        for path, start, end in spans:
            with path.open("r+b") as stream:
                stream.seek(start)
                for place in range(start, end, PIECE):
                    done += stream.write(_fetch(urls[path], place, min(end, place + PIECE)))
                    progress("download", done, total)
    return out


def transformer_folder(folder: Path) -> Path:
    """Where a model's folder has its transformer: what its modules.json names first, else the folder itself."""
    return next((folder / module["path"] for module in read_modules(folder)), folder)


def _shards(name: str, root: Path) -> list[str]:
    """Names of the files that hold the weights: of the index, or the only one."""
    if not (root / INDEX).is_file():
        return [SINGLE]
    names = sorted(set(read_json(root / INDEX)["weight_map"].values()))
    for shard in names:
        if ".." in PurePosixPath(shard).parts or shard.startswith("/") or not shard.endswith(".safetensors"):
            raise ModelError(f"{name}/{INDEX}", f"names {shard!r}, which is no safetensors file of the model")
    return names


def wanted_tensors(
    name: str, config: PretrainedConfig, tensors: dict[str, Any], choose: Callable[[int], Sequence[int]]
) -> set[str]:
    """Which tensors of a checkpoint a cut model needs, by their names; all, where these do not follow its layers."""
    config.name_or_path = name
    model = skeleton(config)
    depth = text_config(config).num_hidden_layers
    keep = set(choose(depth))
    state = {tensor: torch.empty(entry["shape"], device="meta") for tensor, entry in tensors.items()}
    unused = {t for t in check_names(name, model, None, state_dict=state) if not is_within(t, model)}
    # Those that transformers leaves out on purpose, such as T5's decoder, it does not tell.
    own, prefix = model.state_dict().keys(), f"{model.base_model_prefix}."
    unused |= {t for t in state if is_ignored(model, t) and t.removeprefix(prefix) not in own}
    tower = text_tower(model)
    towers = {child for child, _ in model.named_children()} - {tower.partition(".")[0]} if tower else set()
    wanted = {t for t in state if t not in unused and not towers & set(t.split("."))}
    if shares_weights(model):  # these are stored with one of the layers
        return wanted
    parts = find_stack(model).path.split(".")
    for start in range(len(parts)):
        blocks = {tensor: tensor_of_block(tensor, ".".join(parts[start:])) for tensor in wanted}
        if {block[0] for block in blocks.values() if block} == set(range(depth)):
            return {tensor for tensor, block in blocks.items() if block is None or block[0] in keep}
    return wanted


def _fetch_header(url: str, path: Path) -> dict[str, Any]:
    """Make the sparse file of a shard, with its header: the tensors by name, with ``shape`` and ``span`` of bytes."""
    size = get_hf_file_metadata(url).size or 0
    start = _fetch(url, 0, 8)
    end = 8 + int.from_bytes(start, "little")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(start + _fetch(url, 8, min(end, size, MAX_HEADER_BYTES)))
    os.truncate(path, size)
    with safe_open(path, framework="pt"):  # checks all that a header says
        pass
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(end)[8:])
    header.pop("__metadata__", None)
    for entry in header.values():
        entry["span"] = tuple(end + offset for offset in entry["data_offsets"])
    return header


def _spans(header: dict[str, Any], wanted: set[str]) -> list[tuple[int, int]]:
    """Ranges of bytes of the wanted tensors, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(entry["span"] for tensor, entry in header.items() if tensor in wanted):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif end > start:
            spans.append((start, end))
    return spans


def _fetch(url: str, start: int, end: int) -> bytes:
    headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    answer = http_backoff("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    hf_raise_for_status(answer)
    content: bytes = answer.content
    if len(content) != end - start:
        hint = "fetch the model (hf download) and give its folder"
        raise ModelError(url, "its server does not send the range of bytes that it is asked for", hint)
    return content
