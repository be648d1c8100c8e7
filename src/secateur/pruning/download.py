"""Fetches from the Hub only what a cut model needs: the small files, and of the weights the bytes of the kept layers.

A safetensors file is the length of its header (8 bytes), the header (JSON), and the tensors' bytes end to end
(https://huggingface.co/docs/safetensors). What is wanted of a shard is fetched in ranges into a sparse file of the
shard's full size. Tensors that are not wanted are holes in it: they take no room on the disk, and are never read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_url, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from secateur.errors import ModelError
from secateur.files import read_json
from secateur.models.blocks import find_stack, shares_weights, skeleton, tensor_of_block, text_config, text_tower
from secateur.models.checks import as_model_error, check_names, is_within, read_modules
from secateur.models.compat import is_ignored
from secateur.progress import Progress, quiet, silent

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL = ("*.json", "*.jinja", "*.model", "vocab*.txt", "merges*.txt", "adapter_model.safetensors")
"""Files at the root of a repository that are fetched whole."""
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
BUFFER = 4 << 20
ATTEMPTS = 6
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})


def fetch_small(name: str, revision: str | None = None) -> Path:
    """Fetch all but the weights of a model into the Hub's cache: the folder of the commit, whose name is the commit's.

    Raises:
        ModelError: There is no such model, or it cannot be fetched.
    """
    with hub_errors_of(name, revision), quiet():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL), ignore_patterns=["*/*"]))
        places = [module["path"] for module in read_modules(folder)]
        # The transformer comes first; of its weights only a part is wanted.
        wanted = [f"{place}/*.json" for place in places if place]
        wanted += [f"{place}/*.safetensors" for place in places[1:] if place]
        if wanted:
            snapshot_download(name, revision=folder.name, allow_patterns=wanted)
    return folder


def fetch_kept(
    name: str, folder: Path, choose: Callable[[int], Sequence[int]], out: Path, progress: Progress = silent
) -> Path:
    """Fetch what a model cut to some of its layers needs into ``out``, an empty folder, which is returned.

    It opens as the whole model does, with zeros for the weights of the other layers. ``folder`` is what
    :func:`fetch_small` returned; ``choose`` gives the layers that stay, for the model's depth.

    Raises:
        ModelError: The weights are missing or broken, or not those of the configuration.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (out / file.relative_to(folder)).symlink_to(file.resolve())
    root = transformer_folder(out)
    paths = [root / shard for shard in _shards(name, root)]
    shards = [_Shard(name, folder.name, p.relative_to(out).as_posix(), p) for p in paths if not p.exists()]
    with hub_errors_of(name, folder.name):
        headers = [shard.header() for shard in shards]
        tensors = {tensor: entry for header in headers for tensor, entry in header.items()}
        wanted = set(tensors)
        if len(shards) == len(paths):  # no shard is in the cache
            with as_model_error(name, out), quiet():
                wanted = wanted_tensors(name, AutoConfig.from_pretrained(root), tensors, choose)
        spans = [(s, *span) for s, header in zip(shards, headers, strict=True) for span in _spans(header, wanted)]
        total, done = sum(end - start for _, start, end in spans), 0
        for shard, start, end in spans:
            for count in shard.fetch(start, end):
                done += count
                progress("download", done, total)
    return out


def transformer_folder(folder: Path) -> Path:
    """Where a model's folder has its transformer: what its modules.json names first, else the folder itself."""
    return next((folder / module["path"] for module in read_modules(folder)), folder)


def _shards(name: str, root: Path) -> list[str]:
    """Names of the files that hold the weights: of the index, or the only one."""
    if not (root / INDEX).is_file():
        return [SINGLE]
    with as_model_error(name):
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
    unused = check_names(name, type(model), config, None, state_dict=state)
    # Tensors that transformers leaves out on purpose, such as T5's decoder, it does not tell; its patterns match more.
    spared = {tensor: state[tensor] for tensor in state if not is_ignored(model, tensor)}
    with contextlib.suppress(ModelError):
        check_names(name, type(model), config, None, state_dict=spared)
        state = spared
    unused = [tensor for tensor in unused if not is_within(tensor, model)]
    tower = text_tower(model)
    towers = {child for child, _ in model.named_children()} - {tower.partition(".")[0]} if tower else set()
    wanted = {tensor for tensor in state if tensor not in unused and not towers & set(tensor.split("."))}
    if shares_weights(model):  # these are stored with one of the layers
        return wanted
    parts = find_stack(model).path.split(".")
    for start in range(len(parts)):
        blocks = {tensor: tensor_of_block(tensor, ".".join(parts[start:])) for tensor in wanted}
        if {block[0] for block in blocks.values() if block} == set(range(depth)):
            return {tensor for tensor, block in blocks.items() if block is None or block[0] in keep}
    return wanted


