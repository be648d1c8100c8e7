"""Tables of results, which the terminal, the report and the model card show alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import yaml

from secateur import document as doc
from secateur.choosing.budgets import cut_cost
from secateur.choosing.choose import ranges
from secateur.reporting.findings import MARGIN, GroupComparison, RunGroup, Summary
from secateur.reporting.pictures import folder_link
from secateur.reporting.run import Run, Scouted
from secateur.reporting.verdict import Recommendation
from secateur.reporting.vocabulary import cut_vocabularies
from secateur.results import (
    CostRow,
    DepthRow,
    DepthScoreRow,
    Origin,
    Profile,
    RungRow,
    Scout,
    Training,
    VocabularyCut,
)

OUTCOMES = {
    "better": "significantly better",
    "same": "no significant difference",
    "undecided": f"no significant difference; {100 * MARGIN:.0f} points or more may be lost",
    "worse": "significantly worse",
    "unknown": "no interval",
}
SPEED = "Speed is the median over repetitions, with the slowest and the fastest."


# Profiles -------------------------------------------------------------------------------------------------------------


def profile_table(profile: Profile, choice: Mapping[str, int]) -> doc.Table:
    """What was measured at each depth; ``choice`` is the name of a choice → its depth."""
    title = (
        f"{profile.model}: {profile.depth} layers, {profile.pooling} pooling, scale {profile.scale:g}, "
        f"{profile.dtype}, texts of at most {profile.max_length} tokens."
    )

    def depth(row: DepthRow) -> doc.Cell:
        return doc.Cell(str(row.depth), tag=", ".join(name for name, depth in choice.items() if depth == row.depth))

    columns: dict[str, Callable[[DepthRow], str | doc.Cell]] = {
        "Depth": depth,
        "Loss (nats)": lambda row: _with_interval(row.loss, row.loss_low, row.loss_high, doc.loss),
        "Standard error": lambda row: doc.loss(row.loss_se),
        "Probability": lambda row: doc.percent(row.selection_probability, 0),
        "nDCG@10": lambda row: doc.loss(row.ndcg_at_10),
        "Next-token loss (nats)": lambda row: doc.loss(row.next_token_loss),
        "Block Influence": lambda row: doc.loss(row.block_influence),
        "Effective rank": lambda row: doc.number(row.effective_rank),
        "Mean cosine": lambda row: doc.loss(row.mean_cosine),
    }
    return doc.Table.of(title, profile.rows, columns).filled()


def depth_scores_table(measured: Profile | Scout) -> doc.Table:
    """Depths × tasks, the best depth of each task marked."""
    tasks: dict[str, dict[int, DepthScoreRow]] = {}
    for row in measured.task_scores:
        tasks.setdefault(f"{row.task} ({row.kind}, {row.metric})", {})[row.depth] = row
    best = {task: max(own.values(), key=lambda row: row.score) for task, own in tasks.items()}

    def cell(task: str, depth: int) -> str | doc.Cell:
        row = tasks[task].get(depth)
        if row is None:
            return doc.NONE
        shown = _with_interval(row.score, row.low, row.high)
        return replace(shown, tag="best") if row is best[task] else shown

    depths = sorted({row.depth for row in measured.task_scores})
    model = "scout’s model" if isinstance(measured, Scout) else "untrained model"
    title = f"Scores (× 100) of the {model} at each depth, with 95 % intervals."
    return doc.Table(
        title, ["Depth", *tasks], [(str(depth), *(cell(task, depth) for task in tasks)) for depth in depths]
    )


def _with_interval(
    value: float | None, low: float | None, high: float | None, show: Callable[[float | None], str] = doc.score
) -> doc.Cell:
    return doc.Cell(show(value), (doc.span(low, high, show),) if low is not None else ())


# Scouts ---------------------------------------------------------------------------------------------------------------


def rung_table(scouted: Scouted) -> doc.Table:
    """What a scout says of each depth."""
    scout = scouted.table
    title = (
        f"{scout.model}: average score (× 100) of each depth after the scout’s training, on {scouted.judge}. "
        f"Differences are in points, to all {scout.depth} layers in the same training; ranges are 95 % intervals, "
        "those of differences paired by row."
    )
    columns: dict[str, Callable[[RungRow], str | doc.Cell]] = {
        "Depth": lambda row: doc.Cell(str(row.depth), tag="chosen" if row.depth == scouted.chosen else ""),
        "Training": lambda row: "trained" if row.trained else "scored only",
        "Parameters": lambda row: doc.count(cut_cost(scout, range(row.depth)).parameters),
        "Score": _rung_score,
        "Difference": lambda row: doc.NONE if row.depth == scout.depth else _rung_difference(row),
    }
    return doc.Table.of(title, scout.rows, columns, texts=2).filled()


def untrained_choices_table(scouted: Scouted, profile: Profile, choice: Mapping[str, int]) -> doc.Table:
    """The depths that were chosen from the untrained profile, each with what the scout measured nearest to it.

    Of two depths that are equally near it is the smaller one.
    """
    rungs = scouted.table.rows

    def nearest(depth: int) -> RungRow:
        found: RungRow = min(rungs, key=lambda row: (abs(row.depth - depth), row.depth))
        return found

    columns: dict[str, Callable[[tuple[str, int]], str | doc.Cell]] = {
        "Choice": lambda item: item[0],
        "Depth": lambda item: str(item[1]),
        "Untrained loss (nats)": lambda item: doc.loss(profile.rows[item[1] - 1].loss),
        "Nearest depth scored": lambda item: str(nearest(item[1]).depth),
        "Its score": lambda item: _rung_score(nearest(item[1])),
        "Its difference": lambda item: (
            doc.NONE if nearest(item[1]).depth == scouted.table.depth else _rung_difference(nearest(item[1]))
        ),
    }
    title = (
        "For comparison: what is chosen from the untrained profile, by L3Prune’s rule unless choice.json was edited, "
        "and what the scout measured at the depth nearest to it."
    )
    return doc.Table.of(title, sorted(choice.items(), key=lambda item: item[1]), columns)


def scout_origin(scouted: Scouted, publish: Callable[[str], str] = str) -> str:
    """Where a scout's numbers come from: the command as ``publish`` shows it, seed, steps, depths and data."""
    made, training = scouted.table.provenance, scouted.training
    depths = ", ".join(str(row.depth) for row in scouted.table.rows if row.trained)
    steps = f"{doc.plural(training.steps, 'step')} in {doc.duration(training.seconds)}, " if training else ""
    files = dict.fromkeys(training.provenance.data if training else made.data)
    data = ", ".join(f"{file.name} ({file.rows:,} rows)" for file in files)
    parts = (
        publish(made.command),
        "" if made.seed is None else f"seed {made.seed}",
        f"{steps}depths {depths} at once",
        data and f"data {data}",
    )
    return "; ".join(part for part in parts if part)


