"""How healing went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.figures.style import COLOURS, DASHES, MARKERS, MOST_SERIES, drawing, legend, new_figure, number
from secateur.figures.text import shorten
from secateur.results import Training


def training_curves(trainings: Mapping[str, Training]) -> Figure:
    """Training loss against step, one line per healed model; below, where there are any, the scores on the way.

    A ring marks the score of the step whose weights were kept.
    """
    scored = any(training.trials for training in trainings.values())
    with drawing():
        figure = new_figure(5.4 if scored else 3.3)
        panels = list(figure.subplots(1 + scored, sharex=True, squeeze=False).flat)
        for index, (name, training) in enumerate(trainings.items()):
            losses = [(row.step, number(row.loss)) for row in training.rows]
            _line(panels[0], index, losses, name)
            if training.trials:
                _line(panels[1], index, [(row.step, 100 * number(row.score)) for row in training.trials], name)
                _ring(panels[1], index, training)
        panels[0].set_ylabel("Training loss (nats)")
        if scored:
            panels[1].set_ylabel("Score on the way (points)")
        panels[-1].set_xlabel("Step")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(trainings) <= MOST_SERIES:
            legend(figure, panels[0])
    return figure


def _line(axes: Any, index: int, points: Sequence[tuple[int, float]], name: str) -> None:
    """One model's line, alike in both panels."""
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps, values, color=COLOURS[index % len(COLOURS)], linestyle=DASHES[index % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)], markersize=4.5, markevery=max(1, len(steps) // 8), linewidth=1.4,
        label=shorten(name),
    )  # fmt: skip


def _ring(axes: Any, index: int, training: Training) -> None:
    best = [100 * row.score for row in training.trials if row.step == training.best_step]
    axes.plot(
        [training.best_step] * len(best), best, linestyle="none", marker="o", markersize=11, fillstyle="none",
        color=COLOURS[index % len(COLOURS)], markeredgewidth=1.6,
    )  # fmt: skip
