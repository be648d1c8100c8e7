"""A run folder as a page to read: ``report.html``, ``report.md`` and a model card in each model folder.

A view on the tables. It computes differences, ratios and means of what they hold, and nothing else; what a run does
not have is left out. The page is one file that loads nothing, runs nothing, and escapes every text it did not write.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from secateur import figures
from secateur.artifacts import (
    CostRow,
    Costs,
    DepthScoreRow,
    Fingerprint,
    Origin,
    Profile,
    Provenance,
    ScoreRow,
    Scores,
    Table,
    Training,
    load,
    read_json,
    write_text,
)
from secateur.errors import DataError
from secateur.figures import printable, shorten

CARD = "README.md"
CARD_MARK = "<!-- Written by `secateur report`, which replaces it. Remove this line to keep a card of your own. -->"
# Cards that sentence-transformers writes when a model is saved; a person's card is left alone.
GENERATED_MARKS = (CARD_MARK, "This is a [sentence-transformers](https://www.SBERT.net) model")

_NAME = re.compile(r"(?P<base>.+)-(?P<depth>\d+)-(?P<state>[a-z].*)")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_NONE = "–"
UNTRAINED = "zero-shot"


@dataclass(frozen=True)
class Variant:
    """One model of a run, with what the run knows of it.

    ``base`` is the first part of its name, ``depth`` how many blocks it holds of ``blocks``, ``state`` what was done to
    it besides the cut (``zero-shot``, ``healed``).
    """

    name: str
    base: str
    depth: int | None
    blocks: int | None
    state: str
    folder: Path | None
    origin: Origin | None
    training: Training | None
    cost: CostRow | None
    scores: Mapping[str, ScoreRow]

    @property
    def series(self) -> str:
        """The variants it is drawn and listed with."""
        return f"{self.base}, {self.state}" if self.state else self.base

    @property
    def is_full(self) -> bool:
        """Whether it has all blocks of its base model."""
        return self.depth is not None and self.depth == self.blocks

    @property
    def average(self) -> float | None:
        """Mean score over its tasks; None where it has no tasks, or one without a number."""
        return _mean([row.score for row in self.scores.values()])


@dataclass(frozen=True)
class Run:
    """What a run folder holds."""

    folder: Path
    study: str
    profiles: Mapping[str, Profile]
    choices: Mapping[str, Mapping[str, int]]
    variants: tuple[Variant, ...]
    scores: tuple[Scores, ...]
    costs: Costs | None

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

    def reference(self, variant: Variant) -> Variant | None:
        """The full model to compare with: of the same base and in the same state, else as it came.

        None where the run has none, or where it was not scored on the same tasks: averages would not compare.
        """
        full = [other for other in self.variants if other.base == variant.base and other.is_full]
        same = [other for other in full if variant.state.endswith(other.state)]
        for other in same or [other for other in full if other.state == UNTRAINED]:
            if other.average is not None and other.scores.keys() == variant.scores.keys():
                return other
        return None

    @property
    def claims(self) -> dict[str, list[tuple[Variant, Variant]]]:
        """Series → its cut models, each with the full model that it is compared with.

        A base model's untrained variants are no claim where trained ones are.
        """
        pairs: dict[str, list[tuple[Variant, Variant]]] = {}
        for variant in self.variants:
            full = self.reference(variant)
            if full is not None and full.average and variant.average is not None and not variant.is_full:
                pairs.setdefault(variant.series, []).append((variant, full))
        trained = {own[0][0].base for own in pairs.values() if own[0][0].state != UNTRAINED}
        return {k: own for k, own in pairs.items() if own[0][0].state != UNTRAINED or own[0][0].base not in trained}


def report(run: str | Path) -> Path:
    """Write the report of a run: ``report.html``, ``report.md`` with ``figures/*.png``, and the model cards.

    Args:
        run: The run folder. Any of its parts may be absent; the report shows what is there.

    Returns:
        The path of ``report.html``.

    Raises:
        DataError: The folder is missing, holds no table, or a table in it is broken or contradicts another.
        OutputError: A file cannot be written.
    """
    content = read_run(run)
    drawn = _figures(content)
    for name, drawing in drawn.items():
        figures.save_png(drawing.figure, content.folder / "figures" / f"{name}.png")
    shared = {"run": content, "verdict": verdict(content), "figures": drawn, "steps": _steps(content)}
    shared |= {"groups": _groups(content), "tasks": _tasks(content), "origins": _origins(content)}
    shared |= {"losses": _losses(content), "settings": _settings(content), "title": content.folder.resolve().name}
    shared["built"] = [variant for variant in content.variants if variant.origin]
    shared["claims"] = [claim for own in content.claims.values() for claim in own]
    _write(content.folder / "report.md", _TEXT.get_template("report.md.j2").render(shared))
    for variant in content.variants:
        if variant.folder is not None and variant.origin is not None:
            _write_card(content, variant, variant.folder, variant.origin)
    page = content.folder / "report.html"
    _write(page, _HTML.get_template("report.html.j2").render(shared))
    return page


def read_run(run: str | Path) -> Run:
    """Read the tables of a run folder.

    Raises:
        DataError: As for :func:`report`.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise DataError(folder, "no such folder", "name the folder that a study wrote")
    profiles = {path.parent.name: load(path, Profile) for path in sorted(folder.glob(f"profiles/*/{Profile.file}"))}
    scores = tuple(load(path, Scores) for path in sorted(folder.glob(f"scores/*/{Scores.file}")))
    costs = load(folder, Costs) if (folder / Costs.file).exists() else None
    models = {path.parent.name: path.parent for path in sorted(folder.glob(f"models/*/{Origin.file}"))}
    if not (profiles or scores or costs or models):
        raise DataError(
            folder,
            "holds no profile, model, scores or costs",
            "name the folder that a study wrote, with profiles/, models/, scores/ or costs.json in it",
        )
    choices = {name: _choice(folder / "profiles" / name / "choice.json", table) for name, table in profiles.items()}
    study = folder / "study.yaml"
    return Run(
        folder=folder,
        study=study.read_text(encoding="utf-8", errors="replace") if study.is_file() else "",
        profiles=profiles,
        choices={name: choice for name, choice in choices.items() if choice},
        variants=_variants(models, scores, costs, profiles),
        scores=scores,
        costs=costs,
    )


