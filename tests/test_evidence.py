"""The choice by a scout against a rule that is written out anew, and against simulated scouts whose truth is known."""

from __future__ import annotations

import json
import math
import random
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import t

import secateur
from secateur.choosing.choose import blocks_to_keep, needs_profile
from secateur.cli.commands import main
from secateur.cli.terminal import show_candidates, show_scout
from secateur.errors import ConfigError, DataError, SecateurError
from secateur.options import StudyOptions, make
from secateur.provenance import provenance
from secateur.results import DepthRow, DepthScoreRow, LayerCost, Origin, Profile, RungRow, Scout, load

DEPTH = 30
MADE = provenance(seed=3)
PARTS = tuple(LayerCost(k, 1000 + 100 * k, 4000 + 400 * k, 10.0 * k, 0.001 * (k + 1), 0.01) for k in range(DEPTH + 1))
"""Costs of layers that differ."""


def rung(depth: int, difference: float, ends: tuple[float, float] | None, *, trained: bool = True) -> RungRow:
    """Points against a full depth that scores 60."""
    score = (60 + difference) / 100
    low, high = (None, None) if ends is None else (ends[0] / 100, ends[1] / 100)
    return RungRow(depth, trained, score, score - 0.03, score + 0.03, difference / 100, low, high)


def scout(rows: Sequence[RungRow], **more: object) -> Scout:
    full = rung(DEPTH, 0, None)
    about = {"model": "model", "depth": DEPTH, "judge": "tasks", "layer_costs": PARTS}
    return Scout(MADE, **(about | {"depths": (*rows, full)} | more))


def ladder(**points: tuple[float, float, float]) -> list[RungRow]:
    """``d12=(difference, low, high)``."""
    return [rung(int(name[1:]), own[0], own[1:]) for name, own in points.items()]


USUAL = ladder(
    d6=(-6, -7.2, -4.8), d9=(-1, -2.1, 0.1), d12=(-0.2, -0.8, 0.4), d19=(0.5, -0.1, 1.1), d24=(0.5, -0.2, 1.2)
)


def cost(depth: int, column: str) -> float:
    return float(sum(getattr(part, column) for part in PARTS[: depth + 1]))


# The rule -------------------------------------------------------------------------------------------------------------


def by_hand(table: Scout, tolerance: float, budget: float) -> int:
    """The rule for trained depths, backwards from each depth: one passes if it and all between it and the full do."""
    rows = {row.depth: row for row in table.depths}
    inner = sorted(rows)[:-1]

    def passes(depth: int) -> bool:
        low = rows[depth].difference_low
        return low is not None and 100 * low + tolerance >= 0

    fine = [depth for depth in inner if all(passes(other) for other in inner if other >= depth)]
    fits = [depth for depth in (*inner, DEPTH) if cost(depth, "parameters") <= budget]
    both = [depth for depth in (*fine, DEPTH) if depth in fits]
    if both:
        return both[0]
    most = max(rows[depth].score for depth in fits)
    return min(depth for depth in fits if rows[depth].score == most)


def test_tolerance_and_budget_against_the_rule_written_out():
    rng = random.Random(0)
    seen = set()
    for _ in range(300):
        depths = sorted(rng.sample(range(4, DEPTH), rng.randint(1, 7)))
        rows = []
        for depth in depths:
            difference = round(rng.gauss(0, 1), 0)  # ties are frequent
            rows.append(rung(depth, difference, rng.choice([None, *[(difference - 0.75, difference + 0.75)] * 9])))
        table, tolerance = scout(rows), rng.choice([0.25, 1, 2])
        budget = cost(rng.choice([*depths, DEPTH]), "parameters")
        expected = by_hand(table, tolerance, budget)
        assert secateur.choose(table, tolerance=tolerance, max_params=budget) == {"chosen": expected}
        assert secateur.choose(table, tolerance=tolerance)["chosen"] == by_hand(table, tolerance, math.inf)
        seen.add((expected == DEPTH, expected == by_hand(table, tolerance, math.inf)))
    assert len(seen) == 3  # all, cut as without a budget, cut more for the budget


def test_the_tolerance_is_one_point_where_none_is_given():
    assert secateur.choose(scout(USUAL)) == secateur.choose(scout(USUAL), tolerance=1.0) == {"chosen": 12}
    assert secateur.choose(scout(USUAL), tolerance=2.1) == {"chosen": 9}
    assert secateur.choose(scout(USUAL), tolerance=0.1) == {"chosen": DEPTH}  # 24 may lose 0.2, 19 is not looked at
    assert secateur.choose(scout(USUAL), tolerance=8) == {"chosen": 6}
    assert secateur.choose(scout([])) == {"chosen": DEPTH}


