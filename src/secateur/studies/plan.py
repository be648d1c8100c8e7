"""What a study will do, as plain data: :func:`plan_steps` is a pure function of what is known so far.

By default one training of several depths, the scout, is scored at each of them, and the depth that its scores choose is
cut out of it and trained on (polished). Where the user names depths, each is trained by itself: models × depths ×
recipes × seeds.

What a profile or a scout tells is not known before it is there: until then the steps that wait for it stand in the plan
without a command, and the plan made anew afterwards has them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.choosing.choose import CHOSEN, blocks_to_keep
from secateur.choosing.evidence import choose_rung
from secateur.choosing.selectors import layers_of
from secateur.errors import ConfigError, SecateurError
from secateur.healing.recipes import TrainingConfig
from secateur.models import is_endpoint, model_label
from secateur.options import CostOptions, HealOptions, StudyOptions
from secateur.reporting.run import BASELINE, POLISHED, SCOUTED, TRIMMED, UNTRAINED
from secateur.results import Costs, Profile, Scout
from secateur.scouting.scout import ladder, step_cost
from secateur.studies.settings import DECIDED, ITSELF, check_options, recipe_options
from secateur.studies.steps import (
    FULL,
    MODELS,
    NO_TRAINING,
    PRUNED,
    TRAINED,
    Base,
    Plan,
    Step,
    Variant,
    command_options,
    cuts_of,
)

SCOUTS = "scouts"
BY_TASKS = "best-task"
"""As a depth: what the scores of the tasks at every depth choose."""

SCOUT_SHARE = 0.25
"""Of a study's steps, each of which costs what a step of the full depth costs, the scout's; the polish has the rest."""


def plan_steps(
    study: StudyOptions,
    bases: Sequence[Base],
    profiles: Mapping[str, Profile],
    scouts: Mapping[str, Scout],
    failed: Collection[str] = (),
) -> Plan:
    """The plan of a study.

    Args:
        study: Its options.
        bases: The models to begin with.
        profiles: Base → its profile, of those that are there.
        scouts: Name of a scout (:func:`scout_names`) → what it found, of those that are there.
        failed: Names of steps that failed: their models are not counted and timed with the others.

    Raises:
        ConfigError: A depth, a recipe, a seed or a baseline is not valid, or an option has no effect.
        IllegalDepth: A model cannot be cut so.
    """
    check_options(study)
    plan, recipes = Plan(), recipe_options(study)
    planners = [_Planner(plan, study, recipes, base, study.tasks) for base in bases]
    for planner, base in zip(planners, bases, strict=True):
        if study.depths:
            planner.add_grid(profiles.get(base.name))
        else:
            planner.add_scouted(scouts.get(scout_names(study, base)[0]))
    made = {variant.name for _, variant in plan.models}
    for model in study.baselines:  # to compare with: the study only opens them
        if (name := model_label(model)) in made:
            raise ConfigError("baselines", model, f"{name} is a model of the study", "rename the folder")
        planners[0].add_scores(Variant(name, Base(name, model, 0), (), (), BASELINE), None)
    lost = {*failed, *plan.failed}
    lost |= plan.blocked(lost)
    left = [step for step, _ in plan.models if step.name not in lost]
    if left:  # all models in one step: times are compared under the same conditions
        timed = [str(step.output) for step in left]
        timed += [m for m in study.baselines if not (is_endpoint(m) or f"evaluate {model_label(m)}" in lost)]
        options = command_options(CostOptions, {"models": timed, "out": study.out})
        needed, known = tuple(step.name for step in left), all(step.known for step in left)
        plan.steps.append(Step("cost all", "cost", options, study.out / Costs.file, needed, known=known))
    return plan


def scout_names(study: StudyOptions, base: Base) -> list[str]:
    """The folders of a model's scouts in ``RUN/scouts``, one for each seed; the first one's scores choose."""
    return [base.name + suffix for suffix in _suffixes(study).values()]


def _suffixes(study: StudyOptions) -> dict[int, str]:
    """Seed → how names tell it: not at all where there is one."""
    return {seed: f"-seed{seed}" if len(study.seeds) > 1 else "" for seed in study.seeds or [study.seed]}


def chosen_layers(study: StudyOptions, scout: Scout) -> tuple[int, ...]:
    """The layers that a scout's scores choose, within the study's budget.

    Raises:
        ConfigError: No depth is within it.
        DataError: The scout does not tell what it asks.
    """
    return choose_rung(study, scout).blocks


@dataclass
class _Planner:
    """Adds to a plan what a study does with one of its models.

    ``tasks`` score what is made of it; ``told_by`` is the step that writes them yet, ``held_out`` whether one does, or
    did: they hold rows of the data.
    """

    plan: Plan
    study: StudyOptions
    recipes: Mapping[str, HealOptions]
    base: Base
    tasks: Sequence[str]
    told_by: str | None = None
    held_out: bool = False

    def folder(self, variant: Variant) -> Path:
        return self.study.out / MODELS / variant.name

    # What both kinds of studies have ----------------------------------------------------------------------------------

    def add_untrained(self) -> list[tuple[Variant, str]]:
        """The model as it came, which all others are cut from, and its step; the same with a cut vocabulary follows."""
        base = self.base
        whole = Variant(f"{base.name}-{base.depth}-{UNTRAINED}", base, FULL, tuple(range(base.depth)))
        cut: dict[str, Any] = {"model": base.model, "pooling": self.study.pooling, **whole.layers}
        came = self.plan.add("prune", whole, **cut, out=self.folder(whole))
        if not self.study.cuts_vocabulary:
            return [(whole, came)]
        trimmed = replace(whole, name=f"{base.name}-{base.depth}-{TRIMMED}")
        return [(whole, came), (trimmed, self._trim(trimmed, self.folder(whole), came))]

    def _trim(self, variant: Variant, folder: Path, *depends_on: str, told_by: str | None = None) -> str:
        """Cut the vocabulary of a finished model, from its folder into ``RUN/models``; gives the step.

        It comes last: a model that is trained with fewer tokens loses more (docs/explanation/results.md).
        """
        study = self.study
        cut: dict[str, Any] = {"model": str(folder), "vocab": study.vocab or study.data, "columns": study.columns}
        cut |= {"vocab_size": study.vocab_size, "vocab_coverage": study.vocab_coverage}
        cut |= {"vocab_tasks": [task for task in study.tasks if Path(task).is_dir()]}
        out = self.folder(variant)
        return self.plan.add("prune", variant, *depends_on, told_by=told_by, title="trim", **cut, out=out)

    def add_profile(self, start: Variant, begun: str, *, scored: bool) -> None:
        """The profile of the model that all others are cut from; it scores the tasks, too."""
        study = self.study
        options: dict[str, Any] = {"model": str(self.folder(start)), "data": study.data, "columns": study.columns}
        options |= {"max_examples": study.max_examples, "seed": study.seed}
        options |= {"scale": study.profile_scale, "dtype": study.profile_dtype}
        options |= {"tasks": study.tasks, "sample": study.sample} if scored and study.tasks else {}
        self.plan.add("profile", start, begun, **options, out=study.out / "profiles" / self.base.name)

    def add_scores(self, variant: Variant, step: str | None, told_by: str | None = None) -> None:
        """The scores of a model, if there are tasks: of one that ``step`` makes, or of a baseline."""
        if not self.tasks:
            return
        model = variant.base.model if step is None else str(self.folder(variant))
        # By its name, wherever the run folder lies: the scores are of this study's model.
        options: dict[str, Any] = {"models": [model], "names": [variant.name], "tasks": self.tasks}
        options |= {"sample": self.study.sample, "seed": self.study.seed, "cache": self.cache}
        needed, out = () if step is None else (step,), self.study.out / "scores" / variant.name
        self.plan.add("evaluate", variant, *needed, told_by=told_by or self.told_by, **options, out=out)

    def add_cut(
        self, bare: Variant, kept: Variant | None, *depends_on: str, told_by: str | None, problem: str, **source: Any
    ) -> tuple[Path, str]:
        """A model with fewer layers and all its tokens, to train on: its folder, and the step that makes it.

        ``kept`` is the same as a model of ``RUN/models`` that is scored, if it is one; ``problem`` says why it cannot
        be made.
        """
        trims = self.study.cuts_vocabulary
        made, folder = bare, self.study.out / PRUNED / bare.name
        if kept is not None and not trims:
            made, folder = kept, self.folder(kept)
        step = self.plan.add("prune", made, *depends_on, told_by=told_by, **source, out=folder)
        if problem:
            self.plan.failed[step] = problem
        if kept is not None:
            last = self._trim(kept, folder, step, told_by=told_by) if trims else step
            self.add_scores(kept, last, told_by)
        return folder, step

    def add_training(self, trained: Variant, *depends_on: str, told_by: str | None, **options: Any) -> None:
        """A trained model of ``RUN/models``, and its scores."""
        trims = self.study.cuts_vocabulary
        folder = self.study.out / TRAINED / trained.name if trims else self.folder(trained)
        step = self.plan.add("heal", trained, *depends_on, told_by=told_by, **options, out=folder)
        last = self._trim(trained, folder, step, told_by=told_by) if trims else step
        self.add_scores(trained, last, told_by)

    @property
    def cache(self) -> Path:
        """The folder that keeps vectors."""
        return self.study.cache or self.study.out / "cache"

    def settings(self, training: HealOptions) -> dict[str, Any]:
        """What a training is told beside its model and seed."""
        settings = {key: value for key, value in training.given().items() if key not in DECIDED}
        if "teacher" in settings:  # its vectors are the same at all depths, and with all seeds
            settings = {"cache": self.cache, **settings}
        if settings.get("teacher") == ITSELF:
            settings["teacher"] = str(self.study.out / MODELS / f"{self.base.name}-{self.base.depth}-{UNTRAINED}")
        return {"data": self.study.data, "columns": self.study.columns, **settings}

    # Named depths, each trained by itself -----------------------------------------------------------------------------

    def add_grid(self, profile: Profile | None) -> None:
        """The model as it came, its profile, and every depth with every recipe and seed."""
        study, base = self.study, self.base
        untrained = self.add_untrained()
        for variant, step in untrained:
            self.add_scores(variant, step)
        start, begun = untrained[0]
        self.add_profile(start, begun, scored=study.depth_scores or BY_TASKS in study.depths)
        self._add_trainings(replace(start, name=f"{base.name}-{base.depth}"), self.folder(start), begun)
        state = TRIMMED if study.cuts_vocabulary else UNTRAINED
        for variant, problem in cuts_of(study.depths, base, profile):
            told_by = None if variant.blocks is not None else f"profile {base.name}"
            source: dict[str, Any] = {"model": str(self.folder(start)), **variant.layers}
            kept = replace(variant, name=f"{variant.name}-{state}") if NO_TRAINING in self.recipes else None
            folder, pruned = self.add_cut(variant, kept, begun, told_by=told_by, problem=problem, **source)
            self._add_trainings(variant, folder, pruned, told_by)

    def _add_trainings(self, variant: Variant, folder: Path, pruned: str, told_by: str | None = None) -> None:
        """Train the model in a folder, which the step ``pruned`` makes, with every recipe and seed."""
        for recipe, training in self.recipes.items():
            if recipe == NO_TRAINING or (training.teacher == ITSELF and variant.specs == FULL):
                continue  # the whole learns nothing from itself
            given = {"model": str(folder), **self.settings(training)}
            for seed, suffix in _suffixes(self.study).items():
                trained = replace(variant, name=f"{variant.name}-{recipe}{suffix}", recipe=recipe, seed=seed)
                self.add_training(trained, pruned, told_by=told_by, **given, seed=seed)

    # A scout, and what is cut out of it -------------------------------------------------------------------------------

    def add_scouted(self, scout: Scout | None) -> None:
        """The model as it came, its profile, its scouts, and what is cut from these, polished.

        ``scout`` is what the first seed's scout found, if it is there.
        """
        study, base = self.study, self.base
        for depth in (*study.ladder, *study.polish):
            blocks_to_keep(depth, base.depth)
        untrained = self.add_untrained()
        self.add_profile(*untrained[0], scored=study.depth_scores)
        (training,) = self.recipes.values()
        settings = self.settings(training)
        self._add_scouts(settings, untrained[0][0], [step for _, step in untrained], scout)
        settings.pop("layers", None)  # what is polished has one depth
        for variant, step in untrained:
            self.add_scores(variant, step)
        if self.held_out:
            settings["exclude"] = self.tasks
        cuts = self._scouted_cuts(scout)
        whole, polishes = untrained[0][0], base.depth in study.polish or not cuts
        for seed in _suffixes(study):
            self._add_cut(settings, whole, seed, polishes=polishes)
            for cut, problem in cuts:
                self._add_cut(settings, cut, seed, problem)

    def _add_scouts(
        self, settings: Mapping[str, Any], start: Variant, begun: Sequence[str], scout: Scout | None
    ) -> None:
        """A scout for each seed; without tasks, the rows that the first one holds out score all models.

        They begin when the whole model with a cut vocabulary is there, too: it tells what the depths will cost.
        """
        study = self.study
        own: dict[str, Any] = {
            "model": str(self.folder(start)),
            "depths": study.ladder or None,
            "steps": self._steps[0],
        }
        own |= {"sample": study.sample, "held_out": study.held_out}
        for seed, suffix in _suffixes(study).items():
            variant = replace(start, name=self.base.name + suffix, recipe=SCOUTED, seed=seed)
            judge = {"tasks": self.tasks, "exclude": self.tasks if self.held_out else []}
            out = study.out / SCOUTS / variant.name
            given = {**settings, **own, **judge, "seed": seed}
            step = self.plan.add("scout", variant, *begun, told_by=self.told_by, **given, out=out)
            if not self.tasks:
                names = dict.fromkeys(row.task for row in scout.task_scores) if scout else [""]
                self.tasks = [str(out / "tasks" / name) for name in names]
                self.told_by, self.held_out = None if scout else step, True

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

    def _scouted_cuts(self, scout: Scout | None) -> list[tuple[Variant, str]]:
        """The cuts below the full depth, and why one cannot be told; none where the full depth is chosen."""
        base, polish = self.base, sorted({*self.study.polish} - {self.base.depth}, reverse=True)
        if self.study.polish:
            kept = {depth: layers_of(self.which, depth, base.depth) for depth in polish}
            return [(Variant("", base, (str(depth),), blocks), "") for depth, blocks in kept.items()]
        unknown = Variant("", base, (CHOSEN,), None)
        if scout is None:
            return [(unknown, "")]
        try:
            blocks = chosen_layers(self.study, scout)
        except SecateurError as error:
            return [(unknown, str(error))]
        return [(replace(unknown, blocks=blocks), "")] if len(blocks) < base.depth else []

    def _add_cut(
        self, settings: Mapping[str, Any], cut: Variant, seed: int, problem: str = "", *, polishes: bool = True
    ) -> None:
        """A depth of a seed's scout as a model, and polished: the steps cost what the scout left of the budget."""
        base, suffix = self.base, _suffixes(self.study)[seed]
        waits = None if cut.blocks is not None else f"scout {scout_names(self.study, base)[0]}"
        label = f"({cut.specs[0]})" if cut.blocks is None else cut.depth
        bare = replace(cut, name=f"{base.name}-{label}{suffix}", recipe=SCOUTED, seed=seed)
        scouted = replace(bare, name=f"{base.name}-{label}-{SCOUTED}{suffix}")
        source = self.study.out / SCOUTS / f"{base.name}{suffix}"
        taken = {"model": str(source / "model"), **cut.layers}
        made = self.add_cut(bare, scouted, f"scout {source.name}", told_by=waits, problem=problem, **taken)
        if polishes:
            polished = replace(bare, name=f"{base.name}-{label}-{POLISHED}{suffix}", recipe=POLISHED)
            steps = max(1, round(self._steps[1] * base.depth / cut.depth))
            given = {"model": str(made[0]), **settings, "steps": steps, "seed": seed}
            self.add_training(polished, made[1], told_by=waits or self.told_by, **given)