def verdict(run: Run) -> tuple[str, ...]:
    """What the run found, in sentences: for each series of cut models, the share kept of the full model's score."""
    sentences = [_claim_sentence(claims) for claims in run.claims.values()]
    scored = [variant for variant in run.variants if variant.average is not None]
    if not sentences and scored:
        averages = "; ".join(f"{shorten(v.name)} {_score(v.average)} over {_tasks_of(v)}" for v in scored)
        sentences = [f"Average scores, without a full model on the same tasks to compare with: {averages}."]
    if not sentences:
        sentences = [_choice_sentence(run, name) for name in run.profiles]
    return tuple(sentences) or (f"The run holds {_plural(len(run.variants), 'model')}, not yet scored.",)


def seed_note(run: Run) -> str:
    """What the number of training seeds allows to be said about differences between models; empty without scores."""
    trained = [variant.training.provenance.seed for variant in run.variants if variant.training and variant.scores]
    seeds = sorted({seed for seed in trained if seed is not None})
    if not any(variant.scores for variant in run.variants):
        return ""
    if not seeds:
        return "Scores are those of one evaluation on samples of finite size; small differences may be chance."
    if len(seeds) == 1:
        return (
            f"Every model was trained with one seed ({seeds[0]}). How far scores move from seed to seed was not "
            "measured, so that small differences between models may be chance."
        )
    return f"Models were trained with {len(seeds)} seeds ({', '.join(map(str, seeds))}); each row is one training."


# Reading ------------------------------------------------------------------------------------------------------------


def _choice(file: Path, profile: Profile) -> dict[str, int]:
    if not file.exists():
        return {}
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(file, f"holds a {type(content).__name__}", 'write depths by name, such as {"small": 7}')
    for name, depth in content.items():
        if not isinstance(depth, int) or isinstance(depth, bool) or not 1 <= depth <= profile.depth:
            hint = f"write a whole number, 1 to {profile.depth}"
            raise DataError(file, f"{depth!r} is not a depth", hint, field=name)
    return content


def _variants(
    models: Mapping[str, Path], scores: Iterable[Scores], costs: Costs | None, profiles: Mapping[str, Profile]
) -> tuple[Variant, ...]:
    scored: dict[str, dict[str, ScoreRow]] = {}
    for row in (row for table in scores for row in table.rows):
        if row.task in scored.setdefault(row.model, {}):
            raise DataError("scores", f"two scores of {row.model} on {row.task}", "keep one of the two files")
        scored[row.model][row.task] = row
    cost = {row.model: row for row in costs.rows} if costs else {}
    names = dict.fromkeys([*models, *scored, *cost])
    found = [_variant(name, models.get(name), cost.get(name), scored.get(name, {}), profiles) for name in names]
    return tuple(sorted(found, key=lambda v: (v.base, v.state, -(v.depth or 0), v.name)))


