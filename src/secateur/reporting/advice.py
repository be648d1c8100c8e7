"""What a scout found and what the cut of a vocabulary did, in sentences."""

from __future__ import annotations

from collections.abc import Callable

from secateur.choosing.evidence import choose_rung
from secateur.document import percent, shorten
from secateur.errors import SecateurError
from secateur.reporting.run import Run, Scouted
from secateur.results import VocabularyCut


def scout_sentences(run: Run) -> list[str]:
    """For each scout that was chosen by, or may yet be: the depth, and why."""
    decided = {scout.base for scout in run.scouts if scout.chosen is not None}
    told = [scout for scout in run.scouts if scout.chosen is not None or scout.base not in decided]
    return [f"{shorten(scout.name)}, on {scout.judge}: {_choice(run, scout)}" for scout in told]


def _choice(run: Run, scout: Scouted) -> str:
    """What the scores recommend, and the depth that is chosen where it is another."""
    chosen = f"{scout.chosen} of {scout.table.depth} layers are chosen" if scout.chosen else "no depth is chosen yet"
    try:
        recommended = choose_rung(run.budget, scout.table)
    except SecateurError:  # of a budget, or a table, that was edited since
        return f"{chosen}."
    reason = recommended.reason + (f" Note: {recommended.warning}." if recommended.warning else "")
    if scout.chosen == len(recommended.blocks):
        return reason
    return f"{chosen}; by these scores it would be this: {reason}"


def vocabulary_facts(cut: VocabularyCut, publish: Callable[[str], str] = str) -> list[str]:
    """What was cut, by which texts, and what that does to texts like these; ``publish`` shows the name of a file."""
    row = cut.row
    facts = [
        f"Vocabulary: {row.tokens:,} of {cut.tokens:,} tokens, chosen by {cut.texts:,} texts of "
        f"{', '.join(map(publish, cut.files))}.",
        f"Of texts like these that were held out, {percent(row.coverage)} of the tokens stay, and "
        f"{percent(row.changed)} of the texts have one that does not; a text has {row.tokens_per_text:.1f} tokens on "
        f"average, {cut.tokens_per_text:.1f} before.",
    ]
    if row.unknown:
        facts.append(f"Newly unknown tokens: {percent(row.unknown, 2)}.")
    if cut.task_coverage:
        tasks = ", ".join(f"{task} {percent(share)}" for task, share in cut.task_coverage.items())
        facts.append(f"Of the tokens of tasks stay: {tasks}.")
    return facts


def coverage_notes(name: str, cut: VocabularyCut) -> list[str]:
    """Warnings that tasks have texts of another kind than those that the vocabulary was cut by."""
    return [
        f"{name}: the vocabulary has {percent(share)} of the tokens of the task {task}, of texts that were held out "
        f"{percent(cut.row.coverage)}: it was cut by texts of another language or kind"
        for task, share in cut.uncovered.items()
    ]
