"""What the cut of a vocabulary did, in sentences: which tokens stay, what that costs, and for which texts it is."""

from __future__ import annotations

from collections.abc import Callable

from secateur.document import percent, shorten
from secateur.reporting.advice import apart
from secateur.reporting.findings import GroupComparison, Summary
from secateur.reporting.run import TRIMMED, Run
from secateur.results import VocabularyCut


def cut_vocabularies(run: Run) -> dict[str, VocabularyCut]:
    """Base model → how the vocabulary of its models was cut, of those where it was."""
    found: dict[str, VocabularyCut] = {}
    for variant in run.variants:
        if variant.vocabulary is not None:
            found.setdefault(variant.base, variant.vocabulary)
    return found


def vocabulary_sentences(summary: Summary) -> list[str]:
    """For each base model with a cut vocabulary: how many tokens stay, and what all its layers are worth with them."""
    return [
        f"{shorten(base)}: the vocabulary is cut to {cut.row.tokens:,} of {cut.tokens:,} tokens, which are "
        f"{percent(cut.row.coverage)} of those of held-out texts{_worth(summary, base)}."
        for base, cut in cut_vocabularies(summary.run).items()
    ]


def _worth(summary: Summary, base: str) -> str:
    """What the models of full depth lose against all tokens, but for those of a scout, whose sentences tell it."""
    items = [item for item in summary.originals.values() if item.group.first.base == base and item.group.first.is_full]
    own = [item for item in items if item.group.first.scout is None]
    return "".join(_loss(item) for item in sorted(own, key=lambda item: item.group.first.recipe != TRIMMED))


def _loss(item: GroupComparison) -> str:
    recipe, cost, full = item.group.first.recipe, item.group.cost, item.reference.cost
    said = f"scores {apart(item.difference)} than as it came" if item.is_known else ""
    if recipe != TRIMMED:
        return f"; {recipe}, it {said}" if said else ""
    has = f"has {percent(cost.parameters / full.parameters, 0)} of the parameters" if cost and full else ""
    parts = " and ".join(part for part in (has, said) if part)
    return f"; untrained, the model of full depth {parts}" if parts else ""


def vocabulary_facts(cut: VocabularyCut, publish: Callable[[str], str] = str) -> list[str]:
    """What was cut, by which texts, and what that does to texts like these; ``publish`` shows the name of a file."""
    row, files = cut.row, ", ".join(map(publish, cut.files))
    facts = [
        f"Vocabulary: {row.tokens:,} of {cut.tokens:,} tokens, chosen by {cut.texts:,} texts of {files}.",
        f"Of texts like these that were held out, {percent(row.coverage)} of the tokens stay, and "
        f"{percent(row.changed)} of the texts have one that does not; a text has {row.tokens_per_text:.1f} tokens on "
        f"average, {cut.tokens_per_text:.1f} before.",
    ]
    if row.unknown:
        facts.append(f"Newly unknown tokens: {percent(row.unknown, 2)}.")
    return facts


def vocabulary_limits(cut: VocabularyCut, publish: Callable[[str], str] = str) -> list[str]:
    """What a model with a cut vocabulary is not for."""
    limits = [
        f"Its vocabulary is for texts like those of {', '.join(map(publish, cut.files))}. Others, above all in other "
        "languages and scripts, are split into more tokens: they take longer and reach the maximum length sooner, and "
        "quality on them was not measured."
    ]
    if cut.row.unknown:
        limits.append(
            "Its tokenizer does not cover every character: more of such texts is unknown to it than to the base model."
        )
    return limits


def coverage_notes(name: str, cut: VocabularyCut) -> list[str]:
    """Warnings that tasks have texts of another kind than those that the vocabulary was cut by."""
    return [
        f"{name}: the vocabulary has {percent(share)} of the tokens of the task {task}, of texts that were held out "
        f"{percent(cut.row.coverage)}: it was cut by texts of another language or kind"
        for task, share in cut.uncovered.items()
    ]