def test_the_tolerance_is_five_points_of_similarity_where_a_teacher_judges_texts():
    found = replace(scout(USUAL), judge="texts")
    assert secateur.choose(found) == secateur.choose(found, tolerance=5.0) != secateur.choose(found, tolerance=1.0)


def test_best_is_the_highest_score_and_of_equal_ones_the_smallest():
    assert secateur.choose(scout(USUAL), best=True) == {"chosen": 19}
    assert secateur.choose(scout(USUAL), best=True, max_params=cost(12, "parameters")) == {"chosen": 12}
    assert secateur.choose(scout(ladder(d6=(-1, -2, 0))), best=True) == {"chosen": DEPTH}


@pytest.mark.parametrize(
    ("limit", "column", "unit"),
    [("max_params", "parameters", 1), ("max_bytes", "bytes", 1), ("max_latency_ms", "latency", 1000)],
)
def test_budgets_limit_what_may_be_chosen(limit: str, column: str, unit: int):
    table = scout(USUAL)
    for allowed, chosen in ((DEPTH, 12), (12, 12), (11, 9), (9, 9), (6, 6)):
        assert secateur.choose(table, **{limit: unit * cost(allowed, column) + 1e-6}) == {"chosen": chosen}
    with pytest.raises(ConfigError, match=f"{limit}: no depth has at most .*the smallest, depth 6, has ") as caught:
        secateur.choose(table, **{limit: unit * cost(5, column)})
    least = unit * cost(6, column)
    assert f" {least:.3g} ms" in str(caught.value) if column == "latency" else f" {least:,.0f} " in str(caught.value)
    with pytest.raises(ConfigError, match=r"no depth has at most 1 (parameter|byte|ms):"):
        secateur.choose(table, **{limit: 1})
    with pytest.raises(DataError, match=r"has no costs of the layers.*scout again"):
        secateur.choose(scout(USUAL, layer_costs=()), **{limit: 1e9})


def test_depths_that_were_only_scored_do_not_end_the_sequence_of_the_trained():
    def with_scored(*rows: tuple[int, float]) -> int:
        scored = [rung(depth, low + 1, (low, low + 2), trained=False) for depth, low in rows]
        both = sorted([*USUAL, *scored], key=lambda row: row.depth)
        return secateur.choose(scout(both))["chosen"]

    assert with_scored((15, -3), (27, -3)) == 12  # above the choice they are not asked
    assert with_scored((11, -0.5)) == 11
    assert with_scored((10, -0.5), (11, -3)) == 12  # a sequence of their own
    assert with_scored((10, -0.5), (11, -0.5)) == 10
    assert with_scored((7, -0.5), (8, -0.5)) == 12  # below a trained depth that does not pass
    everywhere = [*ladder(d9=(0, -0.5, 0.5)), rung(12, -2, (-3, -1), trained=False)]
    assert secateur.choose(scout(everywhere)) == {"chosen": 9}


def scouts(truth: Sequence[float], scored: Sequence[int], trials: int) -> list[Scout]:
    """Scouts of 100 rows whose true differences are known (ascending depths, in points)."""
    rng, rows, z = np.random.default_rng(5), 100, t.ppf(0.975, 99)
    made = []
    for _ in range(trials):
        own = rng.normal(size=(rows, len(truth))) * 4 + rng.normal(size=(rows, 1)) * 4 + np.array(truth)
        means, errors = own.mean(axis=0), own.std(axis=0, ddof=1) / math.sqrt(rows)
        ends = list(zip(means - z * errors, means + z * errors, strict=True))
        made.append(
            scout([rung(k + 1, means[k], ends[k], trained=k not in scored) for k in range(len(truth))], layer_costs=())
        )
    return made


@pytest.mark.parametrize(
    ("truth", "scored", "level"),
    [
        ([-1.001] * 8, (), 0.025),
        ([-4, -2, -1.001, -1.001, 0, 1], (), 0.025),
        ([-1.001, -1.001, 3, 3], (), 0.025),
        ([-1.001, -1.001, -1.001, 3, 3], (1, 2), 0.05),
    ],
    ids=["all worse", "falling", "good ones first", "scored ones"],
)
def test_a_depth_that_is_worse_than_the_tolerance_is_chosen_as_seldom_as_promised(truth, scored, level):
    trials = 2000
    found = [secateur.choose(table)["chosen"] for table in scouts(truth, scored, trials)]
    wrong = np.mean([depth != DEPTH and truth[depth - 1] < -1 for depth in found])
    assert wrong <= level + 3 * math.sqrt(level / trials)


