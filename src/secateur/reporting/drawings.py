"""The figures of a run, each with what is said about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from matplotlib.figure import Figure

from secateur.figures.depth import profile_figures
from secateur.figures.frontier import Point, frontier, size_curve
from secateur.figures.training import training_curves
from secateur.reporting.findings import Design, Findings, pareto
from secateur.reporting.printing import byte_size, count, duration, loss, percent, plural, score, span, speed
from secateur.reporting.run import Run
from secateur.reporting.saturation import Saturation, fit_saturation
from secateur.results import CostRow, DepthScoreRow, Profile, Training

MOST_LABELS = 24
"""Points beyond which only the best are labelled."""
MOST_PROFILES = 8
"""Profiles drawn in the page; the others' figures are in their own folders."""
MILLION = 1e6


@dataclass(frozen=True)
class Drawing:
    """A figure with what is said about it: ``title``, ``caption`` under it, and its content in words (``text``).

    ``part`` is the section of the page, ``base`` the model it is about, where it is about one.
    """

    part: str
    title: str
    caption: str
    text: str
    figure: Figure
    points: tuple[Point, ...] = ()
    base: str = ""


@dataclass(frozen=True)
class _Measure:
    """Something that a model costs: how it is called, read, and printed.

    ``gain``: more of it is better. ``bars`` says what ``low`` and ``high`` are.
    """

    key: str
    title: str
    axis: str
    read: Callable[[CostRow], float | None]
    say: Callable[[float], str]
    low: Callable[[CostRow], float | None] = lambda _: None
    high: Callable[[CostRow], float | None] = lambda _: None
    gain: bool = False
    bars: str = ""


_MEASURES = (
    _Measure("parameters", "Score against size", "Parameters, embedding table included", lambda c: c.parameters, count),
    _Measure("bytes", "Score against bytes on disk", "Bytes on disk", lambda c: c.bytes, byte_size),
    _Measure(
        "speed",
        "Score against throughput",
        "Short texts per second",
        lambda c: c.texts_per_second,
        speed,
        lambda c: c.speed_low,
        lambda c: c.speed_high,
        gain=True,
        bars="Level bars span the slowest and the fastest repetition.",
    ),
    _Measure(
        "latency",
        "Score against latency",
        "Seconds for one short text (median)",
        lambda c: c.latency_p50 or None,  # 0: not measured
        duration,
        lambda c: c.latency_p50,
        lambda c: c.latency_p95,
        bars="Level bars reach to the 95th percentile.",
    ),
)


def draw(findings: Findings, threshold: float) -> dict[str, Drawing]:
    """Every figure that the tables allow, by file name.

    Args:
        findings: What the run found.
        threshold: Million parameters that a point of score may cost.
    """
    drawn = _profiles(findings.run)
    for measure in _MEASURES:
        points = _points(findings, measure)
        if points:
            drawn[f"score-{measure.key}"] = _frontier(measure, points)
    drawn |= _saturations(findings, threshold)
    trainings = {v.name: v.training for v in findings.run.variants if v.training and v.training.rows}
    if trainings:
        drawn["training"] = _training(trainings)
    return drawn


def _training(trainings: Mapping[str, Training]) -> Drawing:
    """Losses, and the scores on the way where there are any."""
    caption = "Loss of each healed model, the mean since the step logged before."
    scored = any(item.trials for item in trainings.values())
    if scored:
        caption += (
            " Below, its score on the way, the mean over the held-out data that it was measured on; a ring marks the "
            "step whose weights were kept."
        )
    title = "Training loss and scores on the way" if scored else "Training loss"
    ends = [f"{name} ends at {loss(item.rows[-1].loss)}{_kept(item)}" for name, item in trainings.items()]
    return Drawing("training", title, caption, _some(ends), training_curves(trainings))


def _kept(training: Training) -> str:
    best = next((row for row in training.trials if row.step == training.best_step), None)
    return f", and is kept from step {best.step}, with a score of {score(best.score)}" if best else ""


def _some(parts: Sequence[str]) -> str:
    """Parts of a description; of very many the first, since nobody listens to hundreds."""
    more = f"; and {len(parts) - MOST_LABELS} more, in the table" if len(parts) > MOST_LABELS else ""
    return "; ".join(parts[:MOST_LABELS]) + more


def _profiles(run: Run) -> dict[str, Drawing]:
    return {
        f"{kind}-{number}": drawing
        for number, name in enumerate(list(run.profiles)[:MOST_PROFILES], 1)
        for kind, drawing in _profile(run, name).items()
    }


def _profile(run: Run, name: str) -> dict[str, Drawing]:
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
        "curve": ("depth", f"Loss by depth: {name}", caption, losses),
        "solved": (
            "depth",
            f"Where in depth tasks are solved: {name}",
            "What the untrained model is worth at each depth, task by task, and its next-token loss if it generates; "
            "scores × 100, bands are 95 % intervals.",
            _best_depths(profile),
        ),
        "cka": (
            "maps",
            f"Likeness of depths: {name}",
            "Linear CKA of the vectors at all pairs of depths: 1 is the same up to rotation and scale.",
            f"{_farthest(profile.cka, 1)} the least alike.",
        ),
        "angles": (
            "maps",
            f"Angles between depths: {name}",
            "Angular distance of the last token’s states at all pairs of depths, from the embeddings (0) on. "
            "Light squares along the diagonal are runs of blocks that turn the states little.",
            f"{_farthest([[-(v or 0.0) for v in row] for row in profile.angular], 0)} the farthest apart.",
        ),
    }
    drawn = profile_figures(profile, choice)
    return {kind: Drawing(*told[kind], figure, base=name) for kind, figure in drawn.items()}


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


