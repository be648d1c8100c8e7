"""A run folder as plain data: its models, the tables that the steps of a study left there, and the study's journal.

Folder names say what they hold: ``<base>-<depth>-<recipe>``, where the recipe is ``zero-shot``, ``trimmed`` (not
trained, but its vocabulary was cut), ``scout`` (cut from a scout's model), ``polished`` (that, trained on alone) or the
name of a training, with the selection method before it where the layers are not the first ones, and the seed after it
where there are several: ``smollm2-7-healed``, ``smollm2-7-uniform-healed-seed2``. What a model's own tables say (its
layers, its seed) goes before its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.choosing.budgets import without_parameters
from secateur.choosing.choose import CHOSEN, CHOSEN_FROM, losses_fingerprint
from secateur.errors import DataError
from secateur.files import read_json
from secateur.models import model_label
from secateur.options import Budget, make, read_yaml
from secateur.options.base import listed
from secateur.results import (
    CostRow,
    Costs,
    Origin,
    Profile,
    ScoreRow,
    Scores,
    Scout,
    Table,
    Training,
    VocabularyCut,
    load,
)

UNTRAINED, TRIMMED, SCOUTED, POLISHED = "zero-shot", "trimmed", "scout", "polished"
BASELINE = "baseline"
"""The recipe of a model that the study did not make: it is compared with."""
CHOICE, JOURNAL, PLAN = "choice.json", "steps.jsonl", "plan.json"
JUDGES = {"pairs": "held-out pairs", "texts": "held-out texts, with the teacher as judge"}
"""What a scout without tasks scores on."""

_NAME = re.compile(
    rf"(?P<base>.+)-(?P<depth>\d+)-(?=[a-z])(?:(?P<selection>.+?)-)??(?P<recipe>{UNTRAINED}|[^-]+?)(?:-seed(?P<seed>\d+))?",
    re.DOTALL,
)


def judge_in_words(kind: str, tasks: int) -> str:
    """What scores are of, in words."""
    return JUDGES.get(kind) or ("your task" if tasks == 1 else f"your {tasks} tasks")


@dataclass(frozen=True)
class Scouted:
    """A scout of a run: its table, the training that all of its depths come from, and the depth chosen by it, if any.

    ``name`` is that of its folder: the base model, with the seed where there are several.
    """

    name: str
    table: Scout
    training: Training | None
    chosen: int | None

    @property
    def judge(self) -> str:
        """What its scores are of, in words."""
        return judge_in_words(self.table.judge, len({row.task for row in self.table.task_scores}))


@dataclass(frozen=True)
class Variant:
    """One model of a run, with what the run knows of it.

    Attributes:
        base: The base model, the first part of its name.
        depth: How many layers it holds, of ``blocks``.
        selection: The selection method that chose its layers; empty where they are the first ones.
        recipe: What was done besides the cut: ``zero-shot`` or ``trimmed`` (nothing), or the name of the training; or
            ``baseline``, for a model that the study did not make.
        training: Of a model that was cut from a scout's: that of the scout.
        scores: By task; ``results`` is the folder that each was found in.
        scout: The scout whose weights it is, or was trained on from.
    """

    name: str
    base: str
    depth: int | None
    blocks: int | None
    selection: str
    recipe: str
    seed: int | None
    folder: Path | None
    origin: Origin | None
    training: Training | None
    scout: Scouted | None
    cost: CostRow | None
    scores: Mapping[str, ScoreRow]
    results: Mapping[str, Path]

    @property
    def series(self) -> str:
        """The variants it is drawn and listed with."""
        selected = f"by {self.selection}" if self.selection else ""
        return ", ".join(part for part in (self.base, self.recipe, selected) if part)

    @property
    def is_baseline(self) -> bool:
        return self.recipe == BASELINE

    @property
    def is_full(self) -> bool:
        """Whether it has all layers of its base model."""
        return self.depth is not None and self.depth == self.blocks

    @property
    def vocabulary(self) -> VocabularyCut | None:
        """How its vocabulary was cut, if it was."""
        return self.origin.vocabulary if self.origin else None

    @property
    def own_training(self) -> Training | None:
        """Its training, if that is not its scout's."""
        return None if self.scout and self.training == self.scout.training else self.training

    @property
    def average(self) -> float | None:
        """Mean score over its tasks; None where it has no tasks, or one without a number."""
        values = [row.score for row in self.scores.values()]
        return None if not values or None in values else sum(values) / len(values)


