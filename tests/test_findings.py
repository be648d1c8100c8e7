"""Means over seeds, intervals of differences, the verdict's words, and what size costs, against other arithmetic."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_ind

from secateur.document import signed, span
from secateur.errors import DataError
from secateur.provenance import Provenance
from secateur.reporting.findings import MARGIN, Estimate, GroupComparison, Summary, compare_groups, pareto, summarize
from secateur.reporting.report import report, size_sentences
from secateur.reporting.run import read_run
from secateur.reporting.tables import cost_table
from secateur.reporting.verdict import notes, recommend, smallest_as_good
from secateur.results import CostRow, Costs, LossRow, Origin, ScoreRow, Scores, Training, load

MADE = Provenance("secateur", "2026-03-04T05:06:07+00:00", None, {}, (), {})
TASKS = ("sts", "search")
NOISE = {task: np.random.default_rng(i).normal(0, 0.01, 2000) for i, task in enumerate(TASKS)}
"""What the rows of a task do to every model alike: it cancels in differences."""


def write_model(run: Path, name: str, depth: int, score: float, seed: int | None = 42, own: float = 0.001) -> None:
    """A model of 8 layers with a score on two tasks, and draws that are the shared noise and a little of its own."""
    Origin(MADE, "org/tiny", 8, tuple(range(depth)), "mean", 0.0, ("secateur prune",)).save(run / "models" / name)
    if seed is not None:
        provenance = Provenance("secateur", MADE.created, seed, {}, (), {})
        Training(provenance, name, 1, 1.0, 1, {}, {}, (LossRow(1, 1.0, 1e-4),)).save(run / "models" / name)
    rows = []
    for task in TASKS:
        rng = np.random.default_rng([depth, seed or 0, len(task)])
        file = run / "scores" / name / "draws" / f"{task}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, score + NOISE[task] + rng.normal(0, own, 2000))
        rows.append(ScoreRow(name, task, "STS", "m", score, 9, 1.0, data=task, unit="rows", units=9, draws=task))
    Scores(MADE, tuple(rows)).save(run / "scores" / name)


def claims(run: Path) -> dict[str, GroupComparison]:
    return dict(summarize(read_run(run)).compared)


def found(run: Path) -> Summary:
    return summarize(read_run(run))


def headline(run: Path) -> str:
    return recommend(found(run)).headline


def test_a_difference_is_paired_so_that_what_rows_share_cancels(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny-8-healed", 8, 0.80)
    write_model(tmp_path, "tiny-4-healed", 4, 0.79)
    claim = claims(tmp_path)["tiny-4-healed"]
    read = {name: [np.load(tmp_path / f"scores/{name}/draws/{t}.npy") for t in TASKS] for name in
            ("tiny-4-healed", "tiny-8-healed")}  # fmt: skip
    draws = np.mean(read["tiny-4-healed"], axis=0) - np.mean(read["tiny-8-healed"], axis=0)
    assert claim.difference.value == pytest.approx(-0.01)
    assert (claim.difference.low, claim.difference.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert claim.outcome == "worse"
    assert claim.count(-1) == len(TASKS)
    average = claim.group.average
    assert average is not None and average.low is not None and claim.difference.low is not None
    assert average.value - average.low > 3 * (claim.difference.value - claim.difference.low)


@pytest.mark.parametrize(
    ("score", "own", "outcome", "words"),
    [
        (0.7999, 0.002, "same", "Ship tiny-4-healed: 0.0 points ("),
        (0.7999, 0.05, "undecided", "Not decided yet: tiny-4-healed shows no significant difference (0.0 points, "),
        (0.70, 0.002, "worse", "Keep tiny-8-healed: tiny-4-healed comes nearest, with −10.0 points ("),
        (0.90, 0.002, "better", "Ship tiny-4-healed: +10.0 points ("),
    ],
)
def test_the_verdict_claims_what_the_interval_carries(
    tmp_path: Path, score: float, own: float, outcome: str, words: str
) -> None:
    write_model(tmp_path, "tiny-8-healed", 8, 0.80)
    write_model(tmp_path, "tiny-4-healed", 4, score, own=own)
    claim = claims(tmp_path)["tiny-4-healed"]
    assert claim.outcome == outcome
    sentence = headline(tmp_path).replace("\N{NO-BREAK SPACE}", " ")
    assert sentence.startswith(words)
    assert span(claim.difference.low, claim.difference.high, signed) in sentence
    if outcome == "undecided":
        assert claim.difference.low is not None
        assert claim.difference.low < -MARGIN
        assert f"up to {-100 * claim.difference.low:.1f} points may be lost" in sentence
        half = claim.difference.value - claim.difference.low
        times = (half / (claim.difference.value + MARGIN)) ** 2  # an interval narrows with the root of the amount
        assert f"Score it on about {int(times) + 1} × as many test queries" in sentence
    assert "one seed" in " ".join(notes(found(tmp_path)))


def test_a_significant_difference_is_never_shown_as_nothing(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny-8-healed", 8, 0.80, own=0.00005)
    write_model(tmp_path, "tiny-4-healed", 4, 0.7997, own=0.00005)
    assert re.match(
        r"Ship tiny-4-healed: −0\.03 points \(−0\.0[45] to −0\.0[12], significantly worse\)", headline(tmp_path)
    )


def test_the_smallest_equal_model_comes_first_and_smaller_ones_after(tmp_path: Path) -> None:
    for depth, score in ((8, 0.8), (7, 0.8), (5, 0.8), (3, 0.6), (1, 0.3)):
        write_model(tmp_path, f"tiny-{depth}-healed", depth, score)
    rows = [CostRow(f"tiny-{depth}-healed", depth, depth, 0, depth, 9.0, 9.0, 9.0) for depth in (8, 5, 1)]
    Costs(MADE, tuple(rows)).save(tmp_path)
    told = recommend(found(tmp_path))
    assert told.headline.startswith("Ship tiny-5-healed: ")
    assert told.runner_up is not None and told.runner_up.group.name == "tiny-1-healed"
    assert "For half the cost: tiny-1-healed, −50.0 points" in " ".join(told.reasons)


def test_past_the_first_depth_that_may_lose_too_much_none_is_said_to_be_as_good(tmp_path: Path) -> None:
    for depth, score, own in ((8, 0.8, 0.001), (7, 0.8, 0.002), (5, 0.8, 0.03), (3, 0.7999, 0.002)):
        write_model(tmp_path, f"tiny-{depth}-healed", depth, score, own=own)
    assert claims(tmp_path)["tiny-3-healed"].outcome == "same"  # by itself
    assert headline(tmp_path).startswith("Ship tiny-7-healed: ")
    write_model(tmp_path, "tiny-7-healed", 7, 0.77)  # nor to come nearest, where another does
    assert headline(tmp_path).startswith("Keep tiny-8-healed: tiny-7-healed is the largest cut of its kind, with −3.0 ")


@pytest.mark.slow
@pytest.mark.parametrize("losses", [(0.02,) * 6, (0.0, 0.0, 0.02, 0.02, 0.02, 0.02)], ids=["all", "from the third"])
def test_a_depth_that_loses_two_points_is_said_to_be_as_good_once_in_forty(tmp_path: Path, losses) -> None:
    """Cuts at the edge of what may be lost, their differences drawn as a paired bootstrap finds them."""
    write_model(tmp_path, "tiny-8-healed", 8, 0.80)
    for depth in range(7, 1, -1):
        write_model(tmp_path, f"tiny-{depth}-healed", depth, 0.80)
    own = list(summarize(read_run(tmp_path)).compared.values())
    rng, wrong, tries, error = np.random.default_rng(len(set(losses))), 0, 4000, 0.004
    for _ in range(tries):
        values = -np.array(losses) + rng.normal(0, error, len(losses))
        drawn = [
            replace(claim, difference=Estimate(value, value - 1.96 * error, value + 1.96 * error))
            for claim, value in zip(own, values, strict=True)
        ]
        smallest = smallest_as_good(drawn)
        wrong += smallest is not None and losses[drawn.index(smallest)] >= MARGIN
    assert binomtest(wrong, tries, 0.025).pvalue > 1e-3 or wrong < 0.025 * tries


def test_an_average_is_within_what_its_metrics_can_be(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny-8-healed", 8, 0.999)
    (design,) = found(tmp_path).groups
    assert design.average is not None and design.average.high == 1
    assert design.average.low is not None and design.average.low < 0.995


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 4.303), (3, 2.776)])
def test_seeds_widen_the_interval_by_their_pooled_spread(tmp_path: Path, seeds: int, quantile: float) -> None:
    scores = {8: (0.80, 0.81, 0.79)[:seeds], 4: (0.70, 0.73, 0.67)[:seeds]}
    for depth, values in scores.items():
        for seed, score in enumerate(values):
            write_model(tmp_path, f"tiny-{depth}-healed-seed{seed}", depth, score, seed)
    claim = claims(tmp_path)["tiny-4-healed"]
    variance = sum(np.var(values, ddof=1) for values in scores.values()) / 2
    error = np.sqrt(2 * variance / seeds)
    student = ttest_ind(scores[4], scores[8])  # with the variance pooled, as an analysis of variance has it
    wanted = student.confidence_interval(0.95)
    assert claim.difference.value == pytest.approx(np.mean(scores[4]) - np.mean(scores[8]))
    assert claim.difference.seed_error == pytest.approx(error)
    assert claim.difference.low is not None
    half = claim.difference.value - claim.difference.low
    assert student.df == 2 * seeds - 2
    assert half == pytest.approx((wanted.high - wanted.low) / 2, rel=0.01)  # beside it, that of the rows is small
    assert half == pytest.approx(quantile * error, rel=0.01)
    assert "one seed" not in " ".join(notes(found(tmp_path)))
    assert [design.name for design in found(tmp_path).groups] == ["tiny-8-healed", "tiny-4-healed"]
    write_model(tmp_path, "tiny-4-healed", 4, 0.9, 0)  # the first seed again: no further repetition
    repeated = {design.name: len(design.variants) for design in found(tmp_path).groups}
    assert repeated == {"tiny-8-healed": seeds, "tiny-4-healed": seeds, "tiny-4-healed-seed0": 1}


@pytest.mark.parametrize(("rows", "is_as_good"), [(100, False), (400, True)])
def test_a_cut_that_answers_every_row_as_the_full_model_does_is_as_sure_as_there_are_rows(
    tmp_path: Path, rows: int, is_as_good: bool
) -> None:
    """As one whose vocabulary lacks no token of the tasks. It has at most the errors of so many rows without any."""
    for name, depth in (("tiny-8-healed", 8), ("tiny-4-healed", 4)):
        write_model(tmp_path, name, depth, 0.8, own=0.0)
        table = load(tmp_path / "scores" / name, Scores)
        Scores(MADE, tuple(replace(row, units=rows) for row in table.scores)).save(tmp_path / "scores" / name)
    claim = claims(tmp_path)["tiny-4-healed"]
    unlike = 1 - binomtest(rows, rows).proportion_ci(0.95).low
    assert (claim.difference.low, claim.difference.high) == pytest.approx((-unlike, unlike))
    assert claim.is_as_good(0.01) is is_as_good


def test_ways_of_choosing_and_recipes_are_other_designs(tmp_path: Path) -> None:
    names = ("tiny-8-healed", "tiny-4-healed", "tiny-4-uniform-healed", "tiny-4-distilled", "tiny-8-zero-shot")
    for name in names:
        write_model(tmp_path, name, int(name[5]), 0.5, None if "zero" in name else 1)
    run = read_run(tmp_path)
    assert {v.name: (v.base, v.selection, v.recipe) for v in run.variants} == {
        "tiny-8-healed": ("tiny", "", "healed"),
        "tiny-4-healed": ("tiny", "", "healed"),
        "tiny-4-uniform-healed": ("tiny", "uniform", "healed"),
        "tiny-4-distilled": ("tiny", "", "distilled"),
        "tiny-8-zero-shot": ("tiny", "", "zero-shot"),
    }
    references = {name: claim.reference.name for name, claim in claims(tmp_path).items()}
    assert references == {
        "tiny-4-healed": "tiny-8-healed",
        "tiny-4-uniform-healed": "tiny-8-healed",
        "tiny-4-distilled": "tiny-8-healed",
    }


def test_the_best_of_many_selections_is_not_said_to_be_as_good(tmp_path: Path) -> None:
    names = ("tiny-8-healed", "tiny-4-block_influence-healed", "tiny-4-random-healed")
    for name in names:
        write_model(tmp_path, name, int(name[5]), 0.8)
    write_model(tmp_path, "tiny-4-healed", 4, 0.6)
    assert headline(tmp_path).startswith("Keep tiny-8-healed: tiny-4-healed is the largest cut of its kind, with −20.0")
    for part in ("models", "scores"):
        shutil.rmtree(tmp_path / part / "tiny-4-healed")
        shutil.rmtree(tmp_path / part / "tiny-4-random-healed")
    assert headline(tmp_path).startswith("Ship tiny-4-block_influence-healed")  # asked for, not picked


def test_draws_of_other_rows_are_not_subtracted(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny-8-healed", 8, 0.80)
    write_model(tmp_path, "tiny-4-healed", 4, 0.79)
    file = tmp_path / "scores/tiny-4-healed/scores.json"
    file.write_text(file.read_text().replace('"data": "sts"', '"data": "changed"'))
    summary = found(tmp_path)
    full, cut = summary.groups
    claim = compare_groups(cut, full)
    assert claim.tasks["sts"].low is None
    assert np.isnan(claim.tasks["sts"].value)
    assert claim.tasks["search"].low is not None
    assert claim.difference.low is None
    assert claim.outcome == "unknown"
    assert not summary.compared
    assert headline(tmp_path).startswith("Nothing to compare yet")
    assert not re.search(r"\bnan\b", report(tmp_path).read_text())


def test_models_that_were_scored_on_other_rows_have_a_full_model_of_their_own(tmp_path: Path) -> None:
    """Of texts alone, each base model judges those that it is scored on; one scores higher on its own."""
    for base, score in (("tiny", 0.8), ("wee", 0.6)):
        for depth in (8, 4):
            write_model(tmp_path, f"{base}-{depth}-healed", depth, score - 0.01 * (depth < 8))
    for file in tmp_path.glob("scores/wee-*/scores.json"):
        file.write_text(re.sub('"data": "', '"data": "wee-', file.read_text()))
    write_model(tmp_path, "static", 1, 0.7, None)
    shutil.rmtree(tmp_path / "models/static")
    (tmp_path / "study.yaml").write_text("baselines: [static]\n")
    beside = {name: (item.reference.name, signed(item.difference.value)) for name, item in claims(tmp_path).items()}
    assert beside == {
        "tiny-4-healed": ("tiny-8-healed", "−1.0"),
        "wee-4-healed": ("wee-8-healed", "−1.0"),
        "static": ("tiny-8-healed", "−10.0"),
    }
    rows = [CostRow(f"{base}-4-healed", 4, size, 1, 1, 1.0, 1.0, 1.0) for base, size in (("tiny", 9), ("wee", 5))]
    Costs(MADE, tuple(rows)).save(tmp_path)
    verdict = recommend(found(tmp_path))  # the baseline was scored on the rows of the other
    assert verdict.headline.startswith("Ship wee-4-healed: −1.0 points")
    assert not any("static" in reason for reason in verdict.reasons)


def test_speeds_that_were_measured_once_tell_nothing_apart(tmp_path: Path) -> None:
    for once, ratio in ((False, pytest.approx(2)), (True, None)):
        rows = []
        for depth, rate in ((8, 100.0), (4, 200.0)):
            write_model(tmp_path, f"tiny-{depth}-healed", depth, 0.8)
            ends = (rate, rate) if once else (rate - 1, rate + 1)
            rows.append(CostRow(f"tiny-{depth}-healed", depth, depth, 0, depth, rate, *ends))
        Costs(MADE, tuple(rows)).save(tmp_path)
        assert claims(tmp_path)["tiny-4-healed"].speed == ratio
        (cell,) = [row[-1] for row in cost_table(rows[:1]).cells]
        assert ("to" in cell.in_line) is not once


def test_missing_draws_are_an_error_that_names_the_file(tmp_path: Path) -> None:
    write_model(tmp_path, "tiny-8-healed", 8, 0.80)
    (tmp_path / "scores/tiny-8-healed/draws/sts.npy").unlink()
    with pytest.raises(DataError, match=r"sts\.npy"):
        headline(tmp_path)


def test_pareto_against_every_pair() -> None:
    points = [(float(c), float(s)) for c, s in np.random.default_rng(0).integers(0, 12, (60, 2))]
    front = {points[i] for i in pareto(points)}
    for cost, score in points:
        beaten = any((c <= cost and s > score) or (c < cost and s >= score) for c, s in points)
        assert beaten != ((cost, score) in front)


def test_each_base_model_has_its_own_size_beyond_which_a_point_costs_too_much(tmp_path: Path) -> None:
    rows = []
    for base, top in (("large", 0.8), ("small", 0.5)):
        for depth in range(1, 8):  # 10 M parameters from depth to depth bring 30 / (depth (depth + 1)) points
            write_model(tmp_path, f"{base}-{depth}-healed", depth, top - 0.3 / depth)
            rows.append(CostRow(f"{base}-{depth}-healed", depth, depth * 10_000_000, 5, 40, 1.0, 1.0, 1.0))
    Costs(MADE, tuple(rows)).save(tmp_path)
    for threshold in (6.0, 1e3, 0.01, 2.7):
        depth = max((d for d in range(2, 8) if threshold * 30 / (d * (d - 1)) >= 10), default=1)
        where = f"beyond {10 * depth}.0 M" if depth < 7 else "up to the largest size, 70.0 M"
        price = "less" if depth == 7 else "more"
        assert [line.replace("\N{NO-BREAK SPACE}", " ") for line in size_sentences(found(tmp_path), threshold)] == [
            f"{base}: {where} parameters, one more point of score costs {price} than {threshold:g} M, "
            "by the averages measured."
            for base in ("large", "small")
        ]
    write_model(tmp_path, "small-7-healed", 7, 0.1)
    said = size_sentences(found(tmp_path), 1e3)[1].replace("\N{NO-BREAK SPACE}", " ")
    assert said == "small: no size beyond 60.0 M parameters scores higher, by the averages measured."


def test_what_is_said_of_the_intervals_is_of_the_cut_in_the_headline(tmp_path: Path) -> None:
    for name, score, seed, own in (
        ("tiny-8-zero-shot", 0.80, None, 0.001),
        ("tiny-4-zero-shot", 0.7999, None, 0.05),
        ("tiny-4-healed-seed0", 0.50, 0, 0.001),
        ("tiny-4-healed-seed1", 0.51, 1, 0.001),
    ):
        write_model(tmp_path, name, int(name[5]), score, seed, own)
    told = recommend(found(tmp_path))
    assert told.headline.startswith("Not decided yet: tiny-4-zero-shot")
    assert told.reasons[0].endswith("over texts, not over training seeds.")
