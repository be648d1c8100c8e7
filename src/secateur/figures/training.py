"""How healing went."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from secateur.artifacts import Training
from secateur.figures.style import COLOURS, DASHES, MARKERS, MOST_SERIES, drawing, legend, new_figure, number
from secateur.figures.text import shorten


def training_curves(trainings: Mapping[str, Training]) -> Figure:
    """Training loss against step, one line per healed model."""
    with drawing():
        figure = new_figure(3.3)
        axes = figure.subplots()
        for index, (name, training) in enumerate(trainings.items()):
            steps, losses = [row.step for row in training.rows], [number(row.loss) for row in training.rows]
            colour, dashes = COLOURS[index % len(COLOURS)], DASHES[index % len(DASHES)]
            marker = MARKERS[index % len(MARKERS)]
            every = max(1, len(steps) // 8)
            axes.plot(
                steps, losses, color=colour, linestyle=dashes, marker=marker, markersize=4.5, markevery=every,
                linewidth=1.4, label=shorten(name),
            )  # fmt: skip
        axes.set_xlabel("Step")
        axes.set_ylabel("Training loss (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if len(trainings) <= MOST_SERIES:
            legend(figure, axes)
    return figure
