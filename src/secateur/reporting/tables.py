"""Tables of results, which the terminal, the report and the model card show alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import yaml

from secateur import document as doc
from secateur.choosing.budgets import cut_cost, layers_at
from secateur.choosing.choose import ranges
from secateur.choosing.selectors import is_prefix
from secateur.document import Cell, Table, with_interval
from secateur.reporting.findings import MARGIN, Estimate, GroupComparison, RunGroup, Summary
from secateur.reporting.run import Scouted
from secateur.results import CostRow, DepthRow, DepthScoreRow, Origin, Profile, RungRow, Scout, Training, VocabularyCut

OUTCOMES = {
    "better": "significantly better",
    "same": "no significant difference",
    "undecided": f"no significant difference; {100 * MARGIN:.0f} points or more may be lost",
    "worse": "significantly worse",
    "unknown": "no interval",
}
TRENDS = {1: "better", 0: "", -1: "worse"}
SPEED = "Speed is the median over repetitions, with the slowest and the fastest."

# Depths ---------------------------------------------------------------------------------------------------------------


def profile_table(profile: Profile, choice: Mapping[str, int]) -> Table:
    """What was measured at each depth; ``choice`` is the name of a choice → its depth."""
    title = (
        f"{profile.model}: {profile.depth} layers, {profile.pooling} pooling, scale {profile.scale:g}, "
        f"{profile.dtype}, {doc.plural(profile.batches, 'batch')} of {profile.batch_size}, texts of at most "
        f"{profile.max_length} tokens."
    )
    columns: dict[str, Callable[[DepthRow], str | Cell]] = {  # short: they fit into 80 characters
        "Depth": lambda row: Cell(
            str(row.depth), tag=", ".join(name for name, depth in choice.items() if depth == row.depth)
        ),
        "Loss (nats)": _loss,
        "Chosen": lambda row: doc.percent(row.selection_probability, 0),
        "nDCG@10": lambda row: doc.loss(row.ndcg_at_10),
        "Next token (nats)": lambda row: doc.loss(row.next_token_loss),
        "Block Influence": lambda row: doc.loss(row.block_influence),
        "Rank": lambda row: doc.number(row.effective_rank),
        "Mean cosine": lambda row: doc.loss(row.mean_cosine),
    }
    return Table.of(title, profile.rows, columns).filled()


def _loss(row: DepthRow) -> Cell:
    """With its interval; of too few batches for one, with its standard error."""
    if row.loss_low is None and row.loss_se is not None:
        return Cell(doc.loss(row.loss), (f"± {doc.loss(row.loss_se)}",))
    return with_interval(row.loss, row.loss_low, row.loss_high, doc.loss)


def depth_scores_table(measured: Profile | Scout) -> Table:
    """Depths × tasks, the best depth of each task marked."""
    tasks: dict[str, dict[int, DepthScoreRow]] = {}
    for row in measured.task_scores:
        tasks.setdefault(f"{row.task} ({row.kind}, {row.metric})", {})[row.depth] = row
    best = {task: max(own.values(), key=lambda row: row.score) for task, own in tasks.items()}

    def cell(task: str, depth: int) -> str | Cell:
        row = tasks[task].get(depth)
        if row is None:
            return doc.NONE
        return replace(with_interval(row.score, row.low, row.high), tag="best" if row is best[task] else "")

    depths = sorted({row.depth for row in measured.task_scores})
    model = "scout’s model" if isinstance(measured, Scout) else "untrained model"
    title = f"Scores (× 100) of the {model} at each depth, with 95 % intervals."
    return Table(title, ["Depth", *tasks], [(str(depth), *(cell(task, depth) for task in tasks)) for depth in depths])


def rung_table(scouted: Scouted) -> Table:
    scout = scouted.table
    title = (
        f"{scout.model}: average score (× 100) of each depth after the scout’s training, on {scouted.judge}. "
        f"Differences are in points, to all {scout.depth} layers in the same training; ranges are 95 % intervals, "
        "those of differences paired by row."
    )
    columns: dict[str, Callable[[RungRow], str | Cell]] = {
        "Depth": lambda row: Cell(str(row.depth), tag="chosen" if row.depth == scouted.chosen else ""),
        "Training": lambda row: "trained" if row.trained else "scored only",
        "Parameters": lambda row: doc.count(cut_cost(scout, layers_at(scout, row.depth)).parameters),
        "Score": lambda row: with_interval(row.score, row.low, row.high),
        "Difference": lambda row: _rung_difference(row, scout.depth),
    }
    return Table.of(title, scout.rows, columns, texts=2).filled()


def _rung_difference(row: RungRow, full: int) -> str | Cell:
    if row.depth == full:
        return doc.NONE
    found = Estimate(row.difference, row.difference_low, row.difference_high)
    return replace(with_interval(found.value, found.low, found.high, doc.signed), trend=TRENDS[found.sign])


# Models ---------------------------------------------------------------------------------------------------------------


def model_table(summary: Summary) -> Table:
    """Costs, average scores and differences of the run groups."""
    title = (
        "What each model costs, and its average score over its tasks (× 100). Differences are in points, to the full "
        f"model named with them; ranges are 95 % intervals. {SPEED}"
    )
    compared = summary.compared

    def of_cost(show: Callable[[CostRow], str | Cell]) -> Callable[[RunGroup], str | Cell]:
        return lambda group: show(group.cost) if group.cost else doc.NONE

    def linked(group: RunGroup) -> Cell:
        """Its name, which leads to its folder, as seen from the run's."""
        folder = group.first.folder
        link = quote(folder.relative_to(summary.run.folder).as_posix()) + "/" if folder else ""
        return replace(_name(group), link=link)

    columns: dict[str, Callable[[RunGroup], str | Cell]] = {
        "Model": linked,
        "Layers": _layers,
        "Tokens": lambda group: kept_tokens(group.first.vocabulary),
        **{name: of_cost(show) for name, show in SIZES.items()},
        "Texts per second": of_cost(_speed),
        "Average score": _average,
        "Difference": lambda group: _difference(compared.get(group.name)),
        "Tasks better / worse": lambda group: (
            f"{item.count(1)} / {item.count(-1)}" if (item := compared.get(group.name)) else doc.NONE
        ),
    }
    return Table.of(title, summary.groups, columns).filled()


