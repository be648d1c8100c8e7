"""Fetches from the Hub only what a cut model needs: the small files, and of the weights the bytes of the kept blocks.

A safetensors file is the length of its header (8 bytes), the header (JSON), and the tensors' bytes end to end
(https://huggingface.co/docs/safetensors). So the header tells where each tensor lies, and what is wanted of a shard is
fetched in ranges into a sparse file of the shard's full size. Tensors that are not wanted are holes in it: they take no
room on the disk, and are never read.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    build_hf_headers,
    get_session,
    hf_raise_for_status,
)
from transformers import AutoConfig, PretrainedConfig

from secateur.errors import ModelError
from secateur.files import read_json
from secateur.models.blocks import blocks_of, find_stack, skeleton, tensor_of_block, text_config, text_tower
from secateur.models.checks import check_names, is_within
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
    """Fetch all but the weights of a model into the Hub's cache.

    Returns:
        The folder of the commit, whose name is the commit's.

    Raises:
        ModelError: There is no such model, or it cannot be fetched.
    """
    with hub_errors_of(name, revision), quiet():
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(SMALL), ignore_patterns=["*/*"]))
        if (folder / "modules.json").is_file():
            modules = read_json(folder / "modules.json")
            places = [str(module.get("path", "")) for module in modules if isinstance(module, dict)]
            wanted = [f"{place}/*.json" for place in places if place]
            # The transformer comes first; of its weights only a part is wanted.
            wanted += [f"{place}/*.safetensors" for place in places[1:] if place]
            if wanted:
                snapshot_download(name, revision=folder.name, allow_patterns=wanted)
    return folder


def fetch_kept(
    name: str, folder: Path, choose: Callable[[int], Sequence[int]], out: Path, progress: Progress = silent
) -> Path:
    """Fetch what a model cut to some of its blocks needs.

    Args:
        name: Of the model on the Hub.
        folder: As :func:`fetch_small` returns it.
        choose: Indices of the blocks that stay, for the model's depth.
        out: An empty folder.
        progress: Told the bytes.

    Returns:
        ``out``, which can be opened as the whole model can; the weights of the other blocks are zeros in it.

    Raises:
        ModelError: The weights are missing or broken, or not those of the configuration.
    """
    for file in folder.rglob("*"):
        if file.is_file():
            (out / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            (out / file.relative_to(folder)).symlink_to(file.resolve())
    root = transformer_folder(out)
    place = root.relative_to(out).as_posix().removeprefix(".")
    shards = _shards(name, root)
    repository = _Repository(name, folder.name, place)
    with hub_errors_of(name, folder.name):
        missing = [shard for shard in shards if not (root / shard).exists()]
        headers = {shard: repository.header(shard, root / shard) for shard in missing}
    wanted = {tensor for header in headers.values() for tensor in header}
    if not any((root / shard).is_symlink() for shard in shards):  # none is here whole
        with quiet():
            wanted = wanted_tensors(name, AutoConfig.from_pretrained(root), headers, choose)
    spans = {shard: _spans(header, wanted) for shard, header in headers.items()}
    total = sum(end - start for parts in spans.values() for start, end in parts)
    done = 0
    with hub_errors_of(name, folder.name):
        for shard, parts in spans.items():
            for start, end in parts:
                for count in repository.fetch(shard, start, end, root / shard):
                    done += count
                    progress("download", done, total)
    return out


def transformer_folder(folder: Path) -> Path:
    """Where a model's folder has its transformer: what its modules.json names first, else the folder itself."""
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else [{"path": ""}]
    try:
        return folder / str(modules[0]["path"])
    except (LookupError, TypeError):
        raise ModelError(folder, "its modules.json is not a list of modules, each with a type and a path") from None


def _shards(name: str, root: Path) -> list[str]:
    """Names of the files that hold the weights: of the index, or the only one."""
    if not (root / INDEX).is_file():
        return [SINGLE]
    content = read_json(root / INDEX)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ModelError(f"{name}/{INDEX}", "has no weight_map from tensors to files")
    for shard in set(names.values()):
        if ".." in PurePosixPath(shard).parts or shard.startswith("/") or not shard.endswith(".safetensors"):
            raise ModelError(f"{name}/{INDEX}", f"names {shard!r}, which is no safetensors file of the model")
    return sorted(set(names.values()))


def wanted_tensors(
    name: str, config: PretrainedConfig, headers: dict[str, dict[str, Any]], choose: Callable[[int], Sequence[int]]
) -> set[str]:
    """Which tensors of a checkpoint a cut model needs, by their names; all, where these do not follow its blocks."""
    shapes = {tensor: entry["shape"] for header in headers.values() for tensor, entry in header.items()}
    config.name_or_path = name
    model = skeleton(config)
    depth = text_config(config).num_hidden_layers
    keep = set(choose(depth))
    # transformers tells which it has no use for; those that it leaves out on purpose, it does not tell.
    state = {
        tensor: torch.empty(shape, device="meta") for tensor, shape in shapes.items() if not is_ignored(model, tensor)
    }
    unused = check_names(name, type(model), config, None, state_dict=state)
    unused = [tensor for tensor in unused if not is_within(tensor, model)]
    tower = text_tower(model)
    towers = {child for child, _ in model.named_children()} - {tower.partition(".")[0]} if tower else set()
    wanted = {tensor for tensor in state if tensor not in unused and not towers & set(tensor.split("."))}
    weights = [weight for block in blocks_of(model) for weight in block.parameters()]
    if len(set(map(id, weights))) < len(weights):  # blocks that share weights: these are stored with one of them
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


