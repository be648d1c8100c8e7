"""What an exported folder says of itself: ``export.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from secateur.exporting.compatibility import Note
from secateur.results import Table
from secateur.runtime.encoder import MANIFEST
from secateur.runtime.vectors import VectorFormat

POINTS = 100


@dataclass(frozen=True)
class ScoreDifference:
    """One task: the original's score and the export's, 0 to 1."""

    task: str
    original: float
    exported: float


@dataclass(frozen=True)
class Export(Table):
    """``export.json``: what :mod:`.runtime` needs to know, and how near the export is to the original.

    Attributes:
        graph: The graph's file.
        quantization: How activations are rounded in int8: ``static`` or ``dynamic``.
        dimension: Numbers in a vector; ``vectors`` is their form where the caller asks for none, ``ranges`` the least
            and greatest value of each, (2, dimension).
        max_length: Tokens after which a text is cut, on its ``truncation_side``.
        padding: Token id of padding; ``special`` those of special tokens.
        files: Name → bytes.
        cosine_min: Least cosine between the original's vector and the export's, over ``compared`` texts, alone and
            with each prompt; ``cosine_mean`` their mean; ``least_cosine`` what was asked for.
        scores_by_task: Task → the scores of ``original`` and ``exported``.
        readers: What other software makes of the folder (:mod:`.compatibility`).
    """

    kind: ClassVar[str] = "export"
    file: ClassVar[str] = MANIFEST

    model: str
    backend: str
    precision: str
    quantization: str | None
    graph: str
    dimension: int
    vectors: VectorFormat
    ranges: tuple[tuple[float, ...], ...]
    max_length: int
    truncation_side: str
    padding: int
    special: tuple[int, ...]
    prompts: Mapping[str, str]
    default_prompt_name: str | None
    files: Mapping[str, int]
    cosine_min: float
    cosine_mean: float
    least_cosine: float
    compared: int
    scores_by_task: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    readers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[ScoreDifference, ...]:
        return tuple(ScoreDifference(task, **scores) for task, scores in self.scores_by_task.items())

    @property
    def points_lost(self) -> float | None:
        """What the average over the tasks fell by, in points of 100; None without tasks."""
        if not self.rows:
            return None
        return POINTS * float(np.mean([row.original - row.exported for row in self.rows]))

    @property
    def notes(self) -> tuple[Note, ...]:
        return tuple(Note(reader, **note) for reader, note in self.readers.items())