def _variant(
    name: str,
    folder: Path | None,
    cost: CostRow | None,
    scores: Mapping[str, ScoreRow],
    profiles: Mapping[str, Profile],
) -> Variant:
    origin = load(folder, Origin) if folder else None
    training = load(folder, Training) if folder and (folder / Training.file).exists() else None
    parts = _NAME.fullmatch(name)
    base = parts["base"] if parts else name
    depth = len(origin.kept) if origin else cost.depth if cost else int(parts["depth"]) if parts else None
    profile = profiles.get(base)
    return Variant(
        name=name,
        base=base,
        depth=depth,
        blocks=origin.depth if origin else profile.depth if profile else None,
        state=parts["state"] if parts else "",
        folder=folder,
        origin=origin,
        training=training,
        cost=cost,
        scores=scores,
    )


# Saying -------------------------------------------------------------------------------------------------------------


def _claim_sentence(claims: Sequence[tuple[Variant, Variant]]) -> str:
    parts: list[str] = []
    for variant, full in claims:
        share = (variant.average or 0.0) / (full.average or math.nan)
        verb = ("keep" if share <= 1 else "reach") if variant.depth != 1 else ("keeps" if share <= 1 else "reaches")
        which, of_what = str(variant.depth), ""
        if not parts:
            which += f" of {variant.blocks} blocks"
            of_what = f" of the {full.state} full model’s average score"
        parts.append(f"{which} {verb} {_percent(share)}{of_what}{_speed_claim(variant, full)}")
    return f"{shorten(claims[0][0].series)}: {'; '.join(parts)}."


def _speed_claim(variant: Variant, full: Variant) -> str:
    if variant.cost is None or full.cost is None or not full.cost.texts_per_second:
        return ""
    apart = variant.cost.speed_low > full.cost.speed_high or variant.cost.speed_high < full.cost.speed_low
    ratio = f"{variant.cost.texts_per_second / full.cost.texts_per_second:.1f} × its speed"
    return f" at {ratio}" if apart else " at a speed that the measurement does not tell from its own"


def _choice_sentence(run: Run, name: str) -> str:
    profile, choice = run.profiles[name], run.choices.get(name, {})
    chosen = ", ".join(f"“{label}” keeps {depth}" for label, depth in sorted(choice.items(), key=lambda item: item[1]))
    lowest = min(((row.loss, row.depth) for row in profile.rows if row.loss is not None), default=None)
    curve = f"the untrained loss is lowest at depth {lowest[1]} of {profile.depth}" if lowest else "no loss is known"
    return f"{shorten(name)}: {curve}{'; ' + chosen if chosen else ''}. No model is scored yet."


def _tasks_of(variant: Variant) -> str:
    return _plural(len(variant.scores), "task")


# Tables of the page -------------------------------------------------------------------------------------------------


