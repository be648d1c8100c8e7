"""Selectors against hand-made curves and tables, where the right answer is seen or written out anew."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from secateur.choosing.choose import blocks_to_keep, candidates, choice_of, choose, needs_profile, ranges
from secateur.choosing.selectors import SELECTORS, lowest_in_each_half, replicates_of
from secateur.errors import ConfigError, DataError, IllegalDepth, SecateurError
from secateur.measures.intervals import interval
from secateur.provenance import provenance
from secateur.results import DepthRow, DepthScoreRow, LayerCost, Profile

SHARES = ("first", "uniform", "random", "block-influence", "angular")


def table(losses: list[float] | None, *, depth: int = 0, batches: int = 0, **more: object) -> Profile:
    """A profile of these losses; of texts alone where there are none. Its batches scatter around them."""
    depth = depth or len(losses or ())
    rows = tuple(
        DepthRow(k, losses[k - 1] if losses else None, None, block_influence=(k * 7 % 11) / 11, effective_rank=2.0)
        for k in range(1, depth + 1)
    )
    noise = np.random.default_rng(0).normal(0, 0.05, (batches, depth))
    noise -= noise.mean(axis=0) if batches else 0
    about = {"model": "model", "depth": depth, "pooling": "mean", "scale": 20.0, "dtype": "float32", "batch_size": 8}
    about |= {"batches": batches, "max_length": 128, "prompt": "", "depths": rows}
    about |= {"batch_losses": tuple(map(tuple, (np.array(losses) + noise).tolist())) if batches and losses else ()}
    return Profile(provenance(seed=3), **(about | more))


def depth_of(spec: str, profile: Profile) -> int:
    blocks = blocks_to_keep(spec, profile.depth, profile)
    assert blocks == tuple(range(len(blocks)))
    return len(blocks)


def test_l3prune_is_the_lowest_loss_of_each_half():
    rng = random.Random(0)
    for depth in (2, 3, 4, 7, 30):
        losses = [round(rng.random(), 1) for _ in range(depth)]  # ties are frequent
        half = depth // 2
        small = min(range(half), key=lambda i: (losses[i], i)) + 1
        large = min(range(half, depth), key=lambda i: (losses[i], i)) + 1
        profile = table(losses)
        assert choose(profile) == {"small": small, "large": large}
        for spec, expected in (("small", small), ("l3prune-small", small), ("large", large), ("l3prune-large", large)):
            assert depth_of(spec, profile) == expected


def test_a_limit_without_costs_tells_why_there_are_none():
    for notes, why in (((), "earlier version"), (("no costs of cut models: out of memory",), "out of memory")):
        with pytest.raises(DataError, match=f"has no costs of the layers: .*{why}; profile again"):
            choose(table([2.0, 1.0], notes=notes), max_params=1e9)


def scores(**by_task: list[float]) -> tuple[DepthScoreRow, ...]:
    return tuple(
        DepthScoreRow(task, "STS", "cosine_spearman", depth, score)
        for task, own in by_task.items()
        for depth, score in enumerate(own, start=1)
        if not math.isnan(score)
    )


def test_best_task_is_the_highest_mean_score():
    profile = table([3.0, 2, 1, 4], task_scores=scores(one=[0.1, 0.9, 0.5, 0.6], two=[0.2, 0.2, 0.7, 0.6]))
    assert depth_of("best-task", profile) == 3  # of 3 and 4, equally good on average, the shallower
    missing = table([3.0, 2, 1, 4], task_scores=scores(one=[0.1, 0.9, 0.5, 0.6], two=[math.nan, 1, math.nan, 0.6]))
    assert depth_of("best-task", missing) == 2
    with pytest.raises(DataError, match="has no task scores: profile with --tasks"):
        depth_of("best-task", table([3.0, 2, 1]))
    with pytest.raises(DataError, match="no depth at which every task"):
        nowhere = scores(one=[0.1, math.nan], two=[math.nan, 0.2])
        depth_of("best-task", table([1.0, 2], task_scores=nowhere))


def test_block_influence_keeps_the_blocks_that_change_most():
    profile = table(None, depth=10)
    influence = [row.block_influence for row in profile.depths]
    for count in range(1, 11):
        kept = blocks_to_keep(f"block-influence:{count}", 10, profile)
        assert sorted(influence[i] for i in kept) == sorted(influence)[10 - count :]
    same = replace(profile, depths=tuple(replace(row, block_influence=0.5) for row in profile.depths))
    assert blocks_to_keep("block-influence:3", 10, same) == (0, 1, 2)


def test_angular_drops_the_run_that_turns_the_state_least():
    rng = np.random.default_rng(2)
    angles = rng.random((9, 9))
    profile = table(None, depth=8, angular=tuple(map(tuple, angles.tolist())))
    for count in range(1, 9):
        gone = 8 - count
        start = int(np.argmin([angles[i, i + gone] for i in range(8 - gone + 1)]))
        expected = tuple(i for i in range(8) if i not in range(start, start + gone))
        assert blocks_to_keep(f"angular:{count}", 8, profile) == expected
    with pytest.raises(DataError, match="another layout"):
        blocks_to_keep("angular:3", 8, table(None, depth=8))
    one_of_two = candidates(table(None, depth=2, angular=((0.0, 0.1, 0.5), (0.1, 0.0, 0.2), (0.5, 0.2, 0.0))))
    reasons = {row.name: row.reason for row in one_of_two.rows}
    assert reasons["angular:1"] == "layer 0 (from 0) turns the state least, by 0.100 of a half turn"


def test_uniform_is_even_and_holds_both_ends():
    assert blocks_to_keep("uniform:5", 9) == (0, 2, 4, 6, 8)
    assert blocks_to_keep("uniform:1", 9) == (0,)
    for depth, count in itertools.combinations_with_replacement(range(2, 14), 2):
        blocks = blocks_to_keep(f"uniform:{depth}", count)
        assert len(set(blocks)) == depth and blocks[0] == 0 and blocks[-1] == count - 1
        gaps = {b - a for a, b in itertools.pairwise(blocks)}
        assert max(gaps) - min(gaps) <= 1


def test_random_is_drawn_by_the_seed():
    draws = {blocks_to_keep(f"random:7:{seed}", 30) for seed in range(20)}
    assert len(draws) > 15
    assert all(len(blocks) == 7 and sorted(set(blocks)) == list(blocks) for blocks in draws)
    assert blocks_to_keep("random:7:5", 30) != blocks_to_keep("random:7", 30)
    assert blocks_to_keep("random:7", 30) == blocks_to_keep("random:7:42", 30)


def test_numbers_and_first_are_the_first_blocks():
    assert blocks_to_keep(3, 8) == blocks_to_keep("3", 8) == blocks_to_keep("first:3", 8) == (0, 1, 2)
    assert len(blocks_to_keep(0.8, 30)) == len(blocks_to_keep("0.8", 30)) == 6
    with pytest.raises(ConfigError, match=r"to: is '\[1, 2\]'"):
        blocks_to_keep([1, 2], 8)


def test_how_sure_a_choice_is():
    profile = table([3.0, 1, 3, 3, 2, 3], batches=20)
    assert choice_of("small", 6, profile).selection_probability == 1
    unsure = table([1.0, 1.001, 3, 3, 2, 3], batches=20)
    chance = choice_of("small", 6, unsure).selection_probability
    assert chance is not None and 0.2 < chance < 0.8
    assert choice_of("small", 6, table([3.0, 1, 3, 3, 2, 3])).selection_probability is None
    assert choice_of("uniform:3", 6).selection_probability is None


def test_texts_alone_choose_by_what_they_tell():
    profile = table(None, depth=6, angular=tuple(map(tuple, torch.rand(7, 7).tolist())))
    for name, selector in SELECTORS.items():
        if selector.counts:
            assert len(blocks_to_keep(f"{name}:2", 6, profile)) == 2
        else:
            with pytest.raises(DataError):
                blocks_to_keep(name, 6, profile)


def test_a_single_block():
    profile = table([1.0], angular=((0.0, 0.1), (0.1, 0.0)), task_scores=scores(one=[0.5]))
    for name in SHARES:
        assert blocks_to_keep(f"{name}:1", 1, profile) == (0,)
    assert depth_of("best-task", profile) == 1
    for name in ("small", "large"):
        with pytest.raises(IllegalDepth, match="a single layer has no halves"):
            depth_of(name, profile)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def test_replicates_spread_as_the_standard_error_does():
    losses = noise(200, 4) + np.arange(4)
    replicates = replicates_of(losses, 0, 20000)
    error = losses.std(axis=0, ddof=1) / math.sqrt(200)
    assert replicates.mean(axis=0) == pytest.approx(losses.mean(axis=0), abs=0.02)
    assert replicates.std(axis=0) == pytest.approx(error, rel=0.03)
    low, high = zip(*map(interval, replicates.T), strict=True)
    assert np.subtract(high, low) == pytest.approx(2 * 1.97 * error, rel=0.03)


def test_what_all_batches_share_leaves_the_selection_probabilities_sharp():
    apart = noise(10, 1) + np.array([1.0, 0.9, 2.0, 1.9])  # batches differ much, but at all depths alike
    assert np.unique(lowest_in_each_half(replicates_of(apart, 0)), axis=0).tolist() == [[2, 4]]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("l3prune", "to: is 'l3prune': give a number of layers"),
        ("uniform", "uniform must be told how many layers to keep: uniform:7"),
        ("uniform:", "must be told"),
        ("uniform:-1", "must be told"),
        ("uniform:2:3", "must be told"),
        ("random:2:3:4", "must be told"),
        ("best-task:3", "best-task chooses the number of layers itself"),
        ("uniform:0", "cannot cut a model of 6 layers to 0"),
        ("random:7", "cannot cut a model of 6 layers to 7: that would keep 7: nearest legal: 6"),
        ("", "to: is ''"),
        ("nan", "to: is nan"),
        ("1e400", "to: is 1e400"),
    ],
)
def test_what_cannot_be_chosen_is_said(spec: str, says: str):
    with pytest.raises(SecateurError) as caught:
        blocks_to_keep(spec, 6, table([6.0, 5, 4, 3, 2, 1]))
    assert says in str(caught.value)


def test_profiles_that_are_missing_or_of_another_model():
    for name in ("best-task", "large", "block-influence:2"):
        assert needs_profile(name)
        with pytest.raises(ConfigError, match="which needs a profile: give --profile DIR"):
            blocks_to_keep(name, 6)
        with pytest.raises(ConfigError, match="has 3 depths, but the model has 6 layers"):
            blocks_to_keep(name, 6, table([3.0, 2, 1]))
    assert not any(map(needs_profile, ("7", 0.3, "uniform:7", "random:7:1", "first:7")))


PARTS = tuple(LayerCost(k, 1000 + 100 * k, 4000 + 400 * k, 10.0 * k, 0.001 * (k + 1), 0.01) for k in range(7))
"""Costs of six layers that differ."""


def costs(column: str) -> list[float]:
    """Of the depths 1 to 6."""
    return list(itertools.accumulate(getattr(row, column) for row in PARTS))[1:]


LOSSES = [1.2, 2.0, 3.0, 1.0, 1.04, 1.5]


@pytest.mark.parametrize(
    ("limit", "column", "unit"),
    [("max_params", "parameters", 1), ("max_bytes", "bytes", 1), ("max_latency_ms", "latency", 1000)],
)
def test_budgets_of_costs(limit: str, column: str, unit: int):
    profile, texts = table(LOSSES, layer_costs=PARTS), table(None, depth=6, layer_costs=PARTS)
    for deepest, cost in enumerate(costs(column), start=1):
        expected = min(range(deepest // 2 + 1, deepest + 1), key=lambda k: LOSSES[k - 1])
        assert choose(profile, **{limit: unit * cost + 1e-6}) == {"budget": expected}
        assert choose(texts, **{limit: unit * cost + 1e-6}) == {"budget": deepest}
    least = unit * costs(column)[0]
    with pytest.raises(ConfigError, match=f"{limit}: no depth has at most .*the smallest, depth 1, has ") as caught:
        choose(profile, **{limit: 0.9 * least})
    assert f"{least:,.0f} " in str(caught.value)
    with pytest.raises(DataError, match="profile again"):
        choose(table(LOSSES), **{limit: 1e9})


def test_a_budget_of_loss_is_the_shallowest_near_enough_to_the_lowest():
    profile = table(LOSSES, layer_costs=PARTS, batches=20)
    for increase, depth in ((0, 4), (0.05, 4), (0.199, 4), (0.201, 1)):
        assert choose(profile, max_loss_increase=increase) == {"budget": depth}
    three = costs("parameters")[2]
    assert choose(profile, max_loss_increase=0.3, max_params=three) == {"budget": 1}
    with pytest.raises(
        ConfigError, match=r"no depth that fits \(up to 3\) .* within 0.1 of the lowest: 0.2 allows depth 1"
    ):
        choose(profile, max_loss_increase=0.1, max_params=three)
    with pytest.raises(DataError, match="texts alone"):
        choose(table(None, depth=6, layer_costs=PARTS), max_loss_increase=0.1)


@pytest.mark.parametrize("limit", [{"max_params": math.nan}, {"max_bytes": "five"}, {"max_params": -1}])
def test_limits_that_are_no_numbers_are_refused(limit: dict[str, object]):
    measured = table([3.0, 2, 1])
    for ask in (choose, candidates):
        with pytest.raises(ConfigError, match="is not valid"):
            ask(measured, **limit)


def test_all_choices_side_by_side():
    angles = tuple(map(tuple, torch.rand(7, 7).tolist()))
    profile = table(LOSSES, layer_costs=PARTS, batches=20, angular=angles, task_scores=scores(one=[0, 1, 2, 3, 4, 5]))
    found = candidates(profile, max_params=costs("parameters")[2])
    assert (found.model, found.depth, found.refused) == ("model", 6, {})
    rows = {row.name: row for row in found.rows}
    wanted = {len(rows[name].blocks) for name in ("budget", "l3prune-small", "l3prune-large")}
    assert {int(name.split(":")[1]) for name in rows if ":" in name} == wanted
    assert {name.split(":")[0] for name in rows} == {*SELECTORS, "full", "budget"} - {"first"}
    for row in found.rows:
        if row.name not in ("full", "budget"):
            assert blocks_to_keep(row.name, 6, profile) == row.blocks
        kept = [PARTS[0], *(PARTS[i + 1] for i in row.blocks)]
        assert row.parameters == sum(part.parameters for part in kept)
        assert row.bytes == sum(part.bytes for part in kept)
        assert row.flops_per_token == sum(part.flops_per_token for part in kept)
        assert row.latency == pytest.approx(sum(part.latency for part in kept))
        assert row.speed == pytest.approx(7 / (1 + len(row.blocks)))
        is_prefix = row.blocks == tuple(range(len(row.blocks)))
        assert row.loss == (LOSSES[len(row.blocks) - 1] if is_prefix else None)
    assert rows["full"].speed == 1 and len(rows["full"].blocks) == 6
    shown = found._repr_html_()  # what a notebook shows
    assert shown.count("<tr") == 1 + len(rows)
    assert all(f"<td>{name}</td>" in shown for name in rows)


def test_side_by_side_of_little_data():
    texts = candidates(table(None, depth=6))
    assert [row.name for row in texts.rows] == ["full", "block-influence:3", "uniform:3", "random:3"]
    assert "texts alone" in texts.refused["l3prune-small"] and "another layout" in texts.refused["angular:3"]
    one = candidates(table([1.0]))
    assert [row.name for row in one.rows] == ["full"]
    assert "no halves" in one.refused["l3prune-small"]


def test_ranges_are_what_keep_takes():
    assert ranges((0,)) == "0"
    assert ranges((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"


def test_the_documentation_names_every_selector():
    text = (Path(__file__).parents[1] / "docs" / "reference" / "choosing.md").read_text(encoding="utf-8")
    for name, selector in SELECTORS.items():
        assert (f"`{name}:K`" if selector.counts else f"`{name}`") in text