@dataclass(frozen=True)
class Run:
    """What a run folder holds. ``profiles`` and ``choices`` by them (name of a choice → depth) are by base model.

    ``study`` is the text of its study's file, ``budget`` what it says is to be kept to. ``failed`` are the steps that
    failed, with the reason, and were not done since.
    """

    folder: Path
    study: str
    budget: Budget
    profiles: Mapping[str, Profile]
    choices: Mapping[str, Mapping[str, int]]
    scouts: tuple[Scouted, ...]
    variants: tuple[Variant, ...]
    scores: tuple[Scores, ...]
    costs: Costs | None
    failed: Mapping[str, str]

    @property
    def vocabularies(self) -> dict[str, VocabularyCut]:
        """Base model → how the vocabulary of its models was cut, of those where it was."""
        return {variant.base: variant.vocabulary for variant in reversed(self.variants) if variant.vocabulary}

    @property
    def trainings(self) -> dict[str, Training]:
        """Every training by the name of what it made."""
        scouts = {f"the scout of {scout.name}": scout.training for scout in self.scouts if scout.training}
        own = {variant.name: variant.own_training for variant in self.variants if variant.own_training}
        return scouts | own

    @property
    def tables(self) -> list[tuple[str, Table]]:
        """Every table with a title, in the order of the work."""
        named: list[tuple[str, Table | None]] = [(f"profile of {name}", own) for name, own in self.profiles.items()]
        for scout in self.scouts:
            title = f"scout of {scout.name}"
            named += [(title, scout.table), (f"training of the {title}", scout.training)]
        for variant in self.variants:
            named += [(f"model {variant.name}", variant.origin), (f"training of {variant.name}", variant.own_training)]
        for table in self.scores:
            named.append((f"scores of {', '.join(dict.fromkeys(row.model for row in table.rows))}", table))
        return [(title, table) for title, table in (*named, ("costs", self.costs)) if table]


def read_run(run: str | Path) -> Run:
    """Read the tables of a run folder. Any of its parts may be absent.

    Raises:
        DataError: The folder is missing, holds no table, or a file in it is broken or contradicts another.
        ConfigError: Its ``study.yaml`` has an option with an invalid value.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "name the folder that a study wrote")
    profiles = {path.parent.name: load(path, Profile) for path in sorted(folder.glob(f"profiles/*/{Profile.file}"))}
    scouts = {path.parent.name: _read_scouted(path.parent) for path in sorted(folder.glob(f"scouts/*/{Scout.file}"))}
    models = {path.parent.name: path.parent for path in sorted(folder.glob(f"models/*/{Origin.file}"))}
    scores = {path.parent: load(path, Scores) for path in sorted(folder.glob(f"scores/*/{Scores.file}"))}
    costs = load(folder, Costs) if (folder / Costs.file).exists() else None
    if not (profiles or scores or costs or models or scouts):
        raise DataError(
            folder,
            "holds no profile, model, scores or costs",
            "name the folder that a study wrote, with profiles/, models/, scores/ or costs.json in it",
        )
    scored: dict[str, dict[str, ScoreRow]] = {}
    places: dict[str, dict[str, Path]] = {}
    for place, row in ((place, row) for place, table in scores.items() for row in table.rows):
        if row.task in scored.setdefault(row.model, {}):
            raise DataError("scores", f"two scores of {row.model} on {row.task}", "keep one of the two files")
        scored[row.model][row.task] = row
        places.setdefault(row.model, {})[row.task] = place
    cost = {row.model: row for row in costs.rows} if costs else {}
    study = folder / "study.yaml"
    text = study.read_text(encoding="utf-8", errors="replace") if study.is_file() else ""
    options = read_yaml(study) if study.is_file() else {}
    budget = make(Budget, {key: value for key, value in options.items() if key in Budget.model_fields}, study)
    baselines = {model_label(str(name)) for name in listed(options.get("baselines")) or []}
    variants = []
    for name in dict.fromkeys([*models, *scored, *cost]):
        measured = {"cost": cost.get(name), "scores": scored.get(name, {}), "results": places.get(name, {})}
        variants.append(_variant(name, models.get(name), profiles, scouts, name in baselines, **measured))
    return Run(
        folder=folder,
        study=text,
        budget=budget,
        profiles=profiles,
        choices={name: _read_choice(folder / "profiles" / name, table) for name, table in profiles.items()},
        scouts=tuple(scouts.values()),
        variants=tuple(sorted(variants, key=_order)),
        scores=tuple(scores.values()),
        costs=costs,
        failed=_failed_steps(folder),
    )


def _variant(
    name: str,
    folder: Path | None,
    profiles: Mapping[str, Profile],
    scouts: Mapping[str, Scouted],
    is_baseline: bool,
    **measured: Any,
) -> Variant:
    match = None if is_baseline else _NAME.fullmatch(name)
    parts = match.groupdict() if match else {"base": name, "recipe": BASELINE if is_baseline else ""}
    base, seed = parts["base"], parts.get("seed")
    scout = None
    if parts["recipe"] in (SCOUTED, POLISHED):
        scout = scouts.get(f"{base}-seed{seed}") or scouts.get(base)
    origin = load(folder, Origin) if folder else None
    trained = [folder, folder.parents[1] / "trained" / name] if folder else []
    training = next((load(place, Training) for place in trained if (place / Training.file).is_file()), None)
    if training is None and scout and parts["recipe"] == SCOUTED:
        training = scout.training
    if training and training.provenance.seed is not None:
        seed = training.provenance.seed
    cost = measured["cost"]
    depth = len(origin.kept) if origin else cost.depth if cost else parts.get("depth")
    whole = origin or profiles.get(base)
    return Variant(
        name=name,
        base=base,
        depth=None if depth is None else int(depth),
        blocks=whole.depth if whole else None,
        selection=(parts.get("selection") or "").replace("_", "-"),
        recipe=parts["recipe"],
        seed=None if seed is None else int(seed),
        folder=folder,
        origin=origin,
        training=training,
        scout=scout,
        **measured,
    )


def _order(v: Variant) -> tuple[Any, ...]:
    return v.is_baseline, v.base, v.selection != "", v.recipe, v.selection, -(v.depth or 0), v.seed or 0, v.name


def read_scout(folder: Path) -> Scout:
    """A scout of a run; where its model's vocabulary is cut afterwards, with the costs that it then has."""
    table = load(folder, Scout)
    trimmed = folder.parents[1] / "models" / f"{table.model.removesuffix(UNTRAINED)}{TRIMMED}"
    is_cut = table.model.endswith(UNTRAINED) and (trimmed / Origin.file).is_file()
    cut = load(trimmed, Origin).vocabulary if is_cut else None
    return without_parameters(table, cut.removed) if cut else table


