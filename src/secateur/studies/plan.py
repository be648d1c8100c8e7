"""What a study will do, as plain data: :func:`plan_steps` is a pure function of what is known so far.

By default one training of several depths, the scout, is scored at each of them, and the depth that its scores choose is
cut out of it and trained on (polished). Where the user names depths, each is trained by itself: models × depths ×
recipes × seeds.

What a profile or a scout tells is not known before it is there: until then ``(chosen)`` or the like stands for it, in
steps that depend on that one. The plan is made anew after each step.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.choosing.budgets import choose_rung
from secateur.choosing.choose import CHOSEN, blocks_to_keep
from secateur.choosing.selectors import layers_of
from secateur.errors import ConfigError, SecateurError
from secateur.healing.recipes import TrainingConfig
from secateur.models import is_endpoint, model_label
from secateur.options import (
    Budget,
    CostOptions,
    HealOptions,
    HealSettings,
    StudyOptions,
    command_options,
    default_of,
)
from secateur.reporting.run import BASELINE, POLISHED, SCOUTED, TRIMMED, UNTRAINED
from secateur.results import Costs, Profile, Scout
from secateur.scouting.scout import ladder, step_cost
from secateur.studies.steps import COMMANDS, LAST, MODELS, Base, Blocks, Plan, Step, cuts_of, layers_option

SCOUTS = "scouts"
NO_TRAINING = "none"
ITSELF = "self"
"""As a teacher: the whole model, of which the cut ones are parts."""
BY_TASKS = "best-task"
"""As a depth: what the scores of the tasks at every depth choose."""

SCOUT_SHARE = 0.25
"""Of a study's steps, each of which costs what a step of the full depth costs, the scout's; the polish has the rest."""

_SCOUTED = ("ladder", "polish", "layers", "held_out", *Budget.model_fields)
"""Options of a study with a scout."""
_DECIDED: dict[str, Any] = {"model": "-", "data": ["-"], "columns": None, "out": "-", "seed": 42}
"""Options of a training that the study decides, until it has."""


def plan_steps(
    study: StudyOptions,
    bases: Sequence[Base],
    profiles: Mapping[str, Profile],
    scouts: Mapping[str, Scout],
    failed: Collection[str] = (),
    finished: Collection[Path] = (),
) -> Plan:
    """The plan of a study that begins with the models ``bases``.

    ``profiles`` are by base, ``scouts`` by name (:func:`first_scout`), of those that are there. Models whose steps
    ``failed`` are not counted and timed with the others; the folders ``finished`` are timed, even if only an earlier
    choice asks for them.

    Raises:
        ConfigError: A depth, a recipe, a seed or a baseline is not valid, or an option has no effect.
        IllegalDepth: A model cannot be cut so.
    """
    _check_options(study)
    plan, recipes = Plan(), recipe_options(study)
    planners = [_Planner(plan, study, recipes, base, study.tasks) for base in bases]
    for planner, base in zip(planners, bases, strict=True):
        if study.depths:
            planner.add_grid(profiles.get(base.name))
        else:
            planner.add_scouted(scouts.get(first_scout(study, base)))
    made = {step.output.name for step in plan.models}
    for model in study.baselines:  # to compare with: the study only opens them
        if (name := model_label(model)) in made:
            raise ConfigError("baselines", model, f"{name} is a model of the study", "rename the folder")
        planners[0].add_scores(name, 0, model=model)
    lost = {*failed, *plan.failed}
    lost |= plan.blocked(lost)
    left = [step for step in plan.models if step.name not in lost]
    if left:  # all models in one step, the last and alone: times are compared under the same conditions
        earlier = [folder for folder in finished if not (folder.name in made or folder.name.endswith(".partial"))]
        timed = [str(folder) for folder in (*(step.output for step in left), *earlier)]
        timed += [m for m in study.baselines if not (is_endpoint(m) or f"evaluate {model_label(m)}" in lost)]
        options = command_options(CostOptions, {"models": timed, "out": study.out})
        needed = tuple(step.name for step in plan.steps if step.name not in lost)
        plan.steps.append(Step("cost all", "cost", options, study.out / Costs.file, needed))
    return plan


def _check_options(study: StudyOptions) -> None:
    """Refuse options that would have no effect: of a scout where depths are named, of named depths where none is."""
    if CHOSEN in study.depths:
        raise ConfigError("depths", CHOSEN, f"{CHOSEN} is what a scout chooses", "leave out depths")
    if not study.depths and study.recipes != default_of(StudyOptions, "recipes"):
        problem, hint = "are trained at the depths that are named, and none is", "name depths, or set heal's options"
        raise ConfigError("recipes", study.recipes, problem, hint)
    for name in _SCOUTED if study.depths else ():
        if (given := getattr(study, name)) != default_of(StudyOptions, name):
            problem = f"is for a scout, but depths names those to train: {', '.join(study.depths)}"
            raise ConfigError(name, given, problem, f"leave out depths, or {name}")


def recipe_options(study: StudyOptions) -> dict[str, HealOptions]:
    """Recipe → the options of its training, but for those that the study decides. ``none`` has none.

    Raises:
        ConfigError: A name cannot be part of a folder's, or a setting is not valid.
    """
    common = {name: getattr(study, name) for name in (*HealSettings.model_fields, "teacher")}
    recipes: dict[str, HealOptions] = {}
    for name, own in study.recipes.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError("recipes", name, f"{name!r} is no name", "small letters, digits and _")
        if name == NO_TRAINING and own:
            raise ConfigError("recipes", own, "none has no settings", "name the recipe otherwise")
        if name in (TRIMMED, SCOUTED, POLISHED, BASELINE):
            raise ConfigError(
                "recipes", name, f"{name} is what a study calls other models", "name the recipe otherwise"
            )
        for decided in sorted(_DECIDED.keys() & own.keys()):
            raise ConfigError(f"recipes.{name}.{decided}", own, "is the study's to say", "leave it out")
        try:
            recipes[name] = command_options(HealOptions, common | own | _DECIDED)
        except ConfigError as error:
            raise error.of(f"recipes.{name}.{error.key}") from None
    return recipes


def first_scout(study: StudyOptions, base: Base) -> str:
    """The folder in ``RUN/scouts`` of the scout whose scores choose; there is one for each seed."""
    return base.name + next(iter(_suffixes(study).values()))


def _suffixes(study: StudyOptions) -> dict[int, str]:
    """Seed → how names tell it: not at all where there is one."""
    return {seed: f"-seed{seed}" if len(study.seeds) > 1 else "" for seed in study.seeds or [study.seed]}


@dataclass
class _Planner:
    """Adds to a plan what a study does with one of its models.

    ``tasks`` score what is made of it; ``held_out`` is the scout that writes them, where they are rows of the data.
    """

    plan: Plan
    study: StudyOptions
    recipes: Mapping[str, HealOptions]
    base: Base
    tasks: Sequence[str]
    held_out: tuple[str, ...] = ()

    # What both kinds of studies have ----------------------------------------------------------------------------------

    def add(self, kind: str, name: str, depth: int, *depends_on: str, title: str = "", **options: Any) -> str:
        """Add a step that makes or measures ``name``, of so many layers, and give the step's name.

        ``title`` stands in that for the command.
        """
        step, output = f"{title or kind} {name}", options["out"] / LAST.get(kind, "")
        needed, made = tuple(dict.fromkeys(depends_on)), command_options(COMMANDS[kind], options)
        self.plan.steps.append(Step(step, kind, made, output, needed, self.base, depth))
        return step

    @property
    def whole(self) -> str:
        """The model as it came, which all others are cut from."""
        return f"{self.base.name}-{self.base.depth}-{UNTRAINED}"

    def folder(self, name: str) -> Path:
        return self.study.out / MODELS / name

    def add_untrained(self) -> dict[str, str]:
        """The model as it came and, where vocabularies are cut, the same with fewer tokens; each with its step."""
        base, folder = self.base, self.folder(self.whole)
        cut: dict[str, Any] = {"model": base.model, "pooling": self.study.pooling, "to": str(base.depth)}
        made = {self.whole: self.add("prune", self.whole, base.depth, **cut, out=folder)}
        if self.study.cuts_vocabulary:
            name = f"{base.name}-{base.depth}-{TRIMMED}"
            made[name] = self._trim(name, base.depth, folder, made[self.whole])
        return made

    def _trim(self, name: str, depth: int, folder: Path, *depends_on: str) -> str:
        """Cut the vocabulary of a finished model, from its folder into ``RUN/models``; gives the step.

        It comes last: a model that is trained with fewer tokens loses more (docs/explanation/results.md).
        """
        study = self.study
        cut: dict[str, Any] = {"model": str(folder), "vocab": study.vocab or study.data, "columns": study.columns}
        cut |= {"vocab_size": study.vocab_size, "vocab_coverage": study.vocab_coverage}
        cut |= {"vocab_tasks": [task for task in study.tasks if Path(task).is_dir()]}
        return self.add("prune", name, depth, *depends_on, title="trim", **cut, out=self.folder(name))

    def add_profile(self, *depends_on: str, scored: bool) -> str:
        """The profile of the model as it came; it scores the tasks, too. Gives the step."""
        study, base = self.study, self.base
        out, model = study.out / "profiles" / base.name, str(self.folder(self.whole))
        options: dict[str, Any] = {"model": model, "data": study.data, "columns": study.columns}
        options |= {"max_examples": study.max_examples, "seed": study.seed, "out": out}
        options |= {"scale": study.profile_scale, "dtype": study.profile_dtype}
        options |= {"tasks": study.tasks, "sample": study.sample} if scored and study.tasks else {}
        return self.add("profile", base.name, base.depth, *depends_on, **options)

    def add_scores(self, name: str, depth: int, *depends_on: str, model: str | None = None) -> None:
        """The scores of a model, if there are tasks: of one in ``RUN/models``, or of the one that is named."""
        if not self.tasks:
            return
        # By its name, wherever the run folder lies: the scores are of this study's model.
        options: dict[str, Any] = {"models": [model or str(self.folder(name))], "names": [name], "tasks": self.tasks}
        options |= {"sample": self.study.sample, "seed": self.study.seed}
        options["cache"] = self.study.cache or self.study.out / "cache"
        self.add("evaluate", name, depth, *depends_on, *self.held_out, **options, out=self.study.out / "scores" / name)

    def add_model(
        self, kind: str, name: str, depth: int, aside: str, *depends_on: str, **options: Any
    ) -> tuple[Path, str]:
        """A model of ``RUN/models``, cut or trained, and its scores.

        Where vocabularies are cut, it is made with all tokens first, in the folder ``aside``. Gives the folder of the
        model with all its tokens, to train on, and the step that makes it.
        """
        trims = self.study.cuts_vocabulary
        folder = self.study.out / aside if trims else self.folder(name)
        step = self.add(kind, name, depth, *depends_on, **options, out=folder)
        self.add_scores(name, depth, self._trim(name, depth, folder, step) if trims else step)
        return folder, step

    def settings(self, training: HealOptions) -> dict[str, Any]:
        """What a training is told beside its model and seed."""
        settings = {key: value for key, value in training.given().items() if key not in _DECIDED}
        if "teacher" in settings:  # its vectors are the same at all depths, and with all seeds
            settings = {"cache": self.study.cache or self.study.out / "cache", **settings}
        if settings.get("teacher") == ITSELF:
            settings["teacher"] = str(self.folder(self.whole))
        return {"data": self.study.data, "columns": self.study.columns, **settings}

    # Named depths, each trained by itself -----------------------------------------------------------------------------

    def add_grid(self, profile: Profile | None) -> None:
        """The model as it came, its profile, and every depth with every recipe and seed."""
        study, base = self.study, self.base
        start, untrained = self.folder(self.whole), self.add_untrained()
        for name, step in untrained.items():
            self.add_scores(name, base.depth, step)
        begun = untrained[self.whole]
        measured = self.add_profile(begun, scored=study.depth_scores or BY_TASKS in study.depths)
        self._add_trainings(f"{base.name}-{base.depth}", base.depth, start, begun)
        state = TRIMMED if study.cuts_vocabulary else UNTRAINED
        for label, blocks, problem in cuts_of(study.depths, base.depth, profile):
            name, depth = f"{base.name}-{label}", len(blocks) if blocks else base.depth
            needed = [begun] if blocks else [begun, measured]
            cut, folder = {"model": str(start), **layers_option(blocks)}, study.out / "pruned" / name
            if NO_TRAINING in self.recipes:
                folder, step = self.add_model("prune", f"{name}-{state}", depth, f"pruned/{name}", *needed, **cut)
            else:
                step = self.add("prune", name, depth, *needed, **cut, out=folder)
            self.plan.failed |= {step: problem} if problem else {}
            self._add_trainings(name, depth, folder, step)

    def _add_trainings(self, stem: str, depth: int, folder: Path, begun: str) -> None:
        """Train the model in a folder with every recipe and seed."""
        for recipe, training in self.recipes.items():
            itself = training.teacher == ITSELF and folder == self.folder(self.whole)
            if recipe == NO_TRAINING or itself:  # the whole learns nothing from itself
                continue
            given = {"model": str(folder), **self.settings(training)}
            for seed, suffix in _suffixes(self.study).items():
                name = f"{stem}-{recipe}{suffix}"
                self.add_model("heal", name, depth, f"trained/{name}", begun, **given, seed=seed)

    # A scout, and what is cut out of it -------------------------------------------------------------------------------

    def add_scouted(self, scout: Scout | None) -> None:
        """The model as it came, its profile, its scouts, and what is cut from these, polished.

        ``scout`` is what the first seed's scout found, if it is there.
        """
        study, base = self.study, self.base
        for depth in (*study.ladder, *study.polish):
            blocks_to_keep(depth, base.depth)
        untrained = self.add_untrained()
        self.add_profile(untrained[self.whole], scored=study.depth_scores)
        (training,) = self.recipes.values()
        settings = self.settings(training)
        self._add_scouts(settings, untrained.values(), scout)
        for name, step in untrained.items():
            self.add_scores(name, base.depth, step)
        settings.pop("layers", None)  # what is polished has one depth
        settings["exclude"] = self.excluded
        cuts = self._scouted_cuts(scout)
        for seed in _suffixes(study):
            self._add_cut(settings, seed, tuple(range(base.depth)), polishes=base.depth in study.polish or not cuts)
            for blocks, problem in cuts:
                self._add_cut(settings, seed, blocks, problem)

    def _add_scouts(self, settings: Mapping[str, Any], begun: Collection[str], scout: Scout | None) -> None:
        """A scout for each seed; without tasks, the rows that the first one holds out score all models.

        They begin when the whole model with a cut vocabulary is there, too: it tells what the depths will cost.
        """
        study, depth = self.study, self.base.depth
        own = {"model": str(self.folder(self.whole)), "depths": study.ladder or None, "steps": self._steps[0]}
        own |= {"sample": study.sample, "held_out": study.held_out}
        for seed, suffix in _suffixes(study).items():
            name, out = self.base.name + suffix, study.out / SCOUTS / (self.base.name + suffix)
            given = {**settings, **own, "tasks": self.tasks, "exclude": self.excluded, "seed": seed, "out": out}
            step = self.add("scout", name, depth, *begun, *self.held_out, **given)
            if not self.tasks:
                names = dict.fromkeys(row.task for row in scout.task_scores) if scout else [""]
                self.tasks, self.held_out = [str(out / "tasks" / task) for task in names], (step,)

    @property
    def excluded(self) -> Sequence[str]:
        """Tasks of rows of the data, which nothing is trained on."""
        return self.tasks if self.held_out else []

    @property
    def which(self) -> str:
        """The selector that says which layers a depth of a scout has."""
        return self.study.layers or "first"

    @property
    def _steps(self) -> tuple[int, int]:
        """Of the scout, and of the polish at full depth."""
        study, depth = self.study, self.base.depth
        budget = study.steps or TrainingConfig.steps
        share = max(1, round(SCOUT_SHARE * budget))
        rungs = study.ladder or ladder(depth, range(1, depth + 1), self.which)
        return max(1, round(share / step_cost(self.which, rungs, depth))), budget - share

    def _scouted_cuts(self, scout: Scout | None) -> list[tuple[Blocks | None, str]]:
        """The cuts below the full depth, and why one cannot be told; none where the full depth is chosen."""
        depth = self.base.depth
        if self.study.polish:
            smaller = sorted({*self.study.polish} - {depth}, reverse=True)
            return [(layers_of(self.which, polished, depth), "") for polished in smaller]
        if scout is None:
            return [(None, "")]
        try:
            blocks = choose_rung(self.study, scout).blocks
        except SecateurError as error:
            return [(None, str(error))]
        return [(blocks, "")] if len(blocks) < depth else []

    def _add_cut(
        self, settings: Mapping[str, Any], seed: int, blocks: Blocks | None, problem: str = "", *, polishes: bool = True
    ) -> None:
        """A depth of a seed's scout as a model, and polished: the steps cost what the scout left of the budget."""
        base, suffix = self.base, _suffixes(self.study)[seed]
        depth, scout = len(blocks) if blocks else base.depth, base.name + suffix
        stem = f"{base.name}-{len(blocks) if blocks else f'({CHOSEN})'}"
        needed = [f"scout {scout}"] if blocks else [f"scout {scout}", f"scout {first_scout(self.study, base)}"]
        cut = {"model": str(self.study.out / SCOUTS / scout / "model"), **layers_option(blocks)}
        name = f"{stem}-{SCOUTED}{suffix}"
        folder, step = self.add_model("prune", name, depth, f"pruned/{stem}{suffix}", *needed, **cut)
        self.plan.failed |= {step: problem} if problem else {}
        if polishes:
            name, steps = f"{stem}-{POLISHED}{suffix}", max(1, round(self._steps[1] * base.depth / depth))
            given = {"model": str(folder), **settings, "steps": steps, "seed": seed}
            self.add_model("heal", name, depth, f"trained/{name}", step, **given)
