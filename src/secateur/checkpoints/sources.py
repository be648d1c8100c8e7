"""Where a checkpoint's bytes come from: a folder, or ranges of files on the Hub."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

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

from secateur.checkpoints.shards import BUFFER, Moved, Source, check_relative, write_all
from secateur.errors import ModelError

KERNEL_COPY = 64 << 20
ATTEMPTS = 6
RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
# What a kernel or file system says that cannot copy between these two files by itself.
NO_KERNEL_COPY = frozenset({errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF})


@dataclass
class Folder:
    """A checkpoint in a local folder. Files outside the folder are not read, whatever links say."""

    name: str
    root: Path
    bytes_read: int = 0

    def find(self, file: str) -> Path | None:
        check_relative(file, self.name)
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
            raise self.absent(file, "the checkpoint is incomplete: fetch it again")
        return found

    def check(self, shard: str) -> None:
        self.path(shard)

    def where(self, file: str) -> str:
        return str(self.root / file)

    def absent(self, file: str, hint: str = "") -> ModelError:
        return ModelError(self.where(file), "no such file", hint)

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

    def check(self, shard: str) -> None:
        """Only asking would tell; reading it does."""

    def where(self, file: str) -> str:
        return f"{self.name}/{file}"

    def absent(self, file: str, hint: str = "") -> ModelError:
        if constants.HF_HUB_OFFLINE:
            return self.error(file, hub_errors.OfflineModeIsEnabled())
        return ModelError(self.where(file), "no such file", hint)

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
            raise self.absent(file)
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
