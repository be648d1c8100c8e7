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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from secateur.choosing.budgets import without
from secateur.choosing.choose import CHOSEN, CHOSEN_FROM, choose, losses_fingerprint
from secateur.errors import ConfigError, DataError
from secateur.files import read_json
from secateur.models import model_label
from secateur.options import Budget, make
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
CHOICE, JOURNAL = "choice.json", "steps.jsonl"
JUDGES = {"pairs": "held-out pairs", "texts": "held-out texts, with the teacher as judge"}
"""What a scout without tasks scores on."""

_NAME = re.compile(
    rf"(?P<base>.+)-(?P<depth>\d+)-(?=[a-z])(?:(?P<selection>.+?)-)??(?P<recipe>{UNTRAINED}|[^-]+?)(?:-seed(?P<seed>\d+))?",
    re.DOTALL,
)


@dataclass(frozen=True)
class Scouted:
    """A scout of a run: its table, the training that all of its depths come from, and the depth chosen by it, if any.

    ``name`` is that of its folder: the base model, with the seed where there are several.
    """

    name: str
    base: str
    seed: int | None
    table: Scout
    training: Training | None
    chosen: int | None

    @property
    def judge(self) -> str:
        """What its scores are of, in words."""
        count = len({row.task for row in self.table.task_scores})
        return JUDGES.get(self.table.judge) or f"your {f'{count} tasks' if count > 1 else 'task' if count else 'tasks'}"


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
    cost: CostRow | None
    scores: Mapping[str, ScoreRow]
    results: Mapping[str, Path]
    scout: Scouted | None

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
    """What a run folder holds. ``profiles`` and ``choices`` (name of a choice → depth) are by base model.

    A choice by a scout has the name of the scout, and is called ``scout``. ``options`` are those in ``study``, the text
    of its study's file. ``failed`` are the steps that failed, with the reason, and were not done since.
    """

    folder: Path
    study: str
    options: Mapping[str, Any]
    profiles: Mapping[str, Profile]
    choices: Mapping[str, Mapping[str, int]]
    variants: tuple[Variant, ...]
    scores: tuple[Scores, ...]
    costs: Costs | None
    failed: Mapping[str, str]
    scouts: tuple[Scouted, ...]

    @property
    def budget(self) -> Budget:
        """What the study was asked to keep to; nothing where that is not known."""
        try:
            return make(Budget, {key: self.options[key] for key in Budget.model_fields if key in self.options})
        except ConfigError:  # edited, and broken
            return make(Budget, {})

    @property
    def vocabularies(self) -> dict[str, VocabularyCut]:
        """Base model → how the vocabulary of its models was cut, of those where it was."""
        found: dict[str, VocabularyCut] = {}
        for variant in self.variants:
            if variant.vocabulary:
                found.setdefault(variant.base, variant.vocabulary)
        return found

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
        DataError: The folder is missing, holds no table, or a table in it is broken or contradicts another.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "name the folder that a study wrote")
    profiles = {path.parent.name: load(path, Profile) for path in sorted(folder.glob(f"profiles/*/{Profile.file}"))}
    scores = {path.parent: load(path, Scores) for path in sorted(folder.glob(f"scores/*/{Scores.file}"))}
    costs = load(folder, Costs) if (folder / Costs.file).exists() else None
    models = {path.parent.name: path.parent for path in sorted(folder.glob(f"models/*/{Origin.file}"))}
    bases = {*profiles, *(match["base"] for name in models if (match := _NAME.fullmatch(name)))}
    scouts = [_scout(path.parent, bases) for path in sorted(folder.glob(f"scouts/*/{Scout.file}"))]
    if not (profiles or scores or costs or models or scouts):
        raise DataError(
            folder,
            "holds no profile, model, scores or costs",
            "name the folder that a study wrote, with profiles/, models/, scores/ or costs.json in it",
        )
    scored: dict[str, dict[str, tuple[ScoreRow, Path]]] = {}
    for place, row in ((place, row) for place, table in scores.items() for row in table.rows):
        if row.task in scored.setdefault(row.model, {}):
            raise DataError("scores", f"two scores of {row.model} on {row.task}", "keep one of the two files")
        scored[row.model][row.task] = row, place
    cost = {row.model: row for row in costs.rows} if costs else {}
    study = folder / "study.yaml"
    text = study.read_text(encoding="utf-8", errors="replace") if study.is_file() else ""
    options = _options(text)
    given = listed(options.get("baselines"))
    baselines = {model_label(str(name)) for name in given} if isinstance(given, list) else set()
    variants = []
    for name in dict.fromkeys([*models, *scored, *cost]):
        tables = models.get(name), cost.get(name), scored.get(name, {})
        variants.append(_variant(name, *tables, profiles, scouts, is_baseline=name in baselines))
    choices = {name: _read_choice(folder / "profiles" / name, table) for name, table in profiles.items()}
    for scout in scouts:
        own = {} if scout.chosen is None else {SCOUTED: scout.chosen}
        choices[scout.name] = choices.get(scout.name, {}) | own
    last = {entry["step"]: entry for entry in read_journal(folder)}
    return Run(
        folder=folder,
        study=text,
        options=options,
        profiles=profiles,
        choices={name: choice for name, choice in choices.items() if choice},
        variants=tuple(sorted(variants, key=_order)),
        scores=tuple(scores.values()),
        costs=costs,
        failed={name: entry["error"] for name, entry in last.items() if entry["outcome"] == "failed"},
        scouts=tuple(scouts),
    )


