"""How long a step takes, about: its operations, divided by the measured rate of a matrix product, plus a constant.

A forward pass costs 2 operations for each weight that a token runs through, a training step three forward passes.
:class:`.State` corrects these estimates by what the finished steps took.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from sentence_transformers.util import get_device_name

from secateur.data.sources import Source
from secateur.evaluation.task_folder import read_task_folder, sample_task, texts_of
from secateur.healing.recipes import training_config
from secateur.models import resolve
from secateur.models.blocks import blocks_of, depth_of
from secateur.models.open_model import open_model, open_skeleton
from secateur.options import CostOptions, HealOptions, ProfileOptions, PruneOptions, ScoutOptions, StudyOptions
from secateur.scouting.scout import ladder, step_cost
from secateur.studies.steps import Base, Plan, Step
from secateur.vocabulary.choice import read_vocabulary
from secateur.vocabulary.trim import token_tables

CHARACTERS_PER_TOKEN = 4
FIXED_SECONDS = {"prune": 12.0, "profile": 5.0, "scout": 20.0, "heal": 15.0, "evaluate": 6.0, "cost": 5.0}
BYTES_PER_SECOND = 200e6
SMALL = 2 << 30
"""A folder with fewer bytes of weights is opened to see that it is whole; of a larger one, no weights are read."""
COST_TOKENS = 10_000
"""Tokens that the timing of one model encodes, about."""


@dataclass(frozen=True)
class Amounts:
    """How much data there is, ``rows`` of ``texts_per_row`` texts, and how fast a matrix product is here.

    ``task_tokens`` are those of all tasks together, or of the rows that a scout holds out for want of tasks; None where
    the data of one are not here yet.
    """

    flops_per_second: Annotated[float, Field(gt=0)]
    rows: int
    texts_per_row: float
    tokens_per_text: float
    task_tokens: float | None


def measure_base(name: str, model: str, cuts_vocabulary: bool) -> Base:
    """How many layers a model has, and how large they are (ModelError if it, or its vocabulary, cannot be cut)."""
    folder = resolve(model)
    is_small = (
        isinstance(folder, Path)
        and folder.is_dir()
        and sum(file.stat().st_size for file in folder.rglob("*.safetensors")) < SMALL
    )
    if is_small:
        opened = open_model(model, device="cpu")
        transformer, tokenizer = opened[0].auto_model, opened.tokenizer
    else:
        transformer, tokenizer, _ = open_skeleton(model)
    if cuts_vocabulary:
        read_vocabulary(model, tokenizer)
        token_tables(model, transformer)
    depth = depth_of(transformer)
    blocks = sum(parameter.numel() for parameter in blocks_of(transformer).parameters())
    return Base(name, model, depth, blocks // depth, sum(parameter.numel() for parameter in transformer.parameters()))


def measure_amounts(study: StudyOptions, sources: Sequence[Source]) -> Amounts:
    """Count the texts of a study, and time a matrix product."""
    rows = [row for source in sources for row in source.rows]
    texts = [t for row in rows for t in ([row] if isinstance(row, str) else [row.anchor, row.positive, *row.negatives])]
    task_tokens: float | None = None
    if all(Path(task).exists() for task in study.tasks):
        folders = [read_task_folder(task) for task in study.tasks]
        drawn = [sample_task(task, study.sample, study.seed) if study.sample else task for task in folders]
        task_tokens = sum(_tokens(texts_of(task)) for task in drawn)
    per_row, per_text = len(texts) / max(1, len(rows)), _tokens(texts) / max(1, len(texts))
    if not (study.tasks or study.depths):
        task_tokens = min(study.held_out, len(rows) / 10) * per_row * per_text
    return Amounts(_flops_per_second(), len(rows), per_row, per_text, task_tokens)


def _tokens(texts: Sequence[str]) -> float:
    return sum(map(len, texts)) / CHARACTERS_PER_TOKEN + len(texts)


def _flops_per_second(size: int = 768) -> float:
    matrix = torch.randn(size, size, device=get_device_name())
    product = "float((matrix @ matrix).sum())"  # asking for a number waits for the device
    times = timeit.repeat(product, globals={"matrix": matrix}, repeat=9, number=1)
    return 2 * size**3 / statistics.median(times)


def estimate(step: Step, plan: Plan, amounts: Amounts) -> float | None:
    """Seconds that a step will take, about; None where nobody knows."""
    fixed, options, base = FIXED_SECONDS[step.kind], step.options, step.base
    if isinstance(options, CostOptions):
        timed = [2 * COST_TOKENS * made.depth * made.base.block_parameters for made in plan.models if made.base]
        return fixed * len(options.models) + sum(timed) / amounts.flops_per_second
    if base is None or step.depth == 0:
        return None
    if isinstance(options, PruneOptions):
        return fixed + 16 * base.parameters / BYTES_PER_SECOND  # float32, read and written twice
    read, scored = 0.0, amounts.task_tokens
    if isinstance(options, HealOptions):
        recipe = training_config(options)
        texts = recipe.steps * recipe.batch_size * amounts.texts_per_row
        read = 3 * texts * min(amounts.tokens_per_text, recipe.max_length)
        if isinstance(options, ScoutOptions):
            rungs = options.depths or ladder(base.depth, range(1, base.depth + 1), recipe.layers)
            read *= step_cost(recipe.layers, rungs, base.depth)
        else:
            scored = 0
    elif isinstance(options, ProfileOptions):
        read = min(options.max_examples, amounts.rows) * amounts.texts_per_row * amounts.tokens_per_text
        scored = scored if options.tasks else 0
    flops = 2 * step.depth * base.block_parameters
    return None if scored is None else fixed + (read + scored) * flops / amounts.flops_per_second
