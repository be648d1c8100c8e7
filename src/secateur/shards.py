"""The bytes of a safetensors checkpoint: headers, and ranges of them from a folder or from the Hub.

A safetensors file is the length n of its header (8 bytes, little-endian), n bytes of JSON, and the tensors' bytes end
to end (https://huggingface.co/docs/safetensors). So a tensor can be had without its neighbours: here a tensor is a
range of a file, nothing is ever unpacked, and everything a file says is checked before it is believed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    get_session,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub_errors
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import (  # type: ignore[attr-defined]
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
)

from secateur.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The limit of the safetensors library itself.
MAX_HEADER_BYTES = 100_000_000
# Bits of one number of each type.
DTYPES = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

BUFFER = 4 << 20
KERNEL_COPY = 64 << 20
ATTEMPTS = 6
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# What a kernel or file system says that cannot copy between these two files by itself.
NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})

Moved = Callable[[int], None]


@dataclass(frozen=True)
class Tensor:
    """One tensor where it lies: bytes ``start`` to ``end`` of ``file``, row-major."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Source(Protocol):
    """A checkpoint's files, wherever they are. ``bytes_read`` counts what was read of its shards."""

    name: str
    bytes_read: int

    def find(self, file: str) -> Path | None:
        """A small file, as a local file; None where there is none."""

    def exists(self, file: str) -> bool:
        """Whether there is such a file; it is not fetched."""

    def size(self, file: str) -> int:
        """Length of a shard in bytes."""

    def read(self, file: str, start: int, end: int) -> bytes:
        """A range of a shard."""

    def copy(self, file: str, start: int, end: int, sink: int, moved: Moved) -> None:
        """Append a range of a shard to the file descriptor ``sink``, telling ``moved`` of each piece's bytes."""

    def where(self, file: str) -> str:
        """How to name a file in a message."""


def read_json(file: Path) -> Any:
    """Parse a small JSON file of a model.

    Raises:
        ModelError: It cannot be read, is too large, or is not JSON.
    """
    try:
        if file.stat().st_size > MAX_HEADER_BYTES:
            raise ModelError(file, f"has more than {MAX_HEADER_BYTES} bytes")
        return parse_json(file.read_bytes(), str(file))
    except OSError as error:
        raise ModelError(file, f"cannot be read ({error.strerror or error})") from None


def parse_json(content: bytes, where: str) -> Any:
    """Parse JSON that may be hostile; a key that stands twice is an error."""
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _DuplicateKey as error:
        raise ModelError(where, f"broken JSON (the key {str(error)!r} stands twice)") from None
    except (ValueError, RecursionError) as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else type(error).__name__
        raise ModelError(where, f"broken JSON ({message})") from None


class _DuplicateKey(Exception):
    """A JSON object with the same key twice."""


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        raise _DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return content


