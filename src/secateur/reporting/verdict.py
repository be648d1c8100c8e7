"""What a run found, in sentences that claim no more than its intervals carry."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.figures.text import shorten
from secateur.reporting.findings import SAME, Claim, Findings
from secateur.reporting.printing import percent, plural, score, signed, span

MOST_SENTENCES = 6
MOST_CHOOSERS = 4


def verdict(findings: Findings) -> tuple[str, ...]:
    """One sentence for each series of cut models: what is as good as the full model, and what the others keep.

    What other blocks than the first ones are worth comes together, after the series they are compared with.
    """
    told: dict[tuple[str, str, bool], list[Claim]] = {}
    for claim in (claim for claims in findings.claims.values() for claim in claims if claim.is_known):
        own = claim.design.first
        told.setdefault((own.base, own.recipe, own.way != ""), []).append(claim)
    sentences = [_choosers(claims) if chosen else _sentence(claims) for (*_, chosen), claims in told.items()]
    if len(sentences) > MOST_SENTENCES:
        left = plural(len(sentences) - MOST_SENTENCES, "more series of models")
        sentences = [*sentences[:MOST_SENTENCES], f"The tables tell of {left.removesuffix('s')} the same."]
    scored = [design for design in findings.designs if design.average is not None]
    if not sentences and scored:
        averages = "; ".join(
            f"{shorten(d.name)} {score(d.average.value)} over {plural(len(d.scores), 'task')}"
            for d in scored[:MOST_SENTENCES]
            if d.average
        )
        sentences = [f"Average scores, without a full model on the same tasks to compare with: {averages}."]
    if not sentences:
        sentences = [_choice_sentence(findings, name) for name in list(findings.run.profiles)[:MOST_SENTENCES]]
    return tuple(sentences) or (f"The run holds {plural(len(findings.run.variants), 'model')}, not yet scored.",)


def notes(findings: Findings) -> tuple[str, ...]:
    """What the verdict's intervals cover, and what they do not."""
    return tuple(note for note in (_interval_note(findings), seed_note(findings)) if note)


def seed_note(findings: Findings) -> str:
    """What the number of training seeds allows to be said about differences between models; empty without scores."""
    scored = [variant for variant in findings.run.variants if variant.scores]
    seeds = sorted({variant.seed for variant in scored if variant.training and variant.seed is not None})
    if not scored:
        return ""
    if not seeds:
        return "Scores are those of one evaluation on samples of finite size; small differences may be chance."
    if not any(design.average and design.average.seed_error is not None for design in findings.designs):
        which = f"one seed ({seeds[0]})" if len(seeds) == 1 else "one seed"
        return (
            f"Every model was trained with {which}. How far scores move from seed to seed was not measured, so that "
            "small differences between models may be chance."
        )
    used = {design.seeds for design in findings.designs if design.average and design.seeds}
    if len(used) == 1:
        return f"Trained with {len(seeds)} seeds ({', '.join(map(str, seeds))}); scores are means over them."
    few, *_, many = sorted(map(len, used))
    numbers = f"{few}" if few == many else f"{few} to {many}"
    return f"Each model was trained with {numbers} {'seed' if many == 1 else 'seeds'}; scores are means over them."


def _interval_note(findings: Findings) -> str:
    claims = [claim for own in findings.claims.values() for claim in own if claim.is_known]
    known = [claim.difference for claim in claims if claim.difference.low is not None]
    if not claims:
        return ""
    if not known:
        return "No score of this run has an interval: whether its differences are chance is not known."
    with_seeds = [difference.seed_error is not None for difference in known]
    what = "other texts of the same kind"
    if any(with_seeds):
        what += " and other training seeds" if all(with_seeds) else ", and other seeds where several were trained,"
    return (
        f"Ranges are 95 % intervals of the difference, paired by text: what {what} would have given. They hold for "
        "each comparison by itself, and for these tasks. The smallest model that is as good is sought from the largest "
        f"cut down, up to the first that may lose more than {100 * SAME:.0f} points: this errs once in forty at most."
    )


def _sentence(claims: Sequence[Claim]) -> str:
    """The smallest model that is as good as the full one, then the others from large to small: at most four."""
    told, smallest = telling(claims), smallest_as_good(claims)
    parts = [_part(claim, first=claim is told[0], as_good=claim is smallest) for claim in told]
    return f"{shorten(told[0].design.first.series)}: {'; '.join(parts)}."