def _groups(run: Run) -> dict[str, list[dict[str, Any]]]:
    """The rows of the main table by series, each value as it is printed."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for variant in run.variants:
        full, cost = run.reference(variant), variant.cost
        difference = (
            100 * (variant.average - full.average)
            if full and full is not variant and variant.average is not None and full.average is not None
            else None
        )
        groups.setdefault(variant.series, []).append(
            {
                "variant": variant,
                "blocks": f"{variant.depth} of {variant.blocks}" if variant.blocks else str(variant.depth or _NONE),
                "parameters": _count(cost.parameters) if cost else _NONE,
                "table": _count(cost.embedding_parameters) if cost else _NONE,
                "bytes": _bytes(cost.bytes) if cost else _NONE,
                "speed": _speed(cost.texts_per_second) if cost else _NONE,
                "range": f"{_speed(cost.speed_low)} to {_speed(cost.speed_high)}" if cost else "",
                "average": _score(variant.average),
                "difference": _signed(difference),
                "against": full if difference is not None else None,
                "is_full": variant.is_full,
            }
        )
    return groups


def _tasks(run: Run) -> dict[str, ScoreRow]:
    """Every task of the run, with one of its rows for type, metric and number of samples."""
    return {row.task: row for variant in run.variants for row in variant.scores.values()}


def _steps(run: Run) -> list[tuple[list[str], str]]:
    """(what it made, command), each command once, in the order of the work."""
    steps: dict[str, list[str]] = {}
    for title, table in run.tables:
        history = table.history if isinstance(table, Origin) else ()
        for command in history or (table.provenance.command,):
            steps.setdefault(command, [])
            if title not in steps[command]:
                steps[command].append(title)
    return [(titles, command) for command, titles in steps.items()]


def _losses(run: Run) -> tuple[list[str], dict[int, list[str]]]:
    """Names of the trained models, and step → the loss of each."""
    trained = {variant.name: variant.training for variant in run.variants if variant.training}
    curves = [{row.step: row.loss for row in training.rows} for training in trained.values()]
    steps = sorted({step for curve in curves for step in curve})
    return list(trained), {step: [_loss(curve.get(step)) for curve in curves] for step in steps}


def _settings(run: Run) -> list[tuple[list[str], Training]]:
    """Trainings with their models' names, those with the same settings together."""
    same: dict[str, tuple[list[str], Training]] = {}
    for variant in run.variants:
        if variant.training:
            same.setdefault(_settings_text(variant.training), ([], variant.training))[0].append(variant.name)
    return list(same.values())


def _settings_text(training: Training) -> str:
    content = {"settings": dict(training.settings), "prompts": dict(training.prompts)}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


