"""Whether a study's outputs are still those of its options and inputs: one record for each, in ``RUN/done``.

A record holds the step's options and the files that it read, by their SHA-256, and those of the steps before it. Names
on the Hub and mteb's tasks have no files to compare.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.data.sources import data_files, stem
from secateur.errors import ConfigError, DataError
from secateur.options import Names
from secateur.provenance import Made, fingerprint, fingerprint_files, model_files, versions_of
from secateur.studies.steps import COMMANDS, Plan, Step

FOLDER = "done"
MEASURED = ("evaluate", "cost")
"""Steps whose results are of the models and library versions of now: else they run again. Others make a model or a
profile, which is never made again by itself."""
_ASIDE = frozenset({"out", "cache", "names", "vocab_tasks"})
"""Options that do not change a result."""


def made_from(step: Step, plan: Plan, run: Path, *, closely: bool = True) -> Made:
    """What a step's output follows from.

    Args:
        step: Its options must be known.
        plan: That it belongs to.
        run: The run folder.
        closely: Read all files; else only those of tasks, since reading all weights may take minutes.
    """
    options: dict[str, Any] = {}
    inputs: dict[str, Any] = {}
    values = step.options.model_dump(mode="json", include=step.options.model_fields_set - _ASIDE)
    for name, value in values.items():
        marks = [mark.what for mark in type(step.options).model_fields[name].metadata if isinstance(mark, Names)]
        what = next((str(mark) for mark in marks if mark in ("model", "data", "task")), "")
        for item in (value if isinstance(value, list) else [value]) if what else ():
            maker = _maker(item, plan)
            if maker is None:
                inputs[item] = _files(item, what) if closely or what == "task" else None
            elif step.kind in MEASURED:
                label = str(Path(item).relative_to(run))
                inputs[label] = fingerprint_files(item) if closely else None
            else:
                inputs[name] = asdict(made_from(maker, plan, run, closely=closely))
            value = None if maker or step.kind in MEASURED else value
        if value is not None:
            options[name] = value
    if step.kind == "heal":
        options.setdefault("recipe", "default")
    return Made(step.kind, options, inputs, versions_of() if step.kind in MEASURED else "")


def _maker(item: str, plan: Plan) -> Step | None:
    """The step of a study that writes a model, or the task folders of a scout."""
    for step in plan.steps:
        if step.kind in ("prune", "heal") and item == str(step.output):
            return step
        if step.kind == "scout" and step.output.parent in Path(item).parents:
            return step
    return None


def _files(item: str, what: str) -> dict[str, str] | None:
    """Files of a model, of data or of a task, by SHA-256; None for what is not on this disk."""
    path = Path(item).expanduser()
    if not path.exists():
        return None
    if what == "data":
        files = data_files(path)
        files += [about for file in files if (about := file.with_name(stem(file) + ".json")).is_file()]
    elif what == "task":
        files = sorted(file for file in path.rglob("*") if file.is_file())
    else:
        files = model_files(path)
    return {str(file): fingerprint(file, 0).sha256 for file in files}


def is_done(step: Step, plan: Plan, run: Path, *, closely: bool = True, keep: bool = False) -> bool:
    """Whether a step's output is there, and is of the present options and inputs.

    A model or profile without a record is whole as well: its study was killed before the record was written. With
    ``keep`` it gets one.
    """
    if not step.output.exists():
        return False
    changes = made_from(step, plan, run, closely=closely).changes_since(run / FOLDER, _name(step))
    if changes is None and step.kind not in MEASURED:
        if keep:
            record(step, plan, run)
        return True
    return changes == []


def record(step: Step, plan: Plan, run: Path) -> None:
    """Write what a step's output was made from; what a killed training left beside it goes."""
    shutil.rmtree(step.output.with_name(step.output.name + ".partial"), ignore_errors=True)
    made_from(step, plan, run).record(run / FOLDER, _name(step))


def _name(step: Step) -> str:
    return f"{step.name.replace(' ', '-')}.json"


def check(plan: Plan, run: Path, *, closely: bool = True) -> None:
    """Refuse to go on where a result that is there was made otherwise than it would be now.

    Models, depths, recipes, seeds and tasks may be added: that changes no result.

    Raises:
        ConfigError: With other options, as of an edited ``study.yaml``.
        DataError: From a file that has changed.
    """
    changed: dict[str, list[str]] = {}
    for step in plan.steps:
        if step.known and step.output.exists() and step.kind != "cost":
            made = made_from(step, plan, run, closely=closely)
            free = {"versions", *made.inputs} if step.kind in MEASURED else set()
            for name in made.changes_since(run / FOLDER, _name(step)) or []:
                if name not in free:
                    changed.setdefault(name, []).append(str(step.output.relative_to(run)))
    known = {name for options in COMMANDS.values() for name in options.model_fields}
    options = [name for name in changed if name in known]
    if options:
        there = list(dict.fromkeys(output for name in options for output in changed[name]))
        what = f"changed in {run}/study.yaml since {', '.join(there)} {'were' if len(there) > 1 else 'was'} made"
        hint = "change it back, name a new run folder for the changed study, or remove these results"
        raise ConfigError(", ".join(options), None, what, hint)
    for file, there in changed.items():
        hint = f"bring the old state back, or name a new run folder ({there[0]} was made from it)"
        raise DataError(file, "has changed since the study began", hint)
