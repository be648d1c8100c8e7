"""What a run found, in sentences that claim no more than its intervals support."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.document import percent, plural, score, shorten, signed, span
from secateur.reporting.advice import scout_note, scout_sentences
from secateur.reporting.findings import MARGIN, GroupComparison, Summary
from secateur.reporting.vocabulary import coverage_notes, cut_vocabularies, vocabulary_sentences

MOST_SENTENCES = 6
MOST_SELECTIONS = 4


def verdict(summary: Summary) -> tuple[str, ...]:
    """What each scout found and what its models are worth; then how the vocabulary was cut, where it was, and one
    sentence for each other series of cut models.

    Of these: what is as good as the full model, and what the others keep. Models with other blocks than the first ones
    come together, after the series they are compared with.
    """
    found = scout_sentences(summary)
    sentences = found[0] if len(found) == 1 else [" ".join(own) for own in found]
    sentences += vocabulary_sentences(summary)
    series: dict[tuple[str, str, bool], list[GroupComparison]] = {}
    for item in _comparisons(summary):
        first = item.group.first
        series.setdefault((first.base, first.recipe, first.selection != ""), []).append(item)
    sentences += [_selections(own) if other else _depths(own) for (*_, other), own in series.items()]
    if len(sentences) > MOST_SENTENCES:
        more = len(sentences) - MOST_SENTENCES
        sentences = [*sentences[:MOST_SENTENCES], f"{more} more series of models are in the tables."]
    scored = [group for group in summary.groups if group.average is not None]
    if not sentences and scored:
        averages = "; ".join(
            f"{shorten(group.name)} {score(group.average.value)} over {plural(len(group.scores), 'task')}"
            for group in scored[:MOST_SENTENCES]
            if group.average
        )
        sentences = [f"Average scores, without a full model on the same tasks to compare with: {averages}."]
    if not sentences:
        sentences = [_choice(summary, name) for name in list(summary.run.profiles)[:MOST_SENTENCES]]
    return tuple(sentences) or (f"The run holds {plural(len(summary.run.variants), 'model')}, not yet scored.",)


def _comparisons(summary: Summary) -> list[GroupComparison]:
    """Those of cut models that no scout's sentences tell of."""
    known = [item for own in summary.by_series.values() for item in own if item.is_known]
    return [item for item in known if item.group.first.scout is None]


def smallest_as_good(comparisons: Sequence[GroupComparison]) -> GroupComparison | None:
    """The smallest cut that does not lose :data:`.MARGIN` or more; None where the largest may already.

    Fixed-sequence testing: cuts are tested from the largest down, and the first whose interval reaches such a loss ends
    the search, whatever is said of smaller ones. In this fixed order each test has the level of a single one, and the
    whole search errs no more often than one interval does on that side: once in forty.
    """
    found = None
    for item in sorted(comparisons, key=lambda item: -(item.group.first.depth or 0)):
        if item.difference.low is None or item.difference.low < -MARGIN:
            break
        found = item
    return found


def most_telling(comparisons: Sequence[GroupComparison]) -> list[GroupComparison]:
    """Of a series: the smallest cut that is as good, and three of the smaller ones, the smallest among them."""
    smallest = smallest_as_good(comparisons)
    least = (smallest.group.first.depth or 0) if smallest else float("inf")
    others = [item for item in comparisons if item is not smallest and (item.group.first.depth or 0) < least]
    if len(others) > 3:
        step = len(others) / 3
        others = [others[round((i + 1) * step) - 1] for i in range(3)]
    return ([smallest] if smallest else []) + others


def _depths(comparisons: Sequence[GroupComparison]) -> str:
    told, smallest = most_telling(comparisons), smallest_as_good(comparisons)
    parts = [_part(item, first=item is told[0], as_good=item is smallest) for item in told]
    return f"{shorten(told[0].group.first.series)}: {'; '.join(parts)}."


def _selections(comparisons: Sequence[GroupComparison]) -> str:
    """What each selection method keeps, the best first.

    The best of many is better than it will be again: none is said to be as good as the full model.
    """
    best = sorted(comparisons, key=lambda item: item.difference.value, reverse=True)[:MOST_SELECTIONS]
    parts = [_part(item, first=item is best[0], by=f" by {item.group.first.selection}") for item in best]
    own = best[0].group.first
    picked = f" (the best {len(best)} of {len(comparisons)} by these scores)" if len(comparisons) > len(best) else ""
    return f"{shorten(own.base)}, {own.recipe}, other blocks than the first{picked}: {'; '.join(parts)}."


