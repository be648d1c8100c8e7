"""The pictures of a report: the figures of a run, each with what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from secateur.figures.plots import Point, frontier, profile_figures, size_curve, training_curves
from secateur.reporting.document import Picture
from secateur.reporting.findings import RunGroup, Summary, pareto
from secateur.reporting.run import Run
from secateur.reporting.saturation import Saturation, fit_saturation
from secateur.results import CostRow, DepthScoreRow, Profile, Training
from secateur.tables import byte_size, count, duration, loss, percent, plural, score, span, speed

MOST_LABELS = 24
"""Points beyond which only the best are labelled."""
MOST_PROFILES = 8
"""Profiles drawn in the page; the others' figures are in their own folders."""
MILLION = 1e6


def _some(parts: Sequence[str]) -> str:
    """Parts of a description; of very many the first, since nobody listens to hundreds."""
    more = f"; and {len(parts) - MOST_LABELS} more, in the table" if len(parts) > MOST_LABELS else ""
    return "; ".join(parts[:MOST_LABELS]) + more


# Score against cost ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    """Something that a model costs: its name, how it is read from a row (with a range) and printed.

    ``rises``: more of it is better. ``bars`` says what the range is.
    """

    key: str
    title: str
    axis: str
    read: Callable[[CostRow], float | None]
    show: Callable[[float], str]
    range: Callable[[CostRow], tuple[float | None, float | None]] = lambda _: (None, None)
    rises: bool = False
    bars: str = ""


_COSTS = (
    _Cost("parameters", "size", "Parameters, embedding table included", lambda c: c.parameters, count),
    _Cost("bytes", "bytes on disk", "Bytes on disk", lambda c: c.bytes, byte_size),
    _Cost(
        "speed",
        "throughput",
        "Short texts per second",
        lambda c: c.texts_per_second,
        speed,
        lambda c: (c.speed_low, c.speed_high),
        rises=True,
        bars="Level bars span the slowest and the fastest repetition.",
    ),
    _Cost(
        "latency",
        "latency",
        "Seconds for one short text (median)",
        lambda c: c.latency_p50 or None,  # 0: not measured
        duration,
        lambda c: (c.latency_p50, c.latency_p95),
        bars="Level bars reach to the 95th percentile.",
    ),
)


def cost_pictures(summary: Summary) -> list[Picture]:
    """Average score against each cost that was measured."""
    return [_frontier(cost, points) for cost in _COSTS if (points := _points(summary, cost))]


def _points(summary: Summary, measure: _Cost) -> tuple[Point, ...]:
    """A point for each group that is scored and has that cost."""
    found: list[tuple[RunGroup, Point]] = []
    for group in summary.groups:
        cost, average, first = group.cost, group.average, group.first
        value = measure.read(cost) if cost else None
        if value is None or average is None or cost is None:
            continue
        within = span(average.low, average.high)
        note = (
            group.name,
            f"{first.depth} of {first.blocks} blocks; score {score(average.value)}"
            + (f" ({within})" if within else ""),
            f"{count(cost.parameters)} parameters; {byte_size(cost.bytes)}; {speed(cost.texts_per_second)} texts/s"
            + (f"; {duration(cost.latency_p50)} for one" if cost.latency_p50 else ""),
            command_of(group),
        )
        point = Point(
            series=first.series,
            label="" if first.depth is None else str(first.depth),
            score=average.value,
            low=average.low,
            high=average.high,
            cost=value,
            cost_low=measure.range(cost)[0],
            cost_high=measure.range(cost)[1],
            note=tuple(line for line in note if line),
            link=folder_link(summary.run.folder, first.folder),
        )
        found.append((group, point))
    best = set(pareto([(-point.cost if measure.rises else point.cost, point.score) for _, point in found]))
    few = len(found) <= MOST_LABELS
    return tuple(
        replace(point, best=index in best, label=point.label if few or index in best else "")
        for index, (_, point) in enumerate(found)
    )


def command_of(group: RunGroup) -> str:
    """The command that made a group's model, the last of its history."""
    origin = group.first.origin
    return (*origin.history, origin.provenance.command)[len(origin.history) - 1] if origin else ""


def folder_link(run: Path, folder: Path | None) -> str:
    """A model's folder as seen from the report; a relative path, whatever its name."""
    return quote(folder.relative_to(run).as_posix()) + "/" if folder else ""


def _frontier(cost: _Cost, points: tuple[Point, ...]) -> Picture:
    text = [
        f"{point.series}, {point.label or 'unlabelled'} blocks: {score(point.score)} at {cost.show(point.cost)}"
        for point in sorted(points, key=lambda point: not point.best)
    ]
    bars = "Upright bars are 95 % intervals. " if any(point.low is not None for point in points) else ""
    if any(point.cost_low is not None for point in points):
        bars += cost.bars
    caption = (
        f"Average score of each model against its cost: {cost.axis[0].lower()}{cost.axis[1:]}. Numbers are "
        f"blocks kept; solid lines join one series, the dashed one the best models at their cost. {bars}"
    )
    figure = frontier(points, cost.axis)
    return Picture(f"score-{cost.key}", f"Score against {cost.title}", caption.strip(), _some(text), figure, points)


# Score against size ---------------------------------------------------------------------------------------------------


