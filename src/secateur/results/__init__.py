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
    EvaluationRow,
    LayerCost,
    LossRow,
    Origin,
    OverlapRow,
    Profile,
    ScoreRow,
    Scores,
    Training,
)

__all__ = [
    "ChangedRow",
    "Comparison",
    "CostRow",
    "Costs",
    "DepthRow",
    "DepthScoreRow",
    "DifferenceRow",
    "EvaluationRow",
    "Float",
    "LayerCost",
    "LossRow",
    "Matrix",
    "Origin",
    "OverlapRow",
    "Profile",
    "ScoreRow",
    "Scores",
    "Table",
    "Training",
    "load",
]