def _spans(header: dict[str, Any], wanted: set[str]) -> list[tuple[int, int]]:
    """Ranges of bytes of the wanted tensors, neighbours joined."""
    spans: list[tuple[int, int]] = []
    for start, end in sorted(header[tensor]["span"] for tensor in header if tensor in wanted):
        if spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], end)
        elif end > start:
            spans.append((start, end))
    return spans


@dataclass
class _Shard:
    """A safetensors file on the Hub, and ``path``: the sparse file that stands for it here."""

    repository: str
    commit: str
    file: str
    path: Path

    def header(self) -> dict[str, Any]:
        """The tensors by name, each with its ``shape`` and its ``span`` of bytes."""
        list(self.fetch(0, 8))
        with self.path.open("rb", buffering=0) as file:
            end = 8 + int.from_bytes(file.read(8), "little")
            if end <= min(8 + MAX_HEADER_BYTES, self.path.stat().st_size):
                list(self.fetch(8, end))
            try:
                with safe_open(self.path, framework="pt"):  # checks all that a header says
                    pass
            except SafetensorError as error:
                problem = f"is damaged or no safetensors file ({error})"
                raise ModelError(f"{self.repository}/{self.file}", problem) from None
            header: dict[str, Any] = json.loads(file.read(end - 8))
        header.pop("__metadata__", None)
        for entry in header.values():
            entry["span"] = tuple(end + offset for offset in entry["data_offsets"])
        return header

    def fetch(self, start: int, end: int) -> Iterator[int]:
        """Fetch a range to its place in the sparse file; yields the bytes of each piece.

        A connection that breaks is taken up again where it broke.
        """
        url = hf_hub_url(self.repository, self.file, revision=self.commit)
        options: dict[str, Any] = {"timeout": constants.HF_HUB_DOWNLOAD_TIMEOUT, "follow_redirects": True}
        failures = 0
        while start < end:
            headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
            try:
                with get_session().stream("GET", url, headers=headers, **options) as response:
                    hf_raise_for_status(response)
                    served, _, size = response.headers.get("Content-Range", "").partition("/")
                    if response.status_code != 206 or not served.startswith(f"bytes {start}-"):
                        hint = "fetch the model (hf download) and give its folder"
                        raise ModelError(self.repository, "its server sends whole files only", hint)
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self.path.touch()
                    with self.path.open("r+b") as file:
                        file.truncate(int(size))
                        file.seek(start)
                        for piece in response.iter_bytes(BUFFER):
                            file.write(piece)
                            start += len(piece)
                            failures = 0
                            yield len(piece)
            except HTTPError as error:
                failures += 1
                answer = getattr(error, "response", None)
                if failures == ATTEMPTS or (answer is not None and answer.status_code not in RETRIED_STATUS):
                    raise
                time.sleep(min(8.0, 2.0 ** (failures - 2)))


@contextmanager
def hub_errors_of(name: str, revision: str | None) -> Iterator[None]:
    """Say in the user's words why a model could not be fetched."""
    login = "log in (hf auth login, or HF_TOKEN)"
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        match error:
            case hub_errors.GatedRepoError():
                problem, hint = "its owner gives access on request only", f"ask on the model's page, then {login}"
            case hub_errors.RepositoryNotFoundError() | hub_errors.HFValidationError():
                problem, hint = "no such folder, and no such model on the Hub", f"check the name; if private, {login}"
            case hub_errors.RevisionNotFoundError():
                problem, hint = f"has no revision {revision}", ""
            case _ if constants.HF_HUB_OFFLINE:
                problem, hint = "is not in the local cache, and HF_HUB_OFFLINE is set", "unset it, or fetch the model"
            case hub_errors.EntryNotFoundError() if not isinstance(error, hub_errors.LocalEntryNotFoundError):
                problem = f"has no safetensors ({SINGLE} or {INDEX})"
                hint = "convert it: load it with transformers elsewhere and save_pretrained() it again"
            case _:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                problem, hint = f"cannot be fetched ({first})", "check the connection"
        raise ModelError(name, problem, hint) from error