def _name(group: RunGroup) -> Cell:
    tag = "full model" if group.first.is_full else "baseline" if group.first.is_baseline else ""
    return Cell(group.name, tag=tag)


def _layers(group: RunGroup) -> Cell:
    depth, blocks, origin = group.first.depth, group.first.blocks, group.first.origin
    kept = "" if origin is None or is_prefix(origin.kept) else kept_blocks(origin)
    return Cell(f"{depth} of {blocks}" if blocks else str(depth or doc.NONE), (kept,) if kept else ())


def _average(group: RunGroup) -> Cell:
    found, seeds = group.average, len(group.seeds)
    if found is None:
        return Cell(doc.NONE)
    shown = with_interval(found.value, found.low, found.high)
    if not found.seed_error or seeds < 2:
        return shown
    return replace(shown, notes=(*shown.notes, f"{seeds} seeds, ± {doc.score(found.seed_error)}"))


def _difference(item: GroupComparison | None) -> str | Cell:
    if item is None:
        return doc.NONE
    found, full = item.difference, f"to {doc.shorten(item.reference.first.series)}"
    within = (doc.span(found.low, found.high, doc.signed), full, OUTCOMES[item.outcome])
    return Cell(doc.signed(found.value), within if found.low is not None else (full,))


def kept_blocks(origin: Origin) -> str:
    """Which layers are kept: ``all``, ``the first 7``, or ranges of their numbers as ``--keep`` takes them."""
    if is_prefix(origin.kept):
        amount = len(origin.kept)
        return "all" if amount == origin.depth else f"the first {amount}" if amount > 1 else "the first"
    return f"layers {ranges(origin.kept)} (counted from 0, as by --keep)"


def kept_tokens(cut: VocabularyCut | None) -> str:
    """How many tokens a cut vocabulary has, of how many."""
    return doc.NONE if cut is None else f"{cut.row.tokens:,} of {cut.tokens:,}"


def training_in_words(training: Training) -> str:
    """``30 steps (weights of step 20) in 61 s, 1.2 M parameters trained, seed 42``."""
    best = f" (weights of step {training.best_step})" if training.best_step is not None else ""
    seed = doc.NONE if training.provenance.seed is None else training.provenance.seed
    trained = f"{doc.count(training.trained_parameters)} parameters trained"
    return f"{doc.plural(training.steps, 'step')}{best} in {doc.duration(training.seconds)}, {trained}, seed {seed}"


