"""Figures: what is drawn is what the tables hold, in words a page can trust, the same every time."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib import image
from matplotlib.figure import Figure
from matplotlib.text import Text

from secateur.document import shorten
from secateur.figures import (
    COLOURS,
    INK,
    Point,
    frontier,
    frontier_figure,
    profile_figures,
    rendered,
    save,
    training_curves,
)
from secateur.provenance import Provenance
from secateur.results import (
    DepthRow,
    DepthScoreRow,
    EvaluationRow,
    LayerCost,
    LossRow,
    Profile,
    RungRow,
    Scout,
    Training,
)

MADE = Provenance("secateur study", "2026-01-02T03:04:05+00:00", 7, {}, (), {})
SVG = "{http://www.w3.org/2000/svg}"


def profile(losses, ends=None, lens=None, **tables) -> Profile:
    """Depths with these losses, ``ends`` away from both ends of their intervals."""
    rows = tuple(
        DepthRow(
            depth,
            loss,
            None,
            0.1 * depth,
            3.0 + depth,
            loss_low=ends and loss - ends[depth - 1],
            loss_high=ends and loss + ends[depth - 1],
            next_token_loss=lens and lens[depth - 1],
        )
        for depth, loss in enumerate(losses, 1)
    )
    return Profile(MADE, "a/model", len(losses), "mean", 20.0, "float32", 8, 4, 64, "", rows, **tables)


def points(labels=("2", "4", "8")) -> list[Point]:
    return [
        Point("tiny, healed", label, 0.4 + 0.05 * i, 0.38, 0.6, 90.0 - i, 88.0 - i, 93.0 - i)
        for i, label in enumerate(labels)
    ]


def words(figure: Figure) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(rendered(figure, "svg")).iter(f"{SVG}text")]


def test_loss_curve_draws_the_losses_with_their_intervals_and_marks_the_choice() -> None:
    losses, errors = [3.0, 2.0, 2.5, 1.5, 1.75], [0.1, 0.2, 0.3, 0.1, 0.05]
    figure = profile_figures(profile(losses, errors), {"small": 2, "large": 4})["curve"]
    top = figure.axes[0]
    line = next(line for line in top.lines if len(line.get_xdata()) == len(losses))
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5]
    assert list(line.get_ydata()) == losses
    corners = top.collections[0].get_paths()[0].vertices
    for depth, (loss, error) in enumerate(zip(losses, errors, strict=True), 1):
        heights = corners[corners[:, 0] == depth][:, 1]
        assert heights.min() == pytest.approx(loss - error)
        assert heights.max() == pytest.approx(loss + error)
    text = words(figure)
    assert "small: 2" in text
    assert "large: 4" in text


def test_a_depth_with_two_names_is_labelled_once_with_both() -> None:
    text = words(profile_figures(profile([2.0, 1.0]), {"small": 2, "large": 2})["curve"])
    assert [word for word in text if ": 2" in word] == ["small, large: 2"]


def test_losses_that_are_not_numbers_leave_a_gap() -> None:
    figure = profile_figures(profile([2.0, None, 1.0]), {"small": 2, "large": 3})["curve"]
    drawn = next(line for line in figure.axes[0].lines if len(line.get_xdata()) == 3).get_ydata()
    assert math.isnan(drawn[1])
    text = words(figure)
    assert "large: 3" in text
    assert not any("small" in word for word in text)


def test_texts_alone_have_no_panel_of_losses() -> None:
    figure = profile_figures(profile([None, None, None]))["curve"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Block Influence", "Effective rank"]


def test_maps_draw_each_pair_of_depths_and_tick_the_choice() -> None:
    cka = ((1.0, 0.5, None), (0.5, 1.0, 0.25), (None, 0.25, 1.0))
    angular = tuple(tuple(0.1 * abs(i - j) for j in range(4)) for i in range(4))
    table = profile([3.0, 2.0, 1.0], cka=cka, angular=angular)
    drawn = profile_figures(table, {"small": 1, "large": 3})
    assert [*drawn] == ["curve", "cka", "angles"]
    for name, matrix, first in (("cka", cka, 1), ("angles", angular, 0)):
        mesh = drawn[name].axes[0].collections[0]
        values = np.ma.filled(mesh.get_array(), np.nan).flatten()
        assert values == pytest.approx(np.array(matrix, dtype=float).flatten(), nan_ok=True)
        assert mesh.get_coordinates()[0, 0].tolist() == [first - 0.5, first - 0.5]
        text = words(drawn[name])
        assert {"small: 1", "large: 3", "Depth"} <= set(text)
        images = list(ElementTree.fromstring(rendered(drawn[name], "svg")).iter(f"{SVG}image"))
        assert images
        assert all(value.startswith("data:image/png;") for i in images for k, value in i.attrib.items() if "href" in k)


def test_solved_by_depth_marks_the_best_depth_of_each_task() -> None:
    scores = [
        ("sts", "STS", (0.2, 0.55, 0.6)),
        ("one", "Retrieval", (0.5, 0.3, 0.1)),
        ("two", "Retrieval", (0.1, 0.2, 0.3)),
    ]
    rows = tuple(
        DepthScoreRow(task, kind, "score", depth, value, value - 0.06, value + 0.06)
        for task, kind, values in scores
        for depth, value in enumerate(values, 1)
    )
    table = profile([3.0, 1.0, 0.9], [0.2] * 3, lens=[9.0, 5.0, 2.0], task_scores=rows)
    figure = profile_figures(table)["solved"]
    titles = {axes.get_title(loc="left"): axes for axes in figure.axes if axes.get_visible()}
    assert [*titles] == [
        "Contrastive loss (nats)",
        "STS: sts",
        "Retrieval: one",
        "Retrieval: two",
        "Next-token loss (nats)",
    ]
    marks = [
        [int(line.get_xdata()[0]) for line in axes.lines if len(line.get_xdata()) == 1] for axes in titles.values()
    ]
    assert marks == [[3], [3], [1], [3], [3]]
    assert [text.get_text() for text in titles["Retrieval: one"].texts] == ["1"]
    (line,) = [line for line in titles["STS: sts"].lines if len(line.get_xdata()) == 3]
    assert line.get_ydata() == pytest.approx([20, 55, 60])


def test_frontier_draws_each_model_once_with_its_label_interval_and_range() -> None:
    figure = frontier(points(), "Texts per second")
    axes = figure.axes[0]
    assert list(axes.lines[0].get_xdata()) == [88.0, 89.0, 90.0]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([50, 45, 40])
    assert {"2", "4", "8", "cut"} <= set(words(figure))
    bars = [segment for lines in axes.collections for segment in lines.get_segments()]
    upright = [bar for bar in bars if bar[0][0] == bar[1][0]]
    assert sorted(x for bar in upright for x, _ in bar) == [88, 88, 89, 89, 90, 90]
    assert {round(y) for bar in upright for _, y in bar} == {38, 60}
    assert sorted(x for bar in bars if bar[0][0] != bar[1][0] for x, _ in bar) == [86, 87, 88, 91, 92, 93]


def test_full_models_cuts_rejected_ones_and_baselines_are_told_apart() -> None:
    kinds = ("full", "cut", "rejected", "baseline")
    shown = [
        replace(point, kind=kind, marked=kind == "cut")
        for point, kind in zip(points(("8", "6", "2", "b")), kinds, strict=True)
    ]
    named = {"full model", "cut", "cut, significantly worse", "baseline", "recommended"}
    assert named <= set(words(frontier(shown, "c")))


def test_small_costs_are_written_in_full() -> None:
    shown = [
        replace(point, cost=cost, cost_low=None) for point, cost in zip(points(), (0.004, 0.01, 0.02), strict=True)
    ]
    text = words(frontier(shown, "Seconds"))
    assert {"0.004", "0.008", "0.02"} <= set(text)


def test_the_front_is_a_line_through_the_best() -> None:
    front = [replace(point, best=point.label != "4") for point in points()]
    drawn = next(line for line in frontier(front, "c").axes[0].lines if line.get_label() == "best at its cost")
    assert list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True)) == [(88.0, 50.0), (90.0, 40.0)]


def test_labels_of_crowded_points_do_not_overlap() -> None:
    crowd = [Point("s", f"{i} layers", 0.5 + 0.0001 * i, None, None, 1500 + i) for i in range(5)]
    ends = [Point("s", label, score, None, None, size) for label, score, size in (("a", 0.4, 1000), ("b", 0.6, 2000))]
    figure = frontier([*crowd, *ends], "Parameters")
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without arrows
    assert 2 < len(boxes) <= 7
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])


def scouted(depths=(2, 5, 6, 9, 12), ends=0.02, **more) -> Scout:
    """Scores that rise with depth, of which depth 5 was not trained; layers of one size, the rest of three."""
    rows = []
    for depth in depths:
        score, difference, full = 0.4 + 0.01 * depth, 0.01 * (depth - depths[-1]), depth == depths[-1]
        paired = (None, None) if full or ends is None else (difference - ends / 2, difference + ends / 2)
        own = (None, None) if ends is None else (score - ends, score + ends)
        rows.append(RungRow(depth, depth != 5, score, *own, difference, *paired))
    parts = tuple(LayerCost(k, 100 if k else 300, 400, 1.0, 0.1, 0.1) for k in range(depths[-1] + 1))
    about = {"model": "m", "depth": depths[-1], "judge": "tasks", "depths": tuple(rows), "layer_costs": parts}
    return Scout(MADE, **(about | more))


def test_a_scout_draws_its_scores_with_both_intervals_the_tolerance_and_the_choice() -> None:
    figure = frontier_figure(scouted(), 9, 1.5)
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["trained"].get_xdata()) == [2, 6, 9, 12]
    assert list(lines["trained"].get_ydata()) == pytest.approx([42, 46, 49, 52])
    hollow = lines["scored, not trained"]
    assert (list(hollow.get_xdata()), hollow.get_markerfacecolor()) == ([5], "white")
    assert hollow.get_color() == lines["trained"].get_markerfacecolor() == COLOURS[0]
    assert list(lines["score of the full depth"].get_ydata()) == pytest.approx([52, 52])
    bars = {bar.get_label(): [seg[:, 1].tolist() for seg in bar.get_segments()] for bar in axes.collections}
    assert bars["95 % interval: score"] == [pytest.approx([38 + d, 42 + d]) for d in (2, 5, 6, 9, 12)]
    assert bars["95 % interval: difference"] == [pytest.approx([39 + d, 41 + d]) for d in (2, 5, 6, 9)]
    (band,) = [patch for patch in axes.patches if patch.get_label() == "up to 1.5 below it"]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((50.5, 52))
    text = words(figure)
    assert {"chosen: 9", "Mean score (× 100)", "Depth (layers kept, of 12)"} <= set(text)


@pytest.mark.filterwarnings("error")
def test_a_scout_of_little_can_be_drawn(tmp_path: Path) -> None:
    for table in (scouted(ends=None), scouted(layer_costs=()), scouted((3,)), scouted(tuple(range(1, 81)))):
        figure = frontier_figure(table, None, 1.0)
        text = words(figure)
        assert str(table.depth) in text and not any("chosen" in word for word in text)
        ticks = [word for word in text if word.isdigit()]
        assert len(ticks) < 60
    lost = scouted()
    lost = replace(lost, depths=(replace(lost.depths[0], score=None), *lost.depths[1:]))
    drawn = next(line for line in frontier_figure(lost, 2, 1.0).axes[0].lines if line.get_label() == "trained")
    assert list(drawn.get_xdata()) == [6, 9, 12]


def test_training_curves_draw_every_logged_loss() -> None:
    rows = tuple(LossRow(step, 1.0 / step, 1e-4) for step in (5, 10, 15))
    training = Training(MADE, "m", 15, 1.0, 10, {}, {}, rows)
    figure = training_curves({"tiny-2-healed": training})
    line = figure.axes[0].lines[0]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(row.step, row.loss) for row in rows]
    assert "tiny-2-healed" in words(figure)


def test_scores_on_the_way_are_drawn_below_with_the_kept_step_in_a_ring() -> None:
    rows = tuple(LossRow(step, 1.0 / step, 1e-4) for step in (5, 10, 15))
    trials = tuple(EvaluationRow(step, score) for step, score in ((5, 0.25), (10, 0.5), (15, 0.4)))
    plain = Training(MADE, "m", 15, 1.0, 10, {}, {}, rows)
    figure = training_curves({"plain": plain, "measured": replace(plain, evaluations=trials, best_step=10)})
    losses, scores = figure.axes
    assert len(losses.lines) == 2
    line, ring = scores.lines
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(5, 25.0), (10, 50.0), (15, 40.0)]
    assert (list(ring.get_xdata()), list(ring.get_ydata()), ring.get_fillstyle()) == ([10], [50.0], "none")
    assert line.get_color() == losses.lines[1].get_color() != losses.lines[0].get_color()


def test_the_same_table_gives_the_same_bytes() -> None:
    def drawn() -> tuple[bytes, bytes]:
        figure = profile_figures(profile([2.0, 1.0, 3.0], [0.1, 0.1, 0.1]), {"small": 2})["curve"]
        return rendered(figure, "svg"), rendered(figure, "png")

    assert drawn() == drawn()


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    rendered(frontier(points(), "c"))
    assert dict(matplotlib.rcParams) == before


def test_png_is_transparent_and_holds_the_colours(tmp_path: Path) -> None:
    save(frontier(points(), "c"), tmp_path / "new" / "figure.png")
    pixels = image.imread(tmp_path / "new" / "figure.png")
    assert pixels[0, 0, 3] == 0
    green = np.array([int(COLOURS[2][i : i + 2], 16) / 255 for i in (1, 3, 5)])  # of cuts
    assert (np.abs(pixels[..., :3] - green).max(axis=-1) < 0.01).sum() > 100
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figure.png"]


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_colours_are_legible_in_light_and_dark() -> None:
    """WCAG 2.2: 4.5:1 for text (here on plain white and black), 3:1 for what must be told apart in a graphic."""
    assert min(contrast(INK, "#ffffff"), contrast(INK, "#000000")) >= 4.5
    for colour in COLOURS:
        assert contrast(colour, "#fdfdfc") >= 3, colour
        assert contrast(colour, "#15171a") >= 3, colour


HOSTILE = ("$x_{$", "<script>alert(1)</script>", "a\x00b\u202ec\ud800", "n" * 10_000, "模型", "שלום")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", HOSTILE, ids=("formula", "script", "control", "long", "glyphs", "right-to-left"))
def test_any_name_can_be_drawn(name: str) -> None:
    figure = frontier(points((name, "4", "8")), "c")
    assert shorten(name, 26) in words(figure)
    assert rendered(figure).startswith(b"\x89PNG")


def test_shorten_keeps_both_ends() -> None:
    assert shorten("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert shorten("short", 5) == "short"