def _rung_score(row: RungRow) -> doc.Cell:
    return _with_interval(row.score, row.low, row.high)


def _rung_difference(row: RungRow) -> doc.Cell:
    low, high = row.difference_low, row.difference_high
    shown = _with_interval(row.difference, low, high, doc.signed)
    if low is None or high is None or low <= 0 <= high:
        return shown
    return replace(shown, trend="better" if low > 0 else "worse")


# Models ---------------------------------------------------------------------------------------------------------------


def model_table(summary: Summary) -> doc.Table:
    """Costs, average scores and differences of the run groups."""
    title = (
        "What each model costs, and its average score over its tasks (× 100). Differences are in points, to the full "
        f"model named with them; ranges are 95 % intervals. {SPEED}"
    )
    compared = summary.compared
    columns: dict[str, Callable[[RunGroup], str | doc.Cell]] = {
        "Model": lambda g: replace(_name(g), link=folder_link(summary.run.folder, g.first.folder)),
        "Layers": lambda g: (
            f"{g.first.depth} of {g.first.blocks}" if g.first.blocks else str(g.first.depth or doc.NONE)
        ),
        "Tokens": lambda g: kept_tokens(g.first.vocabulary),
        **{name: partial(_of_cost, show) for name, show in SIZES.items()},
        "Texts per second": partial(_of_cost, _speed),
        "Average score": _average,
        "Difference": lambda g: _difference(compared[g.name]) if g.name in compared else doc.NONE,
        "Difference to the model as it came": lambda g: (
            _difference(summary.originals[g.name])
            if g.name in summary.originals and is_other(compared.get(g.name), summary.originals[g.name])
            else doc.NONE
        ),
        "Tasks better / worse": lambda g: (
            f"{compared[g.name].count(1)} / {compared[g.name].count(-1)}" if g.name in compared else doc.NONE
        ),
    }
    groups = [group.first.series for group in summary.groups]
    return doc.Table.of(title, summary.groups, columns, groups=groups).filled()


def _of_cost(show: Callable[[CostRow], str | doc.Cell], group: RunGroup) -> str | doc.Cell:
    return show(group.cost) if group.cost else doc.NONE


def _name(group: RunGroup) -> doc.Cell:
    tag = "full model" if group.first.is_full else "baseline" if group.first.is_baseline else ""
    return doc.Cell(group.name, tag=tag)


