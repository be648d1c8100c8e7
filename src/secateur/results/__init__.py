"""Results as tables, with their provenance."""

from secateur.results.base import Float, Matrix, Table, load
from secateur.results.kinds import (
    ChangedRow,
    Comparison,
    CostRow,
    Costs,
    DepthRow,
    DepthScoreRow,
    DifferenceRow,
    LossRow,
    Origin,
    OverlapRow,
    PartRow,
    Profile,
    ScoreRow,
    Scores,
    Training,
    TrialRow,
)

__all__ = [
    "ChangedRow",
    "Comparison",
    "CostRow",
    "Costs",
    "DepthRow",
    "DepthScoreRow",
    "DifferenceRow",
    "Float",
    "LossRow",
    "Matrix",
    "Origin",
    "OverlapRow",
    "PartRow",
    "Profile",
    "ScoreRow",
    "Scores",
    "Table",
    "Training",
    "TrialRow",
    "load",
]