def smallest_as_good(claims: Sequence[Claim]) -> Claim | None:
    """The smallest cut that does not lose :data:`.SAME` or more; None where the largest may already.

    Cuts are tested from the largest down, and the first whose interval reaches such a loss ends the search, whatever is
    said of smaller ones. In this fixed order each test has the level of a single one, and the whole search errs no more
    often than one interval does on that side: once in forty.
    """
    found = None
    for claim in sorted(claims, key=lambda claim: -(claim.design.first.depth or 0)):
        if claim.difference.low is None or claim.difference.low < -SAME:
            break
        found = claim
    return found


def telling(claims: Sequence[Claim]) -> list[Claim]:
    """The claims of a series that say most, the most important first."""
    smallest = smallest_as_good(claims)
    others = [claim for claim in claims if claim is not smallest and (smallest is None or _less(claim, smallest))]
    return ([smallest] if smallest else []) + _spread(others, 3)


def _choosers(claims: Sequence[Claim]) -> str:
    """What each way of choosing other blocks than the first ones keeps, the best first.

    The best of many is better than it will be again: none is said to be as good as the full model.
    """
    best = sorted(claims, key=lambda claim: claim.difference.value, reverse=True)[:MOST_CHOOSERS]
    parts = [_part(claim, first=claim is best[0], by=f" by {claim.design.first.chooser}") for claim in best]
    own = best[0].design.first
    picked = f" (the best {len(best)} of {len(claims)} by these scores)" if len(claims) > len(best) else ""
    return f"{shorten(own.base)}, {own.recipe}, other blocks than the first{picked}: {'; '.join(parts)}."


def _less(claim: Claim, other: Claim) -> bool:
    return (claim.design.first.depth or 0) < (other.design.first.depth or 0)


def _spread(claims: Sequence[Claim], most: int) -> list[Claim]:
    """So many of the claims, the last among them."""
    if len(claims) <= most:
        return list(claims)
    step = len(claims) / most
    return [claims[round((i + 1) * step) - 1] for i in range(most)]


def _part(claim: Claim, first: bool, by: str = "", as_good: bool = False) -> str:
    own, full = claim.design.first, claim.reference.first
    one = own.depth == 1
    which = (f"{own.depth} of {own.blocks} blocks" if first else str(own.depth)) + by
    tasks = "your task" if len(claim.tasks) == 1 else f"your {len(claim.tasks)} tasks"
    where = f" as the {full.recipe} full model on {tasks}" if first else ""
    of_it = f" of the {full.recipe} full model’s average score on {tasks}"
    points = f"{signed(claim.difference.value)} points"
    if claim.difference.low is not None:
        points += f", {span(claim.difference.low, claim.difference.high, signed)}"
    if as_good and claim.outcome == "same":
        said = f"{'gives' if one else 'give'} the same quality{where} within the error ({points})"
    elif claim.outcome == "undecided":
        lost = score(-(claim.difference.low or 0.0))
        comma = "," if claim.speed else ""
        said = f"{'is' if one else 'are'} not told apart{where.replace(' as ', ' from ')} ({points}): "
        said += f"up to {lost} points may be lost{comma}"
    else:
        share = claim.share
        verb = {(True, True): "reaches", (True, False): "reach"}.get((share.value > 1, one), "keeps" if one else "keep")
        ends = f" ({span(share.low, share.high, percent)})" if share.low is not None else ""
        said = f"{verb} {percent(share.value)}{of_it if first else ''}{ends}"
    return f"{which} {said}{_speed(claim)}"


def _speed(claim: Claim) -> str:
    if claim.speed is None:
        return ""
    ratio, apart = claim.speed
    return f" at {ratio:.1f} × its speed" if apart else " at a speed that the measurement does not tell from its own"


def _choice_sentence(findings: Findings, name: str) -> str:
    profile, choice = findings.run.profiles[name], findings.run.choices.get(name, {})
    chosen = ", ".join(f"“{label}” keeps {depth}" for label, depth in sorted(choice.items(), key=lambda item: item[1]))
    lowest = min(((row.loss, row.depth) for row in profile.rows if row.loss is not None), default=None)
    curve = f"the untrained loss is lowest at depth {lowest[1]} of {profile.depth}" if lowest else "no loss is known"
    return f"{shorten(name)}: {curve}{'; ' + chosen if chosen else ''}. No model is scored yet."