def _average(group: RunGroup) -> doc.Cell:
    average = group.average
    if average is None:
        return doc.Cell(doc.NONE)
    shown = _with_interval(average.value, average.low, average.high)
    if not average.seed_error or len(group.seeds) < 2:
        return shown
    return replace(shown, notes=(*shown.notes, f"{len(group.seeds)} seeds, ± {doc.score(average.seed_error)}"))


def is_other(item: GroupComparison | None, original: GroupComparison) -> bool:
    """Whether the model as it came is another than the one that a group is compared with."""
    return item is None or item.reference is not original.reference


def _difference(item: GroupComparison) -> doc.Cell:
    difference, full = item.difference, f"to {doc.shorten(item.reference.first.series)}"
    full += ", which had only the scout’s training" if item.is_polished_more else ""
    if difference.low is None:
        return doc.Cell(doc.signed(difference.value), (full,))
    within = doc.span(difference.low, difference.high, doc.signed)
    return doc.Cell(doc.signed(difference.value), (within, full, OUTCOMES[item.outcome]))


def kept_blocks(origin: Origin) -> str:
    """Which layers are kept: ``all``, ``the first 7``, or ranges of their numbers as ``--keep`` takes them."""
    if origin.kept == tuple(range(len(origin.kept))):
        amount = len(origin.kept)
        return "all" if amount == origin.depth else f"the first {amount}" if amount > 1 else "the first"
    return f"layers {ranges(origin.kept)} (counted from 0, as by --keep)"


def kept_tokens(cut: VocabularyCut | None) -> str:
    """How many tokens a cut vocabulary has, of how many."""
    return doc.NONE if cut is None else f"{cut.row.tokens:,} of {cut.tokens:,}"


def vocabulary_table(cuts: Mapping[str, VocabularyCut]) -> doc.Table:
    """How vocabularies were cut; ``cuts`` is by base model."""
    columns: dict[str, Callable[[tuple[str, VocabularyCut]], str | doc.Cell]] = {
        "Base model": lambda item: item[0],
        "Chosen by": lambda item: doc.Cell(f"{item[1].texts:,} texts", (", ".join(item[1].files),)),
        "Tokens": lambda item: kept_tokens(item[1]),
        "Coverage of held-out texts": lambda item: doc.percent(item[1].row.coverage),
        "Texts with a token that was cut": lambda item: doc.percent(item[1].row.changed),
        "Tokens per text": lambda item: f"{item[1].row.tokens_per_text:.1f} (before: {item[1].tokens_per_text:.1f})",
        "Newly unknown tokens": lambda item: doc.percent(item[1].row.unknown, 2) if item[1].row.unknown else doc.NONE,
        "Coverage of tasks": lambda item: doc.Cell(
            ", ".join(f"{task} {doc.percent(share)}" for task, share in item[1].task_coverage.items()) or doc.NONE
        ),
    }
    title = "The most frequent tokens are kept, and those that rare words are split into; coverage counts occurrences."
    return doc.Table.of(title, list(cuts.items()), columns, texts=2).filled()


def origin_table(run: Run) -> doc.Table:
    """How each model was made."""
    built = [(variant.name, variant.origin, variant.training) for variant in run.variants if variant.origin]
    made: dict[str, Callable[[tuple[str, Origin, Training | None]], str | doc.Cell]] = {
        "Model": lambda m: m[0],
        "Base model": lambda m: m[1].base_model,
        "Layers kept": lambda m: kept_blocks(m[1]),
        "Pooling": lambda m: m[1].pooling,
        "Check": lambda m: f"{m[1].check:.1e}",
        "Steps": lambda m: str(m[2].steps) if m[2] else doc.NONE,
        "Trained parameters": lambda m: doc.count(m[2].trained_parameters) if m[2] else doc.NONE,
        "Training time": lambda m: doc.duration(m[2].seconds) if m[2] else doc.NONE,
        "Seed": lambda m: doc.NONE if m[2] is None or m[2].provenance.seed is None else str(m[2].provenance.seed),
    }
    if cut_vocabularies(run):
        made["Tokens kept"] = lambda m: kept_tokens(m[1].vocabulary)
    title = (
        "Layers kept, training, and the check made when the folder was written: the largest difference between its "
        "vectors and those of the model it was written from."
    )
    return doc.Table.of(title, built, made, texts=4)


# Scores and costs -----------------------------------------------------------------------------------------------------


