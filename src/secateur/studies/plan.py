"""What a study will do, as plain data: :func:`plan_steps` is a pure function of what is known so far.

By default one training of several depths, the scout, is scored at each of them, and the depth that its scores choose is
cut out of it and trained on (polished). Where the user names depths, each is trained by itself (:mod:`.grid`).

What a profile or a scout tells is not known before it is there: until then the steps that wait for it stand in the plan
without a command, and the plan made anew afterwards has them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from secateur.choosing.choose import CHOSEN, blocks_to_keep
from secateur.choosing.evidence import choose_rung
from secateur.errors import ConfigError, SecateurError
from secateur.healing.recipes import TrainingConfig
from secateur.models import is_endpoint, model_label
from secateur.options import Budget, CostOptions, HealOptions, StudyOptions, default_of
from secateur.reporting.run import POLISHED, SCOUTED
from secateur.results import Costs, Profile, Scout
from secateur.studies.grid import add_grid, recipe_options, settings_of
from secateur.studies.steps import (
    FRONTIER,
    ITSELF,
    MODELS,
    Base,
    Plan,
    Step,
    Variant,
    add_baselines,
    add_profile,
    add_scores,
    add_trimmed,
    add_whole,
    command_options,
)

SCOUTS = "scouts"

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "paper": {  # the experiments of L3Prune, arXiv 2410.14578, sections 4 and 5; the data are left to the user
        "models": [
            "meta-llama/Meta-Llama-3-8B-Instruct",
            "mistralai/Mistral-7B-Instruct-v0.2",
            "Qwen/Qwen2-7B-Instruct",
            "microsoft/Phi-3-mini-4k-instruct",
        ],
        "depths": ["large", "small", "0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8"],
        "tasks": ["MTEB(eng, v1)"],
        "recipe": "l3prune",
        "gradient_checkpointing": True,
    },
    "shrink": {"teacher": ITSELF},
}
"""Options that a preset decides, where the user has not; the demo's come with its data."""


SCOUT_SHARE = 0.25
"""Of a study's steps, each of which costs what a step of the full depth costs, the scout's; the polish has the rest."""
_SCOUTED = ("ladder", "polish", "held_out", *Budget.model_fields)
"""Options of a study with a scout."""


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
    _check(study)
    recipes, plan, judge = recipe_options(study), Plan(), _Judge(study.tasks)
    for base in bases:
        if study.depths:
            add_grid(plan, study, recipes, base, profiles.get(base.name))
        else:
            (training,) = recipes.values()
            own = _add_scouted(plan, study, training, base, scouts.get(scout_names(study, base)[0]))
            judge = own if base == bases[0] else judge
    add_baselines(plan, study, judge.tasks, judge.told_by)
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


def _check(study: StudyOptions) -> None:
    """Refuse options that would have no effect.

    Raises:
        ConfigError: One of a scout where the depths are named, or one of named depths where they are not.
    """
    if CHOSEN in study.depths:
        raise ConfigError("depths", CHOSEN, f"{CHOSEN} is what a scout chooses", "leave out depths")
    names = _SCOUTED if study.depths else ("recipes",)
    for name in names:
        given = getattr(study, name)
        if given != default_of(StudyOptions, name):
            if study.depths:
                problem = f"is for a scout, but depths names those to train: {', '.join(study.depths)}"
                raise ConfigError(name, given, problem, f"leave out depths, or {name}")
            problem = "are trained at the depths that are named, and none is"
            raise ConfigError(name, given, problem, "name depths, or set the options of heal themselves")


def scout_names(study: StudyOptions, base: Base) -> list[str]:
    """The folders of a model's scouts in ``RUN/scouts``, one for each seed; the first one's scores choose."""
    return [base.name + suffix for suffix in _suffixes(study).values()]


def _suffixes(study: StudyOptions) -> dict[int, str]:
    """Seed → how names tell it: not at all where there is one."""
    return {seed: f"-seed{seed}" if len(study.seeds) > 1 else "" for seed in study.seeds or [study.seed]}


def chosen_depth(study: StudyOptions, scout: Scout) -> int:
    """The depth that a scout's scores choose, within the study's budget.

    Raises:
        ConfigError: No depth is within it.
        DataError: The scout does not tell what it asks.
    """
    return len(choose_rung(study, scout).blocks)


@dataclass(frozen=True)
class _Judge:
    """The tasks that score a study's models; ``told_by`` is the step that writes them yet, ``held_out`` whether one
    does, or did: they hold rows of the data.
    """

    tasks: Sequence[str]
    told_by: str | None = None
    held_out: bool = False


