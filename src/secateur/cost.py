"""What a model costs: parameters and bytes counted, speed measured, all on the model as it is, never scaled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer

from secateur.artifacts import CostRow, Costs, provenance
from secateur.blocks import depth_of, embeddings_of
from secateur.models import open_model
from secateur.progress import Progress, silent

TEXTS = tuple(f"Return the {n}th element of the sequence, or raise an error where there is none." for n in range(64))
"""64 texts of some 20 tokens."""


def cost(
    models: Mapping[str, str | Path], *, repetitions: int = 5, batch_size: int = 32, progress: Progress = silent
) -> Costs:
    """Count and time models side by side.

    Repetitions go around all models in turn, so that a slow minute of the machine hits each of them alike; the first
    round warms up and is not counted.

    Args:
        models: Name → folder.
        repetitions: Timed rounds.
        batch_size: Texts per batch.
        progress: Told after each round.
    """
    opened = {name: open_model(folder) for name, folder in models.items()}
    speeds: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(repetitions + 1):
        progress("cost", turn, repetitions + 1)
        for name, model in opened.items():
            speed = _texts_per_second(model, TEXTS, batch_size)
            if turn:
                speeds[name].append(speed)
    progress("cost", repetitions + 1, repetitions + 1)
    rows = tuple(_row(name, Path(models[name]), model, speeds[name]) for name, model in opened.items())
    return Costs(provenance=provenance(), costs=rows)


def _row(name: str, folder: Path, model: SentenceTransformer, speeds: Sequence[float]) -> CostRow:
    transformer = model[0].auto_model
    return CostRow(
        model=name,
        depth=depth_of(transformer),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding_parameters=sum(parameter.numel() for parameter in embeddings_of(transformer).parameters()),
        bytes=sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        texts_per_second=statistics.median(speeds),
        speed_low=min(speeds),
        speed_high=max(speeds),
    )


@torch.inference_mode()
def _texts_per_second(model: SentenceTransformer, texts: Sequence[str], batch_size: int) -> float:
    started = time.perf_counter()
    model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
    return len(texts) / (time.perf_counter() - started)