def test_without_a_sequence_it_would_be_promised_too_much():
    def smallest(table: Scout) -> int:
        return min(row.depth for row in table.depths if row.depth == DEPTH or row.difference_low >= -0.01)

    tables = scouts([-1.001] * 8, (), 500)
    assert np.mean([smallest(table) != DEPTH for table in tables]) > 0.06


# What is said ---------------------------------------------------------------------------------------------------------


def said(table: Scout, **options: object) -> str:
    return secateur.candidates(table, **options).reason


SHARE = (
    f"{100 * cost(12, 'parameters') / cost(DEPTH, 'parameters'):.0f} % of the parameters, {31 / 13:.1f} × the speed."
)


def test_the_sentence_says_what_is_lost_and_what_the_next_would_lose():
    assert said(scout(USUAL)) == (
        "12 of 30 layers, the fewest that lose at most 1 point at 95 % confidence: −0.2 points (95 % interval −0.8 to "
        f"+0.4) against all 30 in the same training; with 9 layers −1.0 points (95 % interval −2.1 to +0.1). {SHARE}"
    )
    assert said(scout(USUAL, layer_costs=())).endswith("to +0.1).")
    least = said(scout(USUAL), tolerance=8)
    assert least.startswith("6 of 30 layers, the fewest that lose at most 8 points") and "no smaller depth" in least


def test_the_sentence_says_why_nothing_is_cut():
    fewest = "All 30 layers, the fewest that lose at most"
    assert said(scout(USUAL), tolerance=0.1) == (
        f"{fewest} 0.1 points at 95 % confidence: with 24 layers +0.5 points (95 % interval −0.2 to +1.2)."
    )
    assert said(scout([])) == f"{fewest} 1 point at 95 % confidence: no smaller depth was scored."
    nothing = [replace(row, difference_low=None, difference_high=None) for row in USUAL]
    assert said(scout(nothing)).endswith(": with 24 layers +0.5 points (no interval).")
    assert said(scout(nothing), max_params=cost(9, "parameters")).startswith("9 of 30 layers, the highest score of")


def test_a_trained_depth_whose_score_is_no_number_ends_the_search():
    broken = replace(USUAL[3], score=None, low=None, high=None, difference=None, difference_low=None)  # NaN in a file
    table = scout([*USUAL[:3], broken, USUAL[4]])
    for rule in ({}, {"best": True}):
        assert secateur.choose(table, **rule) == {"chosen": 24}
        assert "with 19 layers no score." in said(table, **rule)


def test_the_sentence_says_that_a_budget_costs_more_than_the_tolerance():
    assert said(scout(USUAL), max_params=cost(9, "parameters")).startswith(
        "9 of 30 layers, the highest score of those that fit (to lose at most 1 point at 95 % confidence takes 12 "
        "layers): −1.0 points (95 % interval −2.1 to +0.1) against all 30 in the same training; with 6 layers"
    )


def test_of_the_highest_score_nothing_is_promised():
    assert said(scout(USUAL), best=True).startswith(
        "19 of 30 layers, the highest of 6 scores: +0.5 points (95 % interval −0.1 to +1.1) against all 30 in the same "
        "training; with 12 layers −0.2 points (95 % interval −0.8 to +0.4). "
    )


# Side by side, files and commands -------------------------------------------------------------------------------------


def test_all_depths_side_by_side():
    scored = rung(15, -3, (-4, -2), trained=False)
    rows = sorted([*USUAL, scored], key=lambda row: row.depth)
    found = secateur.candidates(scout(rows), max_params=cost(19, "parameters"))
    assert (found.model, found.depth, found.chosen) == ("model", DEPTH, 12)
    assert [row.depth for row in found.rows] == [6, 9, 12, 15, 19, 24, 30]
    assert [row.depth for row in found.rows if not row.fits] == [24, 30]
    for row in found.rows:
        for column in ("parameters", "bytes", "flops_per_token", "latency"):
            assert getattr(row, column) == pytest.approx(cost(row.depth, column))
        assert row.speed == pytest.approx(31 / (1 + row.depth))


def test_a_scout_on_the_terminal_fits_into_eighty_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    wide = [rung(12, -10.5, (-12.5, -10.1)), rung(24, -10.5, (-12.5, -10.1), trained=False)]
    tasks = tuple(DepthScoreRow(name, "STS", "spearman", 30, 0.5) for name in ("one", "two"))
    parts = tuple(replace(part, parameters=4_000_000) for part in PARTS)
    table = scout(wide, task_scores=tasks, layer_costs=parts, notes=("a note",))
    show_scout(table)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].rstrip() == "model: scores × 100 on your 2 tasks, with 95 % intervals"
    sentence = said(table)
    assert all(len(line) <= 80 for line in lines if line not in (sentence,)) and sentence in lines
    for words in ("−10.5 (−12.5 to −10.1)", "chosen", "24*", "* scored without", "note: a note"):
        assert words in shown
    show_candidates(secateur.candidates(table, max_params=60e6))
    assert "over budget" in capsys.readouterr().out
    for judge in ("pairs", "texts"):
        show_scout(replace(table, judge=judge))
        assert f"held-out {judge}" in capsys.readouterr().out


