"""What a command line names, looked at before anything heavy is imported: a mistake is told at once.

Only files and folders are looked at, with the functions that the steps use themselves, and in their words. Names on
the Hub, tasks of mteb and large data are left to the step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from secateur.errors import DataError, OutputError
from secateur.evaluation.task_folder import check_task_folder, read_task_folder
from secateur.files import check_is_file, check_results_folder, partial_folder
from secateur.models import is_endpoint, resolve
from secateur.options import Names, Options, read_study

SMALL = 8 << 20
"""Bytes of a task that are read here too: it takes less time than importing what a step needs."""


def check_places(options: Options) -> None:
    """Look at all that the options of a command name.

    Raises:
        SecateurError: As the step itself would.
    """
    for name, field in type(options).model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, Names)]
        value = getattr(options, name)
        for mark in marks if value is not None else ():
            if mark.what == "results":
                _check_results(value, mark.own)
            elif mark.what == "data":
                from secateur.data.sources import check_data

                check_data(value, getattr(options, "columns", None))
            else:
                for item in value if isinstance(value, list) else [value]:
                    _CHECKS[mark.what](item)


def _check_results(folder: Path, own: tuple[str, ...] | None) -> None:
    if own is not None:
        check_results_folder(folder, *own)
    elif folder.exists() and not folder.is_dir():
        raise OutputError(folder, "is a file", "name a folder")


def _check_model(name: str) -> None:
    if not is_endpoint(name):
        resolve(name)


def _check_task(name: str) -> None:
    folder = Path(name)
    if folder.exists():
        (read_task_folder if _bytes(folder) <= SMALL else check_task_folder)(folder)
    elif name.startswith((".", "/", "~")) or (folder.parent != Path() and folder.parent.is_dir()):
        raise DataError(name, "no such file or folder", "give a task folder, or the name of an mteb task or benchmark")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in (folder, *folder.rglob("*")) if file.is_file())


def _check_run(folder: Path) -> None:
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "name the folder that a study wrote")


def _check_new_file(file: Path) -> None:
    if file.exists():
        raise OutputError(file, "exists already", "name another file, or remove this one")


def _check_layers(to: str) -> None:
    from secateur.choosing.choose import needs_profile

    needs_profile(to)


def _check_table(path: str) -> None:
    from secateur.choosing.choose import read_table

    read_table(path)


_CHECKS: dict[str, Callable[[Any], object]] = {
    "layers": _check_layers,
    "model": _check_model,
    "task": _check_task,
    "file": check_is_file,
    "profile": _check_table,
    "run": _check_run,
    "study": read_study,
    "new folder": partial_folder,
    "new file": _check_new_file,
}
