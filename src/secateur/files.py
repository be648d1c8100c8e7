"""Files and folders of results: written whole or not at all, and read with the mistake's place in the error."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from secateur.errors import SYSTEM, DataError, OutputError, SecateurError, system_error

DONE = "done.json"
"""What the output beside it was made from, so that a step runs again only where something changed."""


def read_json(file: Path, *, strict: bool = False) -> Any:
    """Parse a JSON file in UTF-8; ``strict`` as for :func:`parse_json`.

    Raises:
        DataError: It is missing, cannot be read, or is no JSON; with the line where it is broken.
    """
    try:
        return parse_json(file.read_bytes().decode("utf-8-sig"), strict=strict)
    except FileNotFoundError:
        raise DataError(file, "no such file") from None
    except json.JSONDecodeError as error:
        raise DataError(file, f"broken JSON ({error.msg}, column {error.colno})", line=error.lineno) from None
    except UnicodeDecodeError as error:
        raise not_utf8(file, error, error.object.count(b"\n", 0, error.start) + 1) from None
    except OSError as error:
        raise DataError(file, f"cannot be read ({error})") from None
    except ValueError as error:
        raise DataError(file, f"broken JSON ({error})") from None


def not_utf8(file: Path, error: UnicodeDecodeError, line: int) -> DataError:
    """The error of a file in another encoding: its first bytes tell UTF-16; else Windows-1252 is the most likely."""
    byte = error.start - error.object.rfind(b"\n", 0, error.start)
    utf16 = line == 1 and error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
    encoding = "UTF-16" if utf16 else "WINDOWS-1252"
    problem = "is UTF-16, not UTF-8" if utf16 else f"byte {byte} is not UTF-8"
    hint = f"save the file as UTF-8; if it is {encoding}: iconv -f {encoding} -t UTF-8 OLD > NEW"
    return DataError(file, problem, hint, line=line)


def parse_json(text: str, *, strict: bool = False) -> Any:
    """Parse JSON; ``strict``, for data, refuses NaN and infinite numbers, a key that is there twice, and half a
    surrogate pair, which is JSON but no text that tokenizers take.
    """
    try:
        content = (_STRICT if strict else _LENIENT).decode(text)
        if strict and "\\u" in text:
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, \\ud800 to \\udfff") from None
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f'the key "{twice}" is there twice')
    return row


_LENIENT = json.JSONDecoder()
_STRICT = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_object)


def check_is_file(path: Path) -> None:
    """Refuse what is not a file that can be read, and read again."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(path, "no such file") from None
    except (OSError, ValueError) as error:
        raise DataError(path, f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise DataError(path, "is a folder", "name a file in it")
    if not stat.S_ISREG(mode):
        raise DataError(path, "is a pipe or a device, which cannot be read twice", "write it into a file first")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file under a temporary name, then rename it: readers see the old file or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """As :func:`write_text`, for bytes."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise output_error(path, error) from error


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under its name only when it is complete.

    Yields ``<path>.partial``; on success it is renamed to ``path``, on an error it is removed.

    Raises:
        OutputError: ``path`` holds something already, or cannot be written; or another run is writing it, or was.
    """
    path = Path(path)
    partial = partial_folder(path)
    with output_errors(path):
        partial.mkdir(parents=True, exist_ok=True)
    with lock(partial):
        if (partial / DONE).exists():
            raise OutputError(partial, "holds an unfinished training", "name another folder, or remove this one")
        try:
            with output_errors(path):
                empty_folder(partial)
                yield partial
                rename_into_place(partial, path)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, SecateurError):
                # The user named the folder, and only that name means anything once the other is gone.
                error.args = tuple(str(part).replace(str(partial), str(path)) for part in error.args)
            raise


@contextlib.contextmanager
def lock(folder: Path, *, wait: bool = False, of: Path | None = None) -> Iterator[None]:
    """Within: no other run works in this folder, which exists. The lock lies on the folder itself, and ends with the
    process; where the system or the disk knows no such locks, there is none.

    ``wait`` for the other's end, where each holds the folder only while it writes. ``of`` is the user's name for it.

    Raises:
        OutputError: Another run does.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            free = os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):  # the other one may have given it its name just now
            free = False
        except OSError:  # some network disks
            free = True
        if not free:
            raise OutputError(of or folder, "another run is working in it", "wait for its end, or name another place")
        yield


def empty_folder(folder: Path) -> None:
    """Remove what a killed run left; the folder stays, and its lock with it."""
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def partial_folder(path: str | Path) -> Path:
    """Where a folder is prepared until it is complete."""
    path = Path(path)
    if path.name in ("", "..") or os.path.ismount(path):  # as a container's volume is, which nothing can be renamed to
        raise OutputError(path, "cannot be replaced by a finished folder", "name a new folder in it")
    if path.is_symlink():  # a folder cannot be renamed to it
        raise OutputError(path, "is a symbolic link", "name the folder that it leads to, or a new one")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputError(path, "is there already", "name a new folder, or remove this one")
    return path.with_name(path.name + ".partial")


def rename_into_place(folder: Path, path: Path) -> None:
    """Rename a folder to ``path``, which is absent or an empty folder."""
    if path.exists():
        path.rmdir()
    folder.rename(path)


def check_results_folder(path: str | Path, *own: str) -> None:
    """Refuse a folder for results that holds others than those named in ``own``, and hidden files: file browsers and
    network disks leave some, and so does :func:`write_bytes` where it is killed.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise OutputError(path, "is a file", "name a folder")
    for item in sorted(path.iterdir()) if path.exists() else ():
        if item.name not in own and not item.name.startswith("."):
            raise OutputError(path, f"already holds something else ({item.name})", "name a new folder")


def results_folder(path: str | Path, *own: str) -> Path:
    """A folder for results, made where absent, and checked as by :func:`check_results_folder`."""
    check_results_folder(path, *own)
    return make_folder(path)


def make_folder(path: str | Path) -> Path:
    """Make a folder where it is absent: that it can be made is better known before hours of work."""
    with output_errors(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


@contextlib.contextmanager
def output_errors(path: str | Path) -> Iterator[None]:
    """Within: what fails because ``path`` cannot be written is an OutputError.

    On a full disk, libraries raise errors of their own, and torch's and numpy's do not tell why. An OSError of the
    network, or of a file elsewhere, stays what it is.
    """
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        found = system_error(error)
        if found is None and isinstance(error, OSError) and (error.errno in _OF_A_DISK or _names(error, Path(path))):
            found = error
        elif found is None and isinstance(error, (OSError, RuntimeError)):
            there = next(folder for folder in Path(path).absolute().parents if folder.exists())
            if shutil.disk_usage(there).free < 4096:
                found = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if found is None:
            raise
        raise output_error(path, found) from error


_OF_A_DISK = (errno.EROFS, errno.EIO, errno.EFBIG)
"""Besides those of :func:`.system_error`: what a write may end with, naming no file."""


def _names(error: OSError, path: Path) -> bool:
    """Whether an error is of a path, of what is in it or begins like it (``path.partial``), or of a folder above."""
    wanted = str(path.absolute())
    given = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes, os.PathLike))]
    named = [str(Path(os.fsdecode(name)).absolute()) for name in given]
    return any(name.startswith(wanted) or wanted.startswith(f"{name}{os.sep}") for name in named)


def output_error(path: str | Path, error: OSError) -> OutputError:
    """Say in the user's words why a path could not be written."""
    problem, hint = SYSTEM.get(error.errno or 0, (f"cannot be written ({error.strerror or error})", ""))
    return OutputError(path, problem, hint, concerns_all=error.errno in SYSTEM)
