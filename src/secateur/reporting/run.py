"""A run folder as plain data: its models, and the tables that the steps of a study left there.

Folders tell what they hold: ``<base>-<blocks>-<state>``, where the state is ``zero-shot`` or a recipe, after the way of
choosing where the blocks are not the first ones, and before the seed where there are several: ``smollm2-7-healed``,
``smollm2-7-uniform-healed-seed2``. What a model's own tables say (its blocks, its seed) goes before its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.choosing.choose import CHOSEN_FROM, choose, losses_fingerprint
from secateur.errors import DataError
from secateur.files import read_json
from secateur.reporting.journal import failures
from secateur.results import CostRow, Costs, Origin, Profile, ScoreRow, Scores, Table, Training, load

UNTRAINED = "zero-shot"

_NAME = re.compile(r"(?P<base>.+)-(?P<depth>\d+)-(?P<state>[a-z].*)", re.DOTALL)
_STATE = re.compile(rf"(?:(?P<way>.+?)-)??(?P<recipe>{UNTRAINED}|[^-]+?)(?:-seed(?P<seed>\d+))?", re.DOTALL)


@dataclass(frozen=True)
class Variant:
    """One model of a run, with what the run knows of it.

    ``base`` is the first part of its name, ``depth`` how many blocks it holds of ``blocks``, ``way`` how they were
    chosen (empty: the first ones), ``recipe`` what was done besides the cut (``zero-shot``, ``healed``), ``seed`` that
    of its training. ``scores`` are by task; ``results`` tells in which folder each was found.
    """

    name: str
    base: str
    depth: int | None
    blocks: int | None
    way: str
    recipe: str
    seed: int | None
    folder: Path | None
    origin: Origin | None
    training: Training | None
    cost: CostRow | None
    scores: Mapping[str, ScoreRow]
    results: Mapping[str, Path]

    @property
    def state(self) -> str:
        """How its blocks were chosen and what was done to it, as it stands in names."""
        return "-".join(part for part in (self.way, self.recipe) if part)

    @property
    def series(self) -> str:
        """The variants it is drawn and listed with."""
        chosen = f"by {self.chooser}" if self.way else ""
        return ", ".join(part for part in (self.base, self.recipe, chosen) if part)

    @property
    def chooser(self) -> str:
        """The way its blocks were chosen, as ``choose`` spells it."""
        return self.way.replace("_", "-")

    @property
    def is_full(self) -> bool:
        """Whether it has all blocks of its base model."""
        return self.depth is not None and self.depth == self.blocks

    @property
    def average(self) -> float | None:
        """Mean score over its tasks; None where it has no tasks, or one without a number."""
        values = [row.score for row in self.scores.values()]
        # A score that was not finite is null in its file.
        return None if not values or None in values else sum(values) / len(values)


@dataclass(frozen=True)
class Run:
    """What a run folder holds. ``profiles`` and ``choices`` (name of a choice → depth) are by base model.

    ``failed`` are the steps of its study that failed, with the reason, and were not done since.
    """

    folder: Path
    study: str
    profiles: Mapping[str, Profile]
    choices: Mapping[str, Mapping[str, int]]
    variants: tuple[Variant, ...]
    scores: tuple[Scores, ...]
    costs: Costs | None
    failed: Mapping[str, str]

    @property
    def tables(self) -> list[tuple[str, Table]]:
        """Every table with a title, in the order of the work."""
        named: list[tuple[str, Table]] = [(f"profile of {name}", table) for name, table in self.profiles.items()]
        for variant in self.variants:
            named += [(f"model {variant.name}", variant.origin)] if variant.origin else []
            named += [(f"training of {variant.name}", variant.training)] if variant.training else []
        for table in self.scores:
            named.append((f"scores of {', '.join(dict.fromkeys(row.model for row in table.rows))}", table))
        return named + ([("costs", self.costs)] if self.costs else [])


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
    if not (profiles or scores or costs or models):
        raise DataError(
            folder,
            "holds no profile, model, scores or costs",
            "name the folder that a study wrote, with profiles/, models/, scores/ or costs.json in it",
        )
    choices = {name: _choice(folder / "profiles" / name, table) for name, table in profiles.items()}
    study = folder / "study.yaml"
    return Run(
        folder=folder,
        study=study.read_text(encoding="utf-8", errors="replace") if study.is_file() else "",
        profiles=profiles,
        choices={name: choice for name, choice in choices.items() if choice},
        variants=_variants(models, scores, costs, profiles),
        scores=tuple(scores.values()),
        costs=costs,
        failed=failures(folder),
    )


def _choice(folder: Path, profile: Profile) -> dict[str, int]:
    file = folder / "choice.json"
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}", 'write depths by name, such as {"small": 7}')
    if content.pop(CHOSEN_FROM, None) not in (None, losses_fingerprint(profile)):  # of another profile than this one
        return choose(profile) if profile.can_choose else {}
    for name, depth in content.items():
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= profile.depth:
            hint = f"write a whole number, 1 to {profile.depth}"
            raise DataError(file, f"{depth!r} is not a depth", hint, field=name)
    return content


def _variants(
    models: Mapping[str, Path], scores: Mapping[Path, Scores], costs: Costs | None, profiles: Mapping[str, Profile]
) -> tuple[Variant, ...]:
    scored: dict[str, dict[str, tuple[ScoreRow, Path]]] = {}
    for folder, row in ((folder, row) for folder, table in scores.items() for row in table.rows):
        if row.task in scored.setdefault(row.model, {}):
            raise DataError("scores", f"two scores of {row.model} on {row.task}", "keep one of the two files")
        scored[row.model][row.task] = row, folder
    cost = {row.model: row for row in costs.rows} if costs else {}
    names: Iterable[str] = dict.fromkeys([*models, *scored, *cost])
    found = [_variant(name, models.get(name), cost.get(name), scored.get(name, {}), profiles) for name in names]
    return tuple(
        sorted(found, key=lambda v: (v.base, v.way != "", v.recipe, v.way, -(v.depth or 0), v.seed or 0, v.name))
    )


def _variant(
    name: str,
    folder: Path | None,
    cost: CostRow | None,
    scores: Mapping[str, tuple[ScoreRow, Path]],
    profiles: Mapping[str, Profile],
) -> Variant:
    origin = load(folder, Origin) if folder else None
    training = load(folder, Training) if folder and (folder / Training.file).exists() else None
    parts = _NAME.fullmatch(name)
    state = _STATE.fullmatch(parts["state"]) if parts else None
    base = parts["base"] if parts else name
    profile = profiles.get(base)
    named_depth = int(parts["depth"]) if parts else None
    named_seed = int(state["seed"]) if state and state["seed"] else None
    return Variant(
        name=name,
        base=base,
        depth=len(origin.kept) if origin else cost.depth if cost else named_depth,
        blocks=origin.depth if origin else profile.depth if profile else None,
        way=(state["way"] or "") if state else "",
        recipe=state["recipe"] if state else parts["state"] if parts else "",
        seed=training.provenance.seed if training and training.provenance.seed is not None else named_seed,
        folder=folder,
        origin=origin,
        training=training,
        cost=cost,
        scores={task: row for task, (row, _) in scores.items()},
        results={task: place for task, (_, place) in scores.items()},
    )
