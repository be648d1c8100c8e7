"""What a study reads, by its hash: a study that goes on must find the models, data and tasks that it began with.

Only files and folders have hashes; names on the Hub and mteb's tasks are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from secateur.data.sources import data_files, stem
from secateur.errors import DataError
from secateur.options import StudyOptions
from secateur.provenance import fingerprint
from secateur.studies.plan import recipe_settings

Inputs = Mapping[str, Mapping[str, str]]
"""What the options name → each file of it, and the file's SHA-256."""


def read_inputs(study: StudyOptions) -> dict[str, dict[str, str]]:
    """Hash what the options of a study name, as far as it is here."""
    files = {str(name): sorted(_files_of(Path(name), is_data)) for name, is_data in _named(study)}
    return {name: {str(file): fingerprint(file, 0).sha256 for file in own} for name, own in files.items() if own}


def check_inputs(before: Inputs, now: Inputs) -> None:
    """Refuse to go on with other inputs. What is gone altogether is left to the steps that need it.

    Raises:
        DataError: A file has changed, is new or is gone.
    """
    for name in before.keys() & now.keys():
        for file in sorted(before[name].keys() | now[name].keys()):
            one, other = before[name].get(file), now[name].get(file)
            if one != other:
                what = "is new" if one is None else "is gone" if other is None else "has changed"
                hint = "bring the old state back, or name a new run folder"
                raise DataError(file, f"{what} since the study began", hint)


def _named(study: StudyOptions) -> Iterator[tuple[str | Path, bool]]:
    """Names of what is read, and whether they are of data."""
    yield from ((model, False) for model in study.models)
    yield from ((data, True) for data in study.data)
    yield from ((task, False) for task in study.tasks)
    for recipe in recipe_settings(study).values():
        yield from ((task, False) for task in recipe.get("eval_tasks") or ())
        yield from ((data, True) for data in recipe.get("eval_data") or ())
        if recipe.get("teacher"):
            yield recipe["teacher"], False


def _files_of(path: Path, is_data: bool) -> Iterator[Path]:
    """The files that matter: of data, those that tell about them as well; of folders, those in their parts too."""
    path = path.expanduser()
    if is_data and path.exists():
        files = data_files(path)
        yield from (file for file in files if file.is_file())
        yield from (about for file in files if (about := file.with_name(stem(file) + ".json")).is_file())
    elif path.is_dir():
        # Other folders in it may be results, as the run folder itself.
        parts = [path, *(part.parent for part in path.glob("*/config.json")), *path.glob("qrels/")]
        yield from (f for part in parts for f in part.iterdir() if f.is_file() and not _is_aside(f))
    elif path.is_file():
        yield path


def _is_aside(file: Path) -> bool:
    return file.name.startswith(".") or file.suffix == ".md"