def profile() -> Profile:
    rows = tuple(DepthRow(k, 1.0 + k, None, 0.5, 2.0) for k in range(1, DEPTH + 1))
    about = {"model": "model", "depth": DEPTH, "pooling": "mean", "scale": 20.0, "dtype": "float32", "batch_size": 8}
    return Profile(MADE, **about, batches=1, max_length=128, prompt="", depths=rows)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    scout(USUAL).save(tmp_path / "scout")
    profile().save(tmp_path / "profile")
    (tmp_path / "empty").mkdir()
    return tmp_path


def test_a_scout_is_taken_as_a_table_a_file_or_a_folder(place: Path):
    for given in (scout(USUAL), place / "scout", str(place / "scout" / "scout.json")):
        assert secateur.choose(given) == {"chosen": 12}
        assert secateur.candidates(given).chosen == 12
        assert blocks_to_keep("chosen", DEPTH, given) == tuple(range(12))
    assert secateur.choose(place / "profile") == {"small": 1, "large": 16}
    with pytest.raises(DataError, match=r"holds no scout.json and no profile.json"):
        secateur.choose(place / "empty")


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ("choose scout --best --tolerance 1", "best: cannot go with tolerance: give one of them"),
        ("choose scout --tolerance -1", "tolerance: '-1' is not valid"),
        ("choose scout --max-loss-increase 0.1", "max_loss_increase: applies to a profile's loss, and this is a scout"),
        ("choose profile --tolerance 1", "tolerance: needs scores after a training, and model has only a profile"),
        ("choose profile --best", "scout it: secateur scout model ..."),
        ("choose empty", "empty: holds no scout.json and no profile.json"),
        ("prune smollm2 --to large --profile empty -o out", "empty: holds no scout.json"),
    ],
)
def test_mistakes_are_one_line(ask: str, says: str, place: Path, capsys, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.argv", ["secateur", *shlex.split(ask)])
    with pytest.raises(SystemExit) as ended:
        main()
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and shown.count("\n") == 1 and says in shown


def test_the_command_prints_the_sentence_or_json(place: Path, capsys, monkeypatch):
    for more in ((), ("--json",)):
        monkeypatch.setattr("sys.argv", ["secateur", "choose", str(place / "scout"), *more])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr().out
        assert ended.value.code == 0
        if more:
            assert json.loads(shown) == json.loads(json.dumps(asdict(secateur.candidates(place / "scout"))))
        else:
            assert said(scout(USUAL)) in shown


def test_a_study_refuses_two_rules_at_once():
    with pytest.raises(ConfigError, match="best: cannot go with tolerance"):
        make(StudyOptions, {"models": ["a"], "data": ["b"], "out": "c", "best": True, "tolerance": 2})


def test_chosen_is_a_selector_of_its_own(place: Path):
    assert needs_profile("chosen")
    for spec, table, says in (
        ("chosen", None, "which needs a scout: give --profile DIR"),
        ("chosen", profile(), "is a profile, but chosen needs a scout: give the folder that secateur scout wrote"),
        ("large", scout(USUAL), "is a scout, but large needs a profile: chosen reads a scout"),
        ("chosen:3", scout(USUAL), "chosen chooses the number of layers itself"),
        ("chosen", scout(USUAL, depth=DEPTH + 1), "has 31 depths, but the model has 30 layers"),
    ):
        with pytest.raises(SecateurError, match=re.escape(says)):
            blocks_to_keep(spec, DEPTH, table)
    assert blocks_to_keep("uniform:2", DEPTH, scout(USUAL)) == (0, 29)


def test_prune_cuts_to_what_a_scout_chooses(llama_folder: Path, tmp_path: Path):
    rows = (*ladder(d1=(-5, -6, -4), d2=(0, -0.5, 0.5)), rung(3, 0, None))
    scout([], depth=3, layer_costs=(), depths=rows).save(tmp_path / "scout")
    folder = secateur.prune(llama_folder, "chosen", profile=tmp_path / "scout", pooling="mean", out=tmp_path / "cut")
    assert load(folder, Origin).kept == (0, 1)