class _Repository:
    """The shards of a model on the Hub, at one commit."""

    def __init__(self, name: str, commit: str, place: str) -> None:
        self.name, self.commit, self.place = name, commit, place
        self.sizes: dict[str, int] = {}

    def header(self, shard: str, path: Path) -> dict[str, Any]:
        """The tensors of a shard by name, with the ``span`` of bytes of each; none where the file is fetched whole."""
        where = f"{self.name}/{shard}"
        for _ in self.fetch(shard, 0, 8, path):
            pass
        if path.is_symlink():
            return {}
        size, length = self.sizes[shard], int.from_bytes(_read(path, 0, 8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(where, f"is no safetensors file: a header of {length} bytes")
        for _ in self.fetch(shard, 8, 8 + length, path):
            pass
        try:
            header = json.loads(_read(path, 8, 8 + length))
            header.pop("__metadata__", None)
            for entry in header.values():
                start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                entry["span"] = (start, end)
                if not 8 + length <= start <= end <= size or not isinstance(entry["shape"], list):
                    raise ValueError
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise ModelError(where, "is no safetensors file: its header is broken") from None
        return dict(header)

    def fetch(self, shard: str, start: int, end: int, path: Path) -> Iterator[int]:
        """Fetch a range of a shard to its place in a sparse file; yields the bytes of each piece.

        A connection that breaks is taken up again where it broke. From a server without ranges, the whole shard is
        fetched into the Hub's cache.
        """
        failures = 0
        while start < end and not path.is_symlink():
            before, problem = start, None
            try:
                for piece in self._request(shard, start, end):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    with path.open("r+b" if path.exists() else "w+b") as file:
                        file.truncate(self.sizes[shard])
                        file.seek(start)
                        file.write(piece)
                    start += len(piece)
                    yield len(piece)
            except _NoRangesError:
                whole = hf_hub_download(self.name, self._path(shard), revision=self.commit)
                path.unlink(missing_ok=True)
                path.symlink_to(Path(whole).resolve())
            except HTTPError as error:
                problem = error
            failures = 0 if start > before else failures + 1
            response = getattr(problem, "response", None)
            may_pass = response is None or response.status_code in RETRIED_STATUS
            if problem and (failures == ATTEMPTS or not may_pass):
                raise problem
            if start < end and failures:
                time.sleep(min(8.0, 2.0 ** (failures - 2)))

    def _path(self, shard: str) -> str:
        return f"{self.place}/{shard}" if self.place else shard

    def _request(self, shard: str, start: int, end: int) -> Iterator[bytes]:
        url = hf_hub_url(self.name, self._path(shard), revision=self.commit)
        headers = build_hf_headers() | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as response:
            hf_raise_for_status(response)
            served, _, size = response.headers.get("Content-Range", "").partition("/")
            if response.status_code != 206 or not served.startswith(f"bytes {start}-") or not size.isdigit():
                raise _NoRangesError
            self.sizes[shard] = int(size)
            for piece in response.iter_bytes(BUFFER):
                yield piece[: end - start]
                start += len(piece)


class _NoRangesError(Exception):
    """The server answers a request for a range with something else."""


def _read(path: Path, start: int, end: int) -> bytes:
    with path.open("rb") as file:
        file.seek(start)
        return file.read(end - start)


HUB_PROBLEMS: tuple[tuple[type[Exception], str, str], ...] = (
    (
        hub_errors.GatedRepoError,
        "its owner gives access on request only",
        "ask for it on the model's page, then log in (hf auth login, or HF_TOKEN)",
    ),
    (
        hub_errors.RepositoryNotFoundError,
        "no such folder, and no such model on the Hub",
        "check the name; a private model needs a login (hf auth login, or HF_TOKEN)",
    ),
    (hub_errors.RevisionNotFoundError, "has no revision {revision}", ""),
    (hub_errors.HFValidationError, "no such folder, and no name of a model on the Hub", ""),
)


@contextmanager
def hub_errors_of(name: str, revision: str | None) -> Iterator[None]:
    """Say in the user's words why a model could not be fetched."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        for kind, problem, hint in HUB_PROBLEMS:
            if isinstance(error, kind):
                raise ModelError(name, problem.format(revision=revision), hint) from error
        if isinstance(error, hub_errors.EntryNotFoundError) and not isinstance(
            error, hub_errors.LocalEntryNotFoundError
        ):
            hint = "convert it: load it with transformers elsewhere and save_pretrained() it again"
            raise ModelError(name, f"has no safetensors ({SINGLE} or {INDEX})", hint) from error
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        if constants.HF_HUB_OFFLINE:
            hint = "unset it, or fetch the model first"
            raise ModelError(name, "is not in the local cache, and HF_HUB_OFFLINE is set", hint) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(name, f"cannot be fetched ({first})", "check the connection") from error