def _uses_text(titles: Sequence[str]) -> str:
    """Kinds of tables that a file was read for: ``training of 3 models``."""
    kinds: dict[str, int] = {}
    for title in titles:
        kind = title.split(maxsplit=1)[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    return ", ".join(f"{kind} ({number})" if number > 1 else kind for kind, number in kinds.items())


def _kept(origin: Origin) -> str:
    """Which blocks are kept: ``all``, ``the first 7``, or ranges of their original numbers, counted from 1."""
    if origin.kept == tuple(range(len(origin.kept))):
        number = len(origin.kept)
        return "all" if number == origin.depth else f"the first {number}" if number > 1 else "the first"
    ranges: list[list[int]] = []
    for block in origin.kept:
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return ", ".join(f"{a + 1}" if a == b else f"{a + 1} to {b + 1}" for a, b in ranges)


def _origins(run: Run) -> dict[str, Any]:
    """What all tables say of data, seeds, versions, machine and time."""
    made = [table.provenance for _, table in run.tables]
    files: dict[Fingerprint, list[str]] = {}
    for title, table in run.tables:
        for file in table.provenance.data:
            files.setdefault(file, []).append(title)
    times = sorted(item.created for item in made)
    return {
        "files": files,
        "seeds": _seen(made, lambda item: {} if item.seed is None else {"seed": item.seed}).get("seed", ""),
        "versions": _seen(made, lambda item: item.versions),
        "hardware": _seen(made, lambda item: item.hardware),
        "first": times[0],
        "last": times[-1],
    }


def _seen(made: Iterable[Provenance], part: Callable[[Provenance], Mapping[str, Any]]) -> dict[str, str]:
    """Key → its values in all tables; more than one where the tables were made in different places."""
    values: dict[str, dict[str, None]] = {}
    for item in made:
        for key, value in part(item).items():
            values.setdefault(key, {})[str(value)] = None
    return {key: ", ".join(seen) for key, seen in values.items()}


# Figures ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A figure with what is said about it: ``title``, ``caption`` under it, and its content in words (``text``)."""

    section: str
    title: str
    caption: str
    text: str
    figure: Figure


def _figures(run: Run) -> dict[str, Drawing]:
    """Every figure that the tables allow, by file name."""
    drawn = {
        f"{kind}-{number}": drawing
        for number, name in enumerate(run.profiles, 1)
        for kind, drawing in _profile_figures(run, name).items()
    }
    points = [point for variant in run.variants if (point := _point(variant))]
    if points:
        text = "; ".join(
            f"{point.series}, {point.label} blocks: {_score(point.score)} with {_count(point.parameters)} parameters, "
            f"{_speed(point.speed)} texts per second"
            for point in points
        )
        drawn["score-parameters"] = Drawing(
            "trade-off", "Score against size", "Average score of each model against its parameters. "
            "Numbers are blocks kept; lines join the variants of one base model.", text,
            figures.trade_off(points, "parameters"),
        )  # fmt: skip
        drawn["score-speed"] = Drawing(
            "trade-off", "Score against speed", "Average score of each model against the texts it encodes per second; "
            "bars span the slowest and the fastest repetition.", text,
            figures.trade_off(points, "speed"),
        )  # fmt: skip
    trainings = {v.name: v.training for v in run.variants if v.training and v.training.rows}
    if trainings:
        ends = "; ".join(f"{name} ends at {_loss(item.rows[-1].loss)}" for name, item in trainings.items())
        drawn["training"] = Drawing(
            "training", "Training loss", "Loss of each healed model, the mean since the "
            "step logged before.", ends, figures.training_curves(trainings),
        )  # fmt: skip
    return drawn


def _profile_figures(run: Run, name: str) -> dict[str, Drawing]:
    """The figures of one profile: ``curve`` and, where it has them, ``solved``, ``cka`` and ``angles``."""
    profile, choice = run.profiles[name], run.choices.get(name, {})
    marks = ", ".join(f"“{label}” at {depth}" for label, depth in sorted(choice.items(), key=lambda item: item[1]))
    caption = (
        f"Contrastive loss of the untrained {profile.model} after each block, {_plural(profile.batches, 'batch')} of "
        f"{profile.batch_size}, scale {profile.scale:g}, {profile.pooling} pooling; the band is its 95 % interval. "
        + (f"Chosen: {marks}." if marks else "")
    )
    losses = "; ".join(f"depth {row.depth}: {_loss(row.loss)}" for row in profile.rows)
    told = {
        "curve": (f"Loss by depth: {name}", caption, losses),
        "solved": (
            f"Where in depth tasks are solved: {name}",
            "What the untrained model is worth at each depth, task by task; scores × 100, bands are 95 % intervals.",
            _best_depths(profile),
        ),
        "cka": (
            f"Likeness of depths: {name}",
            "Linear CKA of the vectors at all pairs of depths: 1 is the same up to rotation and scale.",
            f"{_farthest(profile.cka, 1)} the least alike.",
        ),
        "angles": (
            f"Angles between depths: {name}",
            "Angular distance of the last token’s states at all pairs of depths, from the embeddings (0) on. "
            "Light squares along the diagonal are runs of blocks that turn the states little.",
            f"{_farthest([[-(v or 0.0) for v in row] for row in profile.angular], 0)} the farthest apart.",
        ),
    }  # fmt: skip
    drawn = figures.profile_figures(profile, choice)
    return {kind: Drawing("curve", *told[kind], figure) for kind, figure in drawn.items()}


def _best_depths(profile: Profile) -> str:
    """In words: the depth at which each task scores best."""
    best: dict[str, DepthScoreRow] = {}
    for row in profile.task_scores:
        if row.task not in best or row.score > best[row.task].score:
            best[row.task] = row
    sentences = [f"{task} is best at depth {row.depth} ({_score(row.score)})" for task, row in best.items()]
    lens = [(row.next_token_loss, row.depth) for row in profile.rows if row.next_token_loss is not None]
    sentences += [f"the next-token loss is lowest at depth {min(lens)[1]}"] if lens else []
    return "; ".join(sentences)


def _farthest(likeness: Sequence[Sequence[float | None]], first: int) -> str:
    """In words: the two depths that are the least alike."""
    pairs = [(value, i, j) for i, row in enumerate(likeness) for j, value in enumerate(row) if value is not None]
    if not pairs:
        return "No two depths can be compared; none are"
    _, i, j = min(pairs)
    return f"Depths {i + first} and {j + first} are"


def _point(variant: Variant) -> figures.Point | None:
    cost, average = variant.cost, variant.average
    if cost is None or average is None:
        return None
    numbers = (cost.texts_per_second, cost.speed_low, cost.speed_high)
    if any(number is None for number in numbers):
        return None
    return figures.Point(variant.series, str(variant.depth), average, cost.parameters, *numbers)


# Model cards --------------------------------------------------------------------------------------------------------


def _write_card(run: Run, variant: Variant, folder: Path, origin: Origin) -> None:
    file = folder / CARD
    if file.exists():
        old = file.read_text(encoding="utf-8", errors="replace")
        if not any(mark in old for mark in GENERATED_MARKS):
            return
    full = run.reference(variant)
    content = {
        "mark": CARD_MARK,
        "metadata": yaml.safe_dump(_metadata(origin), sort_keys=False, allow_unicode=True).strip(),
        "run": run,
        "variant": variant,
        "origin": origin,
        "full": None if full is variant else full,
        "prompts": _prompts(folder),
        "note": seed_note(run) if variant.training else "",
    }
    _write(file, _TEXT.get_template("card.md.j2").render(content))


def _metadata(origin: Origin) -> dict[str, Any]:
    tags = ["sentence-transformers", "feature-extraction", "sentence-similarity", "secateur", "pruned"]
    content = {"pipeline_tag": "sentence-similarity", "library_name": "sentence-transformers", "tags": tags}
    base = origin.base_model
    if _HUB_NAME.fullmatch(base) and not base.endswith(".gguf") and not Path(base).exists():
        return {"base_model": base, "base_model_relation": "finetune", **content}
    return content


def _prompts(folder: Path) -> dict[str, str]:
    file = folder / "config_sentence_transformers.json"
    content = read_json(file) if file.exists() else {}
    prompts = content.get("prompts") if isinstance(content, dict) else None
    return {str(name): str(text) for name, text in prompts.items() if text} if isinstance(prompts, dict) else {}


# Printing -----------------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _score(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _signed(points: float | None) -> str:
    if points is None:
        return _NONE
    text = f"{points:+.1f}".replace("-", "−")
    return "0.0" if text[1:] == "0.0" else text


def _percent(share: float) -> str:
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _loss(value: float | None) -> str:
    return _NONE if value is None else f"{value:.3f}"


def _speed(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _count(value: int) -> str:
    return _scaled(value, (("B", 1e9), ("M", 1e6), ("k", 1e3)), "")


def _bytes(value: int) -> str:
    return _scaled(value, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "bytes")


def _scaled(value: int, units: Sequence[tuple[str, float]], plain: str) -> str:
    for unit, size in units:
        if value >= size:
            return f"{value / size:.1f}\N{NO-BREAK SPACE}{unit}"
    return f"{value}\N{NO-BREAK SPACE}{plain}".strip()


def _check(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1e}"


def _decimal(value: float | None) -> str:
    return _NONE if value is None else f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{value / 60:.0f}\N{NO-BREAK SPACE}min" if value >= 600 else f"{value:.0f}\N{NO-BREAK SPACE}s"


def _given(value: object) -> str:
    return _NONE if value is None else str(value)


def _moment(created: str) -> str:
    """An ISO 8601 time without its seconds."""
    return created[:16].replace("T", " ") + (" UTC" if created.endswith("+00:00") else "")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plural(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def _markdown(value: object) -> str:
    """A text as one line of Markdown that shows it as it is: no markup, no HTML, no formula, no new table cell."""
    text = html.escape(printable(re.sub(r"\s+", " ", str(value))), quote=False)
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text)
    text = re.sub(r"^([-+=#])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)] )", r"\1\\\2", text)


def _code(text: str) -> str:
    """Lines of code as they are shown: nothing in them hides, or turns what is copied."""
    return "\n".join(printable(line) for line in text.expandtabs(4).splitlines())


def _fenced(text: str, language: str = "") -> str:
    """A code block whose fence is longer than any in the text."""
    text = _code(text)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _inline_svg(drawing: Drawing, name: str) -> Markup:
    return Markup(figures.svg(drawing.figure, name, drawing.title, drawing.text))  # noqa: S704  escaped as XML there


def _write(path: Path, text: str) -> None:
    # A lone surrogate, which JSON can hold, has no UTF-8.
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))


def _environment(markup: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("secateur"),
        autoescape=markup,  # noqa: S701  off for Markdown, whose own filters escape
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "score": _score, "loss": _loss, "count": _count, "bytes": _bytes, "percent": _percent, "md": _markdown,
        "code": _code, "fenced": _fenced, "printable": printable, "shorten": shorten, "svg_of": _inline_svg,
        "json": lambda value: json.dumps(value, ensure_ascii=False), "plural": _plural,
        "speed": _speed, "kept": _kept, "settings_text": _settings_text, "uses_text": _uses_text, "check": _check,
        "decimal": _decimal, "seconds": _seconds, "given": _given, "moment": _moment, "capital": _capital,
    }  # fmt: skip
    environment.globals |= {"seed_note": seed_note}
    return environment


_HTML = _environment(markup=True)
_TEXT = _environment(markup=False)  # Markdown: escaped by the filters md and fenced