def _part(item: GroupComparison, first: bool, by: str = "", as_good: bool = False) -> str:
    """One model in a sentence; what it is compared with is named with the first."""
    own, one = item.group.first, item.group.first.depth == 1
    which = (f"{own.depth} of {own.blocks} blocks" if first else str(own.depth)) + by
    model = item.full_name
    tasks = "your task" if len(item.tasks) == 1 else f"your {len(item.tasks)} tasks"
    points = f"{signed(item.difference.value)} points"
    if item.difference.low is not None:
        points += f", {span(item.difference.low, item.difference.high, signed)}"
    if as_good and item.outcome == "same":
        whom = f" as {model} on {tasks}" if first else ""
        said = f"{'is' if one else 'are'} as good{whom} (no significant difference: {points})"
    elif item.outcome == "undecided":
        whom = f" from {model} on {tasks}" if first else ""
        said = f"{'shows' if one else 'show'} no significant difference{whom} ({points}), but up to "
        said += f"{score(-(item.difference.low or 0.0))} points may be lost,"
    else:
        verb = ("reach" if item.share.value > 1 else "keep") + ("es" if one and item.share.value > 1 else "s" * one)
        said = f"{verb} {percent(item.share.value)}" + (f" of {model}’s average score on {tasks}" if first else "")
        if item.share.low is not None:
            said += f" ({span(item.share.low, item.share.high, percent)})"
    if item.speed is None:
        return f"{which} {said}".removesuffix(",")
    ratio, is_apart = item.speed
    return f"{which} {said} " + (
        f"at {ratio:.1f} × its speed" if is_apart else "with no measurable difference in speed"
    )


def _choice(summary: Summary, name: str) -> str:
    profile, choice = summary.run.profiles[name], summary.run.choices.get(name, {})
    chosen = ", ".join(f"“{label}” keeps {depth}" for label, depth in sorted(choice.items(), key=lambda item: item[1]))
    lowest = min(((row.loss, row.depth) for row in profile.rows if row.loss is not None), default=None)
    curve = f"the untrained loss is lowest at depth {lowest[1]} of {profile.depth}" if lowest else "no loss is known"
    return f"{shorten(name)}: {curve}{'; ' + chosen if chosen else ''}. No model is scored yet."


# Notes ----------------------------------------------------------------------------------------------------------------


def notes(summary: Summary) -> tuple[str, ...]:
    """What the verdict's intervals cover, and what they do not; and tasks that the vocabulary is not for."""
    cuts = cut_vocabularies(summary.run)
    found = [f"{note}." for base, cut in cuts.items() for note in coverage_notes(base, cut)]
    return tuple(note for note in (*found, scout_note(summary), _interval_note(summary), seed_note(summary)) if note)


def seed_note(summary: Summary) -> str:
    """What the number of training seeds allows to be said about differences between models; empty without scores."""
    scored = [variant for variant in summary.run.variants if variant.scores]
    seeds = sorted({variant.seed for variant in scored if variant.training and variant.seed is not None})
    if not scored:
        return ""
    if not seeds:
        return "Scores are those of one evaluation on samples of finite size; small differences may be chance."
    if not any(group.average and group.average.seed_error is not None for group in summary.groups):
        which = f"one seed ({seeds[0]})" if len(seeds) == 1 else "one seed"
        return (
            f"Every model was trained with {which}. How much scores vary between seeds was not measured, so that "
            "small differences between models may be chance."
        )
    used = {group.seeds for group in summary.groups if group.average and group.seeds}
    if len(used) == 1:
        return f"Trained with {len(seeds)} seeds ({', '.join(map(str, seeds))}); scores are means over them."
    few, *_, many = sorted(map(len, used))
    numbers = f"{few}" if few == many else f"{few} to {many}"
    return f"Each model was trained with {numbers} {'seed' if many == 1 else 'seeds'}; scores are means over them."


def _interval_note(summary: Summary) -> str:
    comparisons = [item for own in summary.by_series.values() for item in own if item.is_known]
    known = [item.difference for item in comparisons if item.difference.low is not None]
    if not comparisons:
        return ""
    if not known:
        return "No score of this run has an interval: whether its differences are chance is not known."
    with_seeds = [difference.seed_error is not None for difference in known]
    what = "other texts of the same kind"
    if any(with_seeds):
        what += " and other training seeds" if all(with_seeds) else ", and other seeds where several were trained,"
    said = (
        f"Ranges are 95 % intervals of the difference, paired by text: what {what} would have given. They hold for "
        "each comparison by itself, and for these tasks."
    )
    if not _comparisons(summary):
        return said
    return (
        f"{said} The smallest model that is as good is sought from the largest "
        f"cut down, up to the first that may lose more than {100 * MARGIN:.0f} points: this errs at most once in forty."
    )