def read_header(source: Source, file: str) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name.

    Raises:
        ModelError: The file is missing, cut short, or its header does not describe exactly the bytes that follow it.
    """
    where = source.where(file)
    size = source.size(file)
    if size < 8:
        raise ModelError(where, f"is cut short: {size} bytes, less than the header of a safetensors file")
    length = int.from_bytes(source.read(file, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise ModelError(where, f"is no safetensors file: a header of {length} bytes (at most {MAX_HEADER_BYTES})")
    if 8 + length > size:
        raise ModelError(where, f"is cut short: {size} bytes, but its header alone has {length}")
    content = parse_json(source.read(file, 8, 8 + length), where)
    if not isinstance(content, dict):
        raise ModelError(where, "is no safetensors file: its header is not a JSON object")
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(where, "the __metadata__ of its header is not a map from text to text")
    tensors = {name: _tensor(file, name, entry, 8 + length, where) for name, entry in content.items()}
    _check_layout(tensors, 8 + length, size, where)
    return tensors


def _tensor(file: str, name: str, entry: Any, base: int, where: str) -> Tensor:
    """Check one entry of a header."""
    shown = repr(name[:200])
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise ModelError(where, f"the name {shown} is not valid Unicode") from None
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(where, f"tensor {shown} must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ModelError(
            where, f"tensor {shown} has the unknown type {str(dtype)[:50]!r}", f"one of {', '.join(DTYPES)}"
        )
    if not _are_counts(shape) or len(shape) > 64:
        raise ModelError(where, f"tensor {shown} has a shape that is not a list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ModelError(where, f"tensor {shown} has data_offsets that are not [begin, end]")
    begin, end = offsets
    # math.prod of hostile sizes may have many digits; it is compared, never printed.
    if math.prod(shape) * DTYPES[dtype] != (end - begin) * 8:
        raise ModelError(
            where, f"tensor {shown} is {dtype} of shape {shape}, which its {end - begin} bytes do not hold"
        )
    return Tensor(file, dtype, tuple(shape), base + begin, base + end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _check_layout(tensors: Mapping[str, Tensor], base: int, size: int, where: str) -> None:
    """The tensors must fill the file end to end: no hole, no overlap, nothing after the last."""
    position = base
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.end > size:
            raise ModelError(where, f"is cut short: {size} bytes, but tensor {name[:200]!r} ends at byte {tensor.end}")
        if tensor.start != position:
            problem = "overlaps the one before it" if tensor.start < position else "leaves a hole before it"
            raise ModelError(where, f"tensor {name[:200]!r} {problem} (begins at {tensor.start}, not at {position})")
        position = tensor.end
    if position != size:
        raise ModelError(where, f"has {size} bytes, but its header describes {position}")


def shard_names(source: Source) -> dict[str, str]:
    """Which shard holds which tensor, from the index, or from the header of the only file.

    Raises:
        ModelError: There are no safetensors weights, or the index is broken or leads out of the checkpoint.
    """
    # transformers looks for the single file first, and so must who wants the same weights.
    if source.exists(SINGLE):
        return dict.fromkeys(read_header(source, SINGLE), SINGLE)
    file = source.find(INDEX)
    if file is None:
        raise _no_weights(source)
    where = source.where(INDEX)
    content = read_json(file)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
        raise ModelError(where, "has no weight_map from tensors to files")
    for shard in sorted(set(names.values())):
        _check_relative(shard, where)
        if not shard.endswith(".safetensors"):
            raise ModelError(where, f"names {shard!r}, which is no safetensors file")
        if isinstance(source, Folder):
            source.path(shard)
    return names


def _no_weights(source: Source) -> ModelError:
    for file in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
        if source.exists(file):
            line = (
                'python -c "from transformers import AutoModel; '
                f"AutoModel.from_pretrained('{source.name}').save_pretrained('converted')\""
            )
            return ModelError(source.name, f"has only PyTorch weights ({file})", f"convert them to safetensors: {line}")
    return ModelError(source.name, f"has no weights ({SINGLE} or {INDEX})")


def _check_relative(file: str, where: str) -> None:
    path = PurePosixPath(file)
    if not path.parts or path.is_absolute() or ".." in path.parts or re.search(r"[\\\x00-\x1f:]", file):
        raise ModelError(where, f"names {file!r}, which leads out of the model's folder")


def absent(source: Source, file: str, hint: str = "") -> ModelError:
    """The error for a file that must be there."""
    if isinstance(source, Hub) and constants.HF_HUB_OFFLINE:
        return source.error(file, hub_errors.OfflineModeIsEnabled())
    return ModelError(source.where(file), "no such file", hint)


@dataclass
class Folder:
    """A checkpoint in a local folder. Files outside the folder are not read, whatever links say."""

    name: str
    root: Path
    bytes_read: int = 0

    def find(self, file: str) -> Path | None:
        _check_relative(file, self.name)
        path = self.root / file
        try:
            real = path.resolve(strict=True)
            mode = real.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, RuntimeError) as error:
            raise ModelError(path, f"cannot be read ({error})") from None
        if not real.is_relative_to(_boundary(self.root)):
            raise ModelError(path, f"is a link out of the model's folder, to {real}", "copy the file itself there")
        if not stat.S_ISREG(mode):
            raise ModelError(path, "is not a regular file")
        return real

    def exists(self, file: str) -> bool:
        return self.find(file) is not None

    def path(self, file: str) -> Path:
        """The real path of a file that must exist."""
        found = self.find(file)
        if found is None:
            raise absent(self, file, "the checkpoint is incomplete: fetch it again")
        return found

    def where(self, file: str) -> str:
        return str(self.root / file)

    def size(self, file: str) -> int:
        return self.path(file).stat().st_size

    def read(self, file: str, start: int, end: int) -> bytes:
        self.bytes_read += end - start
        return _read_range(self.path(file), start, end)

    def copy(self, file: str, start: int, end: int, sink: int, moved: Moved) -> None:
        for count in _copy_range(self.path(file), start, end, sink):
            self.bytes_read += count
            moved(count)


def _boundary(root: Path) -> Path:
    """The folder that links may not leave: the model's own, or its whole repository in a Hub cache.

    There, ``models--owner--name/snapshots/<commit>/`` holds links to ``models--owner--name/blobs/``.
    """
    real = root.resolve()
    for parent in real.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return real


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ModelError(path, f"cannot be read ({error.strerror})") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _read_range(path: Path, start: int, end: int) -> bytes:
    with _opened(path) as descriptor:
        pieces = []
        while start < end:
            pieces.append(_pread(descriptor, start, min(end - start, KERNEL_COPY), path))
            start += len(pieces[-1])
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _pread(descriptor: int, start: int, count: int, path: Path) -> bytes:
    try:
        piece = os.pread(descriptor, count, start)
    except OSError as error:
        raise ModelError(path, f"cannot be read ({error.strerror})") from None
    if not piece:
        raise ModelError(path, f"is cut short at byte {start}")
    return piece


def _copy_range(path: Path, start: int, end: int, sink: int) -> Iterator[int]:
    """Append a range of a file to another, inside the kernel where it can; yields the bytes of each piece."""
    in_kernel = hasattr(os, "copy_file_range")
    with _opened(path) as descriptor:
        while start < end:
            count = 0
            if in_kernel:
                try:
                    count = os.copy_file_range(descriptor, sink, min(end - start, KERNEL_COPY), start)
                except OSError as error:
                    if error.errno not in NO_KERNEL_COPY:
                        raise
                in_kernel = count > 0  # Some file systems answer 0 where they cannot.
            if not count:
                piece = _pread(descriptor, start, min(end - start, BUFFER), path)
                write_all(sink, piece)
                count = len(piece)
            start += count
            yield count


def write_all(sink: int, content: bytes | memoryview) -> None:
    """Write all the bytes: ``os.write`` may take fewer."""
    view = memoryview(content)
    while view:
        view = view[os.write(sink, view) :]


class _NoRanges(Exception):
    """The server answers a request for a range with the whole file."""


@dataclass
class Hub:
    """A checkpoint on the Hub, read in ranges.

    A shard that is in the local cache already is read from there. Where the server does not serve ranges, the shards
    that are needed are downloaded into the cache whole. From the first file on, all are of one commit.

    Attributes:
        mirror: A folder in which to leave what is read, each byte at its place: the files are as long as on the Hub,
            with holes where nothing was read. The rest of the checkpoint can be opened from there by anyone.
    """

    name: str
    revision: str | None = None
    token: str | None = None
    endpoint: str | None = None
    mirror: Path | None = None
    bytes_read: int = 0
    _sizes: dict[str, int] = field(default_factory=dict)

    def find(self, file: str) -> Path | None:
        try:
            found = self._download(file)
            self._link(file, found)
            return found
        except hub_errors.EntryNotFoundError as error:
            if isinstance(error, hub_errors.LocalEntryNotFoundError) and not constants.HF_HUB_OFFLINE:
                raise self.error(file, error) from error
            return None
        except (HTTPError, OSError, ValueError) as error:
            raise self.error(file, error) from error

    def exists(self, file: str) -> bool:
        if self._cached(file):
            return True
        if constants.HF_HUB_OFFLINE:
            return False
        try:
            get_hf_file_metadata(self._url(file), token=self.token, endpoint=self.endpoint, retry_on_errors=True)
        except hub_errors.EntryNotFoundError:
            return False
        except (HTTPError, OSError, ValueError) as error:
            raise self.error(file, error) from error
        return True

    def where(self, file: str) -> str:
        return f"{self.name}/{file}"

    def size(self, file: str) -> int:
        if file not in self._sizes:
            self.read(file, 0, 8)
        return self._sizes[file]

    def read(self, file: str, start: int, end: int) -> bytes:
        local = self._cached(file)
        if local is None:
            try:
                return b"".join(self._ranged(file, start, end))
            except _NoRanges:
                local = self._whole(file)
        self._link(file, local)
        self._sizes[file] = local.stat().st_size
        return _read_range(local, start, min(end, self._sizes[file]))

    def copy(self, file: str, start: int, end: int, sink: int, moved: Moved) -> None:
        local = self._cached(file)
        if local is None:
            try:
                for piece in self._ranged(file, start, end):
                    write_all(sink, piece)
                    start += len(piece)
                    moved(len(piece))
            except _NoRanges:
                local = self._whole(file)
        if local is not None:
            self._link(file, local)
            for count in _copy_range(local, start, end, sink):
                moved(count)

    def complete_mirror(self, files: Collection[str]) -> None:
        """Let shards of which nothing was read stand in the mirror, empty: who opens a checkpoint opens all of them."""
        if self.mirror is None:
            return
        header = b'{"__metadata__":{"format":"pt"}} '
        for file in files:
            if not (self.mirror / file).exists():
                (self.mirror / file).parent.mkdir(parents=True, exist_ok=True)
                (self.mirror / file).write_bytes(len(header).to_bytes(8, "little") + header)

    def _link(self, file: str, local: Path) -> None:
        """Let the mirror have a file that is here whole, in the place of what it may have of it."""
        if self.mirror is not None and not (self.mirror / file).is_symlink():
            (self.mirror / file).parent.mkdir(parents=True, exist_ok=True)
            (self.mirror / file).unlink(missing_ok=True)
            (self.mirror / file).symlink_to(local.absolute())

    def _mirror(self, file: str, start: int, piece: bytes) -> None:
        if self.mirror is None:
            return
        (self.mirror / file).parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.mirror / file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.truncate(descriptor, self._sizes[file])
            os.lseek(descriptor, start, os.SEEK_SET)
            write_all(descriptor, piece)
        finally:
            os.close(descriptor)

    def _cached(self, file: str) -> Path | None:
        found = try_to_load_from_cache(self.name, file, revision=self.revision)
        return Path(found) if isinstance(found, str) else None

    def _whole(self, file: str) -> Path:
        found = self.find(file)
        if found is None:
            raise absent(self, file)
        self.bytes_read += found.stat().st_size
        return found

    def _download(self, file: str) -> Path:
        """A file in the local cache, fetched where it is not there; the commit it is of holds for all that follow."""
        with _no_progress_bars():
            path = Path(
                hf_hub_download(self.name, file, revision=self.revision, token=self.token, endpoint=self.endpoint)
            )
        commit = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix())
        self.revision = commit[1] if commit else self.revision
        return path

    def _url(self, file: str) -> str:
        return hf_hub_url(self.name, file, revision=self.revision, endpoint=self.endpoint)

    def _ranged(self, file: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes of a range in pieces; a connection that breaks is taken up again where it broke."""
        failures = 0
        while start < end:
            before = start
            try:
                for piece in self._request(file, start, end):
                    self._mirror(file, start, piece)
                    start += len(piece)
                    self.bytes_read += len(piece)
                    yield piece
                problem: Exception | None = None
            except (HTTPError, OSError) as error:
                problem = error
            failures = 0 if start > before else failures + 1
            if start < end and (failures == ATTEMPTS or (problem and not _may_pass(problem))):
                raise self.error(file, problem or OSError("the server sends nothing")) from problem
            if failures:
                time.sleep(min(8.0, 2.0 ** (failures - 2)))

    def _request(self, file: str, start: int, end: int) -> Iterator[bytes]:
        headers = build_hf_headers(token=self.token)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        request = get_session().stream("GET", self._url(file), headers=headers, timeout=timeout, follow_redirects=True)
        with request as response:
            hf_raise_for_status(response)
            served = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
            if response.status_code != 206 or served is None:
                raise _NoRanges
            if int(served[1]) != start:
                raise OSError(f"the server sent byte {served[1]} where byte {start} was asked for")
            self._sizes[file] = int(served[3])
            for piece in response.iter_bytes(BUFFER):
                yield piece[: end - start]
                start += len(piece)
                if start >= end:
                    return

    def error(self, file: str, error: Exception) -> ModelError:
        """Say in the user's words why a file could not be had."""
        for kind, problem, hint in HUB_PROBLEMS:
            if isinstance(error, kind):
                return ModelError(self.name, problem.format(file=file, revision=self.revision), hint)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return ModelError(self.where(file), f"cannot be fetched ({lines[0]})")


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
    (
        hub_errors.OfflineModeIsEnabled,
        "{file} is not in the local cache, and HF_HUB_OFFLINE is set",
        "unset it, or fetch the model first",
    ),
    (
        hub_errors.LocalEntryNotFoundError,
        "{file} is not in the local cache, and the Hub cannot be reached",
        "check the connection",
    ),
    (hub_errors.EntryNotFoundError, "has no file {file}", ""),
    (hub_errors.HFValidationError, "no such folder, and no name of a model on the Hub", ""),
)


def _may_pass(error: Exception) -> bool:
    """Whether asking again may help: a broken connection or a busy server, not a refusal."""
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code in RETRIED_STATUS


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Nothing below the command line prints."""
    were_off = are_progress_bars_disabled()
    if not were_off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def open_source(
    name: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    mirror: Path | None = None,
) -> Source:
    """The checkpoint that a user names: a local folder, else a model on the Hub (with a ``mirror``, see :class:`Hub`).

    Raises:
        ModelError: It is a file, or a path where there is no folder.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return Folder(str(name), path)
    if path.exists():
        raise ModelError(name, "is a file", "give the folder of the model")
    if isinstance(name, Path) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise ModelError(name, "no such folder")
    return Hub(name, revision, token, endpoint, mirror)