def task_table(groups: Sequence[RunGroup], found: Recommendation) -> doc.Table:
    """Tasks × models, the more numerous as rows, as a heat map: coloured by the difference to the full model."""
    examples = {row.task: row for group in groups for row in group.rows.values()}
    tasks = {task: f"{row.type}, {row.metric}, {row.samples} samples" for task, row in examples.items()}
    whole = ", ".join(dict.fromkeys(doc.shorten(item.reference.name) for item in found.compared.values()))
    title = "Each task’s own metric, × 100." + (
        f" Below a score and in colour: the difference to {whole} with its 95 % interval, ▲ or ▼ where it is "
        "significant. One interval of twenty misses by chance."
        if whole
        else ""
    )

    def cell(group: RunGroup, task: str) -> doc.Cell | str:
        own, beside = group.scores.get(task), found.compared.get(group.name)
        if own is None:
            return doc.NONE
        if beside is None:
            return _with_interval(own.value, own.low, own.high)
        difference = beside.tasks[task]
        within = doc.span(difference.low, difference.high, doc.signed)
        notes = tuple(part for part in (doc.signed(difference.value), within) if part)
        trend = {1: "better", -1: "worse", 0: ""}[difference.sign]
        return doc.Cell(doc.score(own.value), notes, trend=trend, heat=difference.value)

    if len(groups) > len(tasks):
        rows = [(_name(group), *(cell(group, task) for task in tasks)) for group in groups]
        headings = ["Model", *(f"{task} ({about})" for task, about in tasks.items())]
        return doc.Table(title, headings, rows, groups=[group.first.series for group in groups])
    by_task = [(doc.Cell(task, (about,)), *(cell(group, task) for group in groups)) for task, about in tasks.items()]
    return doc.Table(title, ["Task", *(group.name for group in groups)], by_task)


SIZES: dict[str, Callable[[CostRow], str | doc.Cell]] = {
    "Parameters": lambda row: doc.count(row.parameters),
    "of which embedding table": lambda row: doc.count(row.embedding_parameters),
    "On disk": lambda row: doc.byte_size(row.bytes),
}


def _speed(row: CostRow, kind: str = "") -> doc.Cell:
    """Texts per second with their range; ``kind`` is ``long_`` for those of long texts."""
    rate = getattr(row, f"{kind}texts_per_second")
    return doc.Cell(
        doc.speed(rate), (doc.span(getattr(row, f"{kind}speed_low"), getattr(row, f"{kind}speed_high"), doc.speed),)
    )


def cost_table(rows: Sequence[CostRow]) -> doc.Table:
    """Costs by model, without what was not measured."""

    def timed(row: CostRow, kind: str, length: str) -> str | doc.Cell:
        tokens, batch = getattr(row, f"{length}_tokens"), getattr(row, f"{length}_batch")
        shown = _speed(row, kind)
        batches = (f"{doc.number(tokens)} tokens, batches of {batch}",) if batch else ()
        return replace(shown, notes=shown.notes + batches) if getattr(row, f"{kind}texts_per_second") else doc.NONE

    columns: dict[str, Callable[[CostRow], str | doc.Cell]] = {
        "Model": lambda row: row.model,
        "dtype": lambda row: row.dtype,
        "Layers": lambda row: str(row.depth),
        **SIZES,
        "Weights in memory": lambda row: doc.byte_size(row.memory_bytes or None),
        "Peak memory": lambda row: doc.byte_size(row.peak_bytes),
        "Operations per token": lambda row: doc.Cell(
            doc.count(row.flops_per_token or None),
            (f"text of {row.flops_tokens} tokens",) if row.flops_per_token else (),
        ),
        "Loading": lambda row: doc.duration(row.load_seconds),
        "One short text, median": lambda row: doc.duration(row.latency_p50),
        "95th percentile": lambda row: doc.duration(row.latency_p95),
        "Short texts per second": lambda row: timed(row, "", "short"),
        "Long texts per second": lambda row: timed(row, "long_", "long"),
    }
    where = f" on {rows[0].device}, {doc.plural(rows[0].threads, 'thread')}" if rows[0].device else ""
    title = (
        f"Counted and measured side by side{where}. Times include the tokenizer; ranges are from the slowest to the "
        "fastest repetition."
    )
    return doc.Table.of(title, rows, columns, texts=2).filled()


# Trainings ------------------------------------------------------------------------------------------------------------


def by_step(title: str, curves: Mapping[str, Mapping[int, str]]) -> doc.Table:
    """Steps × models; ``curves`` is the name of a model → step → what is shown."""
    steps = sorted({step for curve in curves.values() for step in curve})
    return doc.Table(
        title,
        ["Step", *curves],
        [(str(step), *(curve.get(step, doc.NONE) for curve in curves.values())) for step in steps],
    )


def settings_text(training: Training, publish: Callable[[Any], Any] = lambda content: content) -> str:
    """A training's settings and prompts as YAML."""
    content = {"settings": publish(dict(training.settings)), "prompts": dict(training.prompts)}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()