def _options(study: str) -> dict[str, Any]:
    """The options in the text of ``study.yaml``; none where it was edited and is broken."""
    try:
        given = yaml.safe_load(study)
    except (yaml.YAMLError, ValueError):
        return {}
    return given if isinstance(given, dict) else {}


def _variant(
    name: str,
    folder: Path | None,
    cost: CostRow | None,
    scores: Mapping[str, tuple[ScoreRow, Path]],
    profiles: Mapping[str, Profile],
    scouts: Sequence[Scouted],
    *,
    is_baseline: bool,
) -> Variant:
    origin = load(folder, Origin) if folder else None
    trained = [folder, folder.parents[1] / "trained" / name] if folder else []
    training = next((load(place, Training) for place in trained if (place / Training.file).is_file()), None)
    match = None if is_baseline else _NAME.fullmatch(name)
    parts = match.groupdict("") if match else {"base": name, "selection": "", "recipe": ""}
    base, recipe = parts["base"], BASELINE if is_baseline else parts["recipe"]
    depth = cost.depth if cost else int(parts["depth"]) if match else None
    seed = int(parts["seed"]) if parts.get("seed") else None
    seed = training.provenance.seed if training and training.provenance.seed is not None else seed
    blocks = profiles[base].depth if base in profiles else None
    if origin:
        depth, blocks = len(origin.kept), origin.depth
    if is_baseline:  # cut from nothing
        depth, blocks, seed = cost.depth if cost else None, None, None
    scout = None
    if recipe in (SCOUTED, POLISHED):
        own = [scout for scout in scouts if scout.base == base]
        own = [scout for scout in own if scout.seed == seed] if len(own) > 1 else own
        if own:
            scout = own[0]
            if training is None and recipe == SCOUTED and scout.training:
                training = scout.training
                seed = seed if training.provenance.seed is None else training.provenance.seed
    return Variant(
        name=name,
        base=base,
        depth=depth,
        blocks=blocks,
        selection=parts["selection"].replace("_", "-"),
        recipe=recipe,
        seed=seed,
        folder=folder,
        origin=origin,
        training=training,
        cost=cost,
        scores={task: row for task, (row, _) in scores.items()},
        results={task: place for task, (_, place) in scores.items()},
        scout=scout,
    )


def _order(v: Variant) -> tuple[Any, ...]:
    return v.is_baseline, v.base, v.selection != "", v.recipe, v.selection, -(v.depth or 0), v.seed or 0, v.name


def read_scout(folder: Path) -> Scout:
    """A scout of a run; where its model's vocabulary is cut afterwards, with the costs that it then has."""
    table = load(folder, Scout)
    base = table.model.removesuffix(UNTRAINED)
    trimmed = folder.parents[1] / "models" / f"{base}{TRIMMED}"
    is_cut = base != table.model and (trimmed / Origin.file).is_file()
    cut = load(trimmed, Origin).vocabulary if is_cut else None
    return without(table, cut.removed) if cut else table


def _scout(folder: Path, bases: Collection[str]) -> Scouted:
    """A scout's folder; a seed after its name belongs to a base model that is known without it."""
    table = read_scout(folder)
    name, seed = folder.name, table.provenance.seed
    base, seeded, ending = name.rpartition("-seed")
    if name in bases or not (seeded and ending.isdigit() and base in bases):
        base = name
    elif seed is None:
        seed = int(ending)
    file = folder / "model" / Training.file
    training = load(file, Training) if file.is_file() else None
    return Scouted(name, base, seed, table, training, _read_choice(folder, table).get(CHOSEN))


def _read_choice(folder: Path, table: Profile | Scout) -> dict[str, int]:
    """``choice.json``, which the user may have edited; empty where there is none.

    That of a profile is chosen again where it was made from another profile.
    """
    file = folder / CHOICE
    content = read_json(file) if file.exists() else {}
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}", 'write depths by name, such as {"small": 7}')
    if isinstance(table, Scout):
        content = {name: depth for name, depth in content.items() if name == CHOSEN}
    elif content.pop(CHOSEN_FROM, None) not in (None, losses_fingerprint(table)):
        return choose(table) if table.can_choose else {}
    for name, depth in content.items():
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= table.depth:
            raise DataError(file, f"{depth!r} is not a depth", f"write a whole number, 1 to {table.depth}", field=name)
    return content


# The journal ----------------------------------------------------------------------------------------------------------


def read_journal(run: Path) -> list[dict[str, Any]]:
    """The entries of ``steps.jsonl``, one for each start and each end of a step, oldest first; none without a file.

    Raises:
        DataError: A line is broken; the last one may be, of a study that was killed or is writing it.
    """
    file = run / JOURNAL
    lines = complete_lines(file.read_bytes()).splitlines() if file.is_file() else []
    entries = []
    for number, line in enumerate(lines, 1):
        entry = _parsed(line)
        known = isinstance(entry, dict) and entry.get("outcome") in ("started", "done", "failed")
        if not known or not isinstance(entry.get("step"), str):
            raise DataError(file, "is no entry of a study's journal", "mend the line, or take it out", line=number)
        seconds = entry.get("seconds")
        timed = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        texts = {"error": str(entry.get("error", ""))} if entry["outcome"] == "failed" else {}
        entries.append(entry | texts | {"seconds": seconds if timed else None})
    return entries


def complete_lines(content: bytes) -> bytes:
    """A journal without its last line where that was cut off."""
    whole = content[: content.rfind(b"\n") + 1]
    start = whole[:-1].rfind(b"\n") + 1
    return whole if _parsed(whole[start:]) is not None else whole[:start]


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # of a byte that is no UTF-8, too
        return None