def settings_text(training: Training, publish: Callable[[Any], Any] = lambda content: content) -> str:
    content = {"settings": publish(dict(training.settings)), "prompts": dict(training.prompts)}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


# Scores and costs -----------------------------------------------------------------------------------------------------


def task_table(groups: Sequence[RunGroup], compared: Mapping[str, GroupComparison]) -> Table:
    """Tasks × models, the more numerous as rows, as a heat map: coloured by the difference to the full model."""
    examples = {task: group.first.scores[task] for group in groups for task in group.tasks}
    tasks = {task: f"{row.type}, {row.metric}, {doc.plural(row.samples, 'sample')}" for task, row in examples.items()}
    references = list(dict.fromkeys(doc.shorten(item.reference.name) for item in compared.values()))
    whole = references[0] if len(references) == 1 else "the full model that the table of models names"
    title = "Each task’s own metric, × 100." + (
        f" Below a score and in colour: the difference to {whole} with its 95 % interval, ▲ or ▼ where it is "
        "significant. One interval of twenty misses by chance."
        if references
        else ""
    )

    def cell(group: RunGroup, task: str) -> Cell | str:
        own, beside = group.scores.get(task), compared.get(group.name)
        if own is None:
            return doc.NONE
        if beside is None:
            return with_interval(own.value, own.low, own.high)
        difference = beside.tasks[task]
        within = doc.span(difference.low, difference.high, doc.signed)
        notes = tuple(part for part in (doc.signed(difference.value), within) if part)
        return Cell(doc.score(own.value), notes, trend=TRENDS[difference.sign], heat=difference.value)

    rows = [(_name(group), *(cell(group, task) for task in tasks)) for group in groups]
    table = Table(title, ["Model", *(f"{task} ({about})" for task, about in tasks.items())], rows)
    return table if len(groups) > len(tasks) else table.transposed()


SIZES: dict[str, Callable[[CostRow], str | Cell]] = {
    "Parameters": lambda row: doc.count(row.parameters),
    "of which embedding table": lambda row: doc.count(row.embedding_parameters),
    "On disk": lambda row: doc.byte_size(row.bytes),
}


def _speed(row: CostRow, kind: str = "", length: str = "") -> str | Cell:
    """Texts per second with their range and, of texts of a ``length``, how they were timed; ``kind``: ``long_``."""
    rate = getattr(row, f"{kind}texts_per_second")
    ends = getattr(row, f"{kind}speed_low"), getattr(row, f"{kind}speed_high")
    notes = [doc.span(*ends, doc.speed)] if ends[0] < ends[1] else []  # one repetition has no range
    if length and (batch := getattr(row, f"{length}_batch")):
        notes.append(f"{doc.number(getattr(row, f'{length}_tokens'), 'g')} tokens, batches of {batch}")
    return Cell(doc.speed(rate), tuple(notes)) if rate else doc.NONE


def cost_table(rows: Sequence[CostRow]) -> Table:
    """Costs by model, without what was not measured."""
    columns: dict[str, Callable[[CostRow], str | Cell]] = {
        "Model": lambda row: row.model,
        "dtype": lambda row: row.dtype,
        "Layers": lambda row: str(row.depth),
        **SIZES,
        "Weights in memory": lambda row: doc.byte_size(row.memory_bytes or None),
        "Peak memory": lambda row: doc.byte_size(row.peak_bytes),
        "Operations per token": lambda row: Cell(
            doc.count(row.flops_per_token or None),
            (f"text of {row.flops_tokens} tokens",) if row.flops_per_token else (),
        ),
        "Loading": lambda row: doc.duration(row.load_seconds),
        "One short text, median": lambda row: doc.duration(row.latency_p50),
        "95th percentile": lambda row: doc.duration(row.latency_p95),
        "Short texts per second": lambda row: _speed(row, "", "short"),
        "Long texts per second": lambda row: _speed(row, "long_", "long"),
    }
    where = f" on {rows[0].device}, {doc.plural(rows[0].threads, 'thread')}" if rows[0].device else ""
    title = (
        f"Counted and measured side by side{where}. Times include the tokenizer; ranges are from the slowest to the "
        "fastest repetition."
    )
    return Table.of(title, rows, columns, texts=2).filled()