def _add_scouted(plan: Plan, study: StudyOptions, training: HealOptions, base: Base, scout: Scout | None) -> _Judge:
    """The model as it came, with its vocabulary cut, its profile, its scouts, and what is cut from these and polished.

    Args:
        plan: To add to.
        study: Its options.
        training: The options of scout and polish, but for those that the study decides.
        base: The model.
        scout: What the first seed's scout found, if it is there.

    Returns:
        What scores its models.
    """
    for depth in (*study.ladder, *study.polish):
        blocks_to_keep(depth, base.depth)
    whole, came = add_whole(plan, study, base)
    start, begun = add_trimmed(plan, study, whole, came)
    add_profile(plan, study, start, begun, study.tasks if study.depth_scores else [])
    settings = settings_of(study, training, study.out / MODELS / whole.name)
    settings = {"data": study.data, "columns": study.columns, **settings}
    judge = _add_scouts(plan, study, settings, start, begun, scout)
    for untrained, step in {whole: came, start: begun}.items():
        add_scores(plan, study, untrained, step, judge.tasks, judge.told_by)
    if judge.held_out:
        settings["exclude"] = judge.tasks
    cuts = _cuts(study, base, scout)
    polishes_whole = base.depth in study.polish or not cuts
    for seed, suffix in _suffixes(study).items():
        _add_cut(plan, study, settings, judge, whole, seed, suffix, polishes=polishes_whole)
        for spec, kept, problem in cuts:
            blocks = None if kept is None else tuple(range(kept))
            _add_cut(plan, study, settings, judge, Variant("", base, (spec,), blocks), seed, suffix, problem)
    return judge


def _add_scouts(
    plan: Plan, study: StudyOptions, settings: Mapping[str, Any], start: Variant, begun: str, scout: Scout | None
) -> _Judge:
    """A scout for each seed, and what scores all models: without tasks, the rows that the first scout holds out."""
    judge = _Judge(study.tasks)
    for seed, suffix in _suffixes(study).items():
        variant = replace(start, name=start.base.name + suffix, recipe=SCOUTED, seed=seed)
        folder = study.out / SCOUTS / variant.name
        own: dict[str, Any] = {"model": str(study.out / MODELS / start.name), "depths": study.ladder or None}
        own |= {"steps": _steps(study)[0], "tasks": judge.tasks, "sample": study.sample, "held_out": study.held_out}
        own |= {"exclude": judge.tasks if judge.held_out else []}
        options = {**settings, **own, "seed": seed, "out": folder}
        step = plan.add("scout", variant, folder / FRONTIER, begun, told_by=judge.told_by, **options)
        if not judge.tasks:
            names = dict.fromkeys(row.task for row in scout.task_scores) if scout else [""]
            judge = _Judge([str(folder / "tasks" / name) for name in names], None if scout else step, held_out=True)
    return judge


def _steps(study: StudyOptions) -> tuple[int, int]:
    """Of the scout, and of the polish at full depth."""
    budget = study.steps or TrainingConfig.steps
    scout = max(1, round(SCOUT_SHARE * budget))
    return scout, budget - scout


def _cuts(study: StudyOptions, base: Base, scout: Scout | None) -> list[tuple[str, int | None, str]]:
    """The cuts below the full depth: entry, depth (None while it is not known), and why it cannot be told.

    None where the full depth is chosen.
    """
    if study.polish:
        return [(str(depth), depth, "") for depth in sorted({*study.polish} - {base.depth}, reverse=True)]
    if scout is None:
        return [(CHOSEN, None, "")]
    try:
        depth = chosen_depth(study, scout)
    except SecateurError as error:
        return [(CHOSEN, None, str(error))]
    return [(CHOSEN, depth, "")] if depth < base.depth else []


def _add_cut(
    plan: Plan,
    study: StudyOptions,
    settings: Mapping[str, Any],
    judge: _Judge,
    cut: Variant,
    seed: int,
    suffix: str,
    problem: str = "",
    *,
    polishes: bool = True,
) -> None:
    """A depth of a seed's scout as a model, and polished: as many steps as cost what the scout left of the budget."""
    base, waits = cut.base, None if cut.blocks is not None else f"scout {scout_names(study, cut.base)[0]}"
    label, to = (f"({cut.specs[0]})", {}) if cut.blocks is None else (cut.depth, {"to": str(cut.depth)})
    cut = replace(cut, name=f"{base.name}-{label}-{SCOUTED}{suffix}", recipe=SCOUTED, seed=seed)
    source, out = study.out / SCOUTS / f"{base.name}{suffix}" / "model", study.out / MODELS / cut.name
    made_by = f"scout {source.parent.name}"
    pruned = plan.add("prune", cut, out, made_by, told_by=waits, model=str(source), **to, out=out)
    if problem:
        plan.failed[pruned] = problem
    waits = waits or judge.told_by
    add_scores(plan, study, cut, pruned, judge.tasks, waits)
    if not polishes:
        return
    polished = replace(cut, name=f"{base.name}-{label}-{POLISHED}{suffix}", recipe=POLISHED)
    steps = max(1, round(_steps(study)[1] * base.depth / cut.depth))
    given, out = {"model": str(out), **settings, "steps": steps, "seed": seed}, study.out / MODELS / polished.name
    step = plan.add("heal", polished, out, pruned, told_by=waits, **given, out=out)
    add_scores(plan, study, polished, step, judge.tasks, waits)