def _read_scouted(folder: Path) -> Scouted:
    table, file = read_scout(folder), folder / "model" / Training.file
    training = load(file, Training) if file.is_file() else None
    return Scouted(folder.name, table, training, _read_choice(folder, table).get(CHOSEN))


def _read_choice(folder: Path, table: Profile | Scout) -> dict[str, int]:
    """The depths in ``choice.json``, which the user may have edited; none where it is of another profile, or absent."""
    file = folder / CHOICE
    content = read_json(file) if file.exists() else {}
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}", 'write depths by name, such as {"small": 7}')
    made_from = content.pop(CHOSEN_FROM, None)
    if isinstance(table, Profile) and made_from not in (None, losses_fingerprint(table)):
        return {}
    depths = {name: depth for name, depth in content.items() if name != "vocab_size"}
    for name, depth in depths.items():
        if type(depth) is not int or not 1 <= depth <= table.depth:
            raise DataError(file, f"{depth!r} is not a depth", f"write a whole number, 1 to {table.depth}", field=name)
    return depths


# The journal ----------------------------------------------------------------------------------------------------------


def _failed_steps(run: Path) -> dict[str, str]:
    """Step → its error, of those that failed the last time and are still part of the study.

    What is planned changes with a scout's choice, or the options.
    """
    last = {entry["step"]: entry for entry in read_journal(run)}
    failed = {name: str(entry["error"]) for name, entry in last.items() if entry["outcome"] == "failed"}
    if not (failed and (run / PLAN).is_file()):
        return failed
    try:
        planned = {step["name"] for step in read_json(run / PLAN)["steps"]}
    except (KeyError, TypeError):
        raise DataError(run / PLAN, "is not a whole plan", "remove it") from None
    return {name: error for name, error in failed.items() if name in planned}


def read_journal(run: Path) -> list[dict[str, Any]]:
    """The entries of ``steps.jsonl``, one for each start and each end of a step, oldest first; none without a file.

    Raises:
        DataError: A line is broken. One without an end is of a study that was killed or is writing it: it is left out.
    """
    file = run / JOURNAL
    content = file.read_bytes() if file.is_file() else b""
    entries = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            entry = json.loads(line)
            known = isinstance(entry["step"], str) and entry["outcome"] in ("started", "done", "failed")
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            raise DataError(file, "is no entry of a study's journal", "mend the line, or take it out", line=number)
        entries.append({"seconds": None, "error": ""} | entry)
    return entries