def _points(findings: Findings, measure: _Measure) -> tuple[Point, ...]:
    """A point for each design that is scored and has that cost."""
    designs: list[tuple[Design, CostRow, float]] = []
    for design in findings.designs:
        value = measure.read(design.cost) if design.cost else None
        if value is not None and design.average is not None and design.cost is not None:
            designs.append((design, design.cost, value))
    best = set(pareto([(-v if measure.gain else v, d.average.value) for d, _, v in designs if d.average]))
    few = len(designs) <= MOST_LABELS
    return tuple(
        _point(findings.run.folder, design, cost, measure, index in best, few or index in best)
        for index, (design, cost, _) in enumerate(designs)
    )


def _point(run: Path, design: Design, cost: CostRow, measure: _Measure, best: bool, labelled: bool) -> Point:
    average, first = design.average, design.first
    assert average is not None
    value = measure.read(cost)
    assert value is not None
    within = span(average.low, average.high)
    note = (
        design.name,
        f"{first.depth} of {first.blocks} blocks; score {score(average.value)}" + (f" ({within})" if within else ""),
        f"{count(cost.parameters)} parameters; {byte_size(cost.bytes)}; {speed(cost.texts_per_second)} texts/s"
        + (f"; {duration(cost.latency_p50)} for one" if cost.latency_p50 else ""),
        command_of(design),
    )
    return Point(
        series=first.series,
        label=("" if first.depth is None else str(first.depth)) if labelled else "",
        score=average.value,
        low=average.low,
        high=average.high,
        cost=value,
        cost_low=measure.low(cost),
        cost_high=measure.high(cost),
        best=best,
        note=tuple(line for line in note if line),
        link=folder_link(run, first.folder),
    )


def command_of(design: Design) -> str:
    """The command that made a design's model, the last of its history."""
    origin = design.first.origin
    return (*origin.history, origin.provenance.command)[len(origin.history) - 1] if origin else ""


def folder_link(run: Path, folder: Path | None) -> str:
    """A model's folder as seen from the report; a relative path, whatever its name."""
    return quote(folder.relative_to(run).as_posix()) + "/" if folder else ""


def _frontier(measure: _Measure, points: tuple[Point, ...]) -> Drawing:
    text = [
        f"{point.series}, {point.label or 'unlabelled'} blocks: {score(point.score)} at {measure.say(point.cost)}"
        for point in sorted(points, key=lambda point: not point.best)
    ]
    bars = "Upright bars are 95 % intervals. " if any(point.low is not None for point in points) else ""
    if any(point.cost_low is not None for point in points):
        bars += measure.bars
    caption = (
        f"Average score of each model against its cost: {measure.axis[0].lower()}{measure.axis[1:]}. Numbers are "
        f"blocks kept; solid lines join one series, the dashed one the best models at their cost. {bars}"
    )
    return Drawing("cost", measure.title, caption.strip(), _some(text), frontier(points, measure.axis), points)


# Score against size ---------------------------------------------------------------------------------------------------


def _saturations(findings: Findings, threshold: float) -> dict[str, Drawing]:
    """For each base model a curve through its series with the most sizes, the first of equally many.

    Cuts of one model lie on one curve; those of another have a plateau of their own.
    """
    series: dict[str, dict[str, list[Point]]] = {}
    sized = [d for d in findings.designs if d.cost is not None and d.average is not None]
    for design, point in zip(sized, _points(findings, _MEASURES[0]), strict=True):
        series.setdefault(design.first.base, {}).setdefault(point.series, []).append(replace(point, label=""))
    largest = {base: max(own.values(), key=len) for base, own in series.items()}
    drawn = [_saturation(base, points, threshold) for base, points in largest.items() if len(points) > 1]
    return {f"saturation-{number}": drawing for number, drawing in enumerate(drawn[:MOST_PROFILES], 1)}


def _saturation(base: str, points: Sequence[Point], threshold: float) -> Drawing:
    fitted = fit_saturation([point.cost for point in points], [point.score for point in points], threshold * MILLION)
    curve = fitted if isinstance(fitted, Saturation) else None
    ends = (curve.score, curve.plateau, curve.dear) if curve else (None, None, None)
    return Drawing(
        "size",
        f"Score against size: {base}",
        f"{points[0].series}: {plural(len(points), 'model')}. {saturation_sentence(fitted)}",
        _some([f"{count(point.cost)} parameters: {score(point.score)}" for point in points]),
        size_curve(points, *ends),
        tuple(points),
    )


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
    price = count(fitted.threshold)
    if fitted.dear is not None:
        return f"{fit} Beyond {count(fitted.dear)} parameters, another point costs more than {price} parameters."
    if fitted.price(fitted.largest) <= fitted.threshold:
        return f"{fit} At every size measured, another point costs less than {price} parameters."
    return f"{fit} Already at the smallest size measured, another point costs more than {price} parameters."


def captions(drawn: Mapping[str, Drawing], part: str, base: str = "") -> dict[str, Drawing]:
    """The drawings of one part of the page, and of one base model where it is named."""
    return {key: item for key, item in drawn.items() if item.part == part and (not base or item.base == base)}