def size_pictures(summary: Summary, threshold: float) -> list[Picture]:
    """For each base model a curve through its series with the most sizes, the first of equally many.

    Cuts of one model lie on one curve; those of another have a plateau of their own.

    Args:
        summary: What the run found.
        threshold: Million parameters that a point of score may cost.
    """
    series: dict[str, dict[str, list[Point]]] = {}
    sized = [group for group in summary.groups if group.cost is not None and group.average is not None]
    for group, point in zip(sized, _points(summary, _COSTS[0]), strict=True):
        series.setdefault(group.first.base, {}).setdefault(point.series, []).append(replace(point, label=""))
    largest = {base: max(own.values(), key=len) for base, own in series.items()}
    pictures: list[Picture] = []
    for base, points in largest.items():
        if len(points) < 2 or len(pictures) == MOST_PROFILES:
            continue
        fitted = fit_saturation([p.cost for p in points], [p.score for p in points], threshold * MILLION)
        drawn = (fitted.score, fitted.plateau, fitted.limit) if isinstance(fitted, Saturation) else (None, None, None)
        caption = f"{points[0].series}: {plural(len(points), 'model')}. {saturation_sentence(fitted)}"
        text = _some([f"{count(point.cost)} parameters: {score(point.score)}" for point in points])
        key, title = f"saturation-{len(pictures) + 1}", f"Score against size: {base}"
        pictures.append(Picture(key, title, caption, text, size_curve(points, *drawn), tuple(points)))
    return pictures


def saturation_sentence(fitted: Saturation | str) -> str:
    """What the fit says, with its formula, or why there is none."""
    if isinstance(fitted, str):
        return f"No curve is fitted: {fitted}."
    formula = (
        f"score = {score(fitted.plateau)} − {score(fitted.gain)} × (parameters / {count(fitted.smallest)})"
        f"^(−{fitted.exponent:.2f})"
    )
    fit = (
        f"Fitted by least squares to {plural(fitted.points, 'model')}: {formula}; it explains "
        f"{percent(fitted.explained)} of the variance, residuals have a standard deviation of "
        f"{score(fitted.error)} points. Plateau: {score(fitted.plateau)} "
        f"({span(fitted.plateau_low, fitted.plateau_high)}, bootstrap over models)."
    )
    cost = count(fitted.threshold)
    if fitted.limit is not None:
        return f"{fit} Beyond {count(fitted.limit)} parameters, another point costs more than {cost} parameters."
    if fitted.marginal_cost(fitted.largest) <= fitted.threshold:
        return f"{fit} At every size measured, another point costs less than {cost} parameters."
    return f"{fit} Already at the smallest size measured, another point costs more than {cost} parameters."


# Profiles and trainings -----------------------------------------------------------------------------------------------


def profile_pictures(run: Run, name: str, number: int) -> dict[str, Picture]:
    """The figures of one profile: ``curve`` and, where it has them, ``solved``, ``cka`` and ``angles``."""
    profile, choice = run.profiles[name], run.choices.get(name, {})
    marks = ", ".join(f"“{label}” at {depth}" for label, depth in sorted(choice.items(), key=lambda item: item[1]))
    caption = (
        f"Contrastive loss of the untrained {profile.model} after each block, {plural(profile.batches, 'batch')} of "
        f"{profile.batch_size}, scale {profile.scale:g}, {profile.pooling} pooling; the band is its 95 % interval. "
        + (f"Chosen: {marks}." if marks else "")
    )
    losses = "; ".join(f"depth {row.depth}: {loss(row.loss)}" for row in profile.rows)
    told = {
        "curve": (f"Loss by depth: {name}", caption, losses),
        "solved": (
            f"Where in depth tasks are solved: {name}",
            "Scores of the untrained model at each depth, task by task, and its next-token loss if it generates text; "
            "scores × 100, bands are 95 % intervals.",
            _best_depths(profile),
        ),
        "cka": (
            f"Similarity of depths: {name}",
            "Linear CKA of the vectors at all pairs of depths: 1 is the same up to rotation and scale.",
            f"{_farthest(profile.cka, 1)} the least alike.",
        ),
        "angles": (
            f"Angles between depths: {name}",
            "Angular distance of the last token’s states at all pairs of depths, from the embeddings (0) on. "
            "Light squares along the diagonal are runs of blocks that turn the states little.",
            f"{_farthest([[-(v or 0.0) for v in row] for row in profile.angular], 0)} the farthest apart.",
        ),
    }
    figures = profile_figures(profile, choice)
    return {kind: Picture(f"{kind}-{number}", *told[kind], figure) for kind, figure in figures.items()}


def _best_depths(profile: Profile) -> str:
    """In words: the depth at which each task scores best."""
    best: dict[str, DepthScoreRow] = {}
    for row in profile.task_scores:
        if row.task not in best or row.score > best[row.task].score:
            best[row.task] = row
    sentences = [f"{task} is best at depth {row.depth} ({score(row.score)})" for task, row in best.items()]
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


def training_picture(run: Run) -> Picture | None:
    """Losses, and evaluation scores where there are any."""
    trainings = {v.name: v.training for v in run.variants if v.training and v.training.rows}
    if not trainings:
        return None
    caption = "Loss of each healed model, the mean since the step logged before."
    scored = any(item.trials for item in trainings.values())
    if scored:
        caption += (
            " Below, its evaluation scores, each the mean over the held-out data; a ring marks the step whose weights "
            "were kept."
        )
    title = "Training loss and evaluation scores" if scored else "Training loss"
    ends = [f"{name} ends at {loss(item.rows[-1].loss)}{_kept_step(item)}" for name, item in trainings.items()]
    return Picture("training", title, caption, _some(ends), training_curves(trainings))


def _kept_step(training: Training) -> str:
    best = next((row for row in training.trials if row.step == training.best_step), None)
    return f", and is kept from step {best.step}, with a score of {score(best.score)}" if best else ""
